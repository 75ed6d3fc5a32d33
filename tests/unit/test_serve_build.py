"""What a Serve configuration says in `args`, as an application. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sbi_dist.errors import InputError
from sbi_dist.serving.deployment import build


def options(**arguments: Any) -> Any:
    """Of the deployment's replicas: store, experiment and its section `serve`."""
    return build(arguments)._bound_deployment.init_args


def test_fields_are_overridden_by_their_paths(tmp_path: Path) -> None:
    store, experiment, serve = options(
        experiment="gaussian",
        store=str(tmp_path),
        **{"serve.max_replicas": 3, "serve.tokens_file": None, "serve.max_wait_s": 1e-3},
    )
    assert experiment == "gaussian" and store.uri.endswith(f"{tmp_path}/gaussian")
    assert (serve.max_replicas, serve.tokens_file, serve.max_wait_s) == (3, None, 1e-3)


def test_texts_stay_texts(tmp_path: Path) -> None:
    file = tmp_path / "of: mine #1.yaml"
    file.write_text("problem: sbi_dist.problems.gaussian:problem\n")
    for name in ("123", "null", "a: b"):
        store, experiment, _ = options(experiment=str(file), name="x", store=str(tmp_path / name))
        assert experiment == "x" and store.uri.endswith(f"/{name}/x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "args.experiment is None; give a file"),
        ({"experiment": ["gaussian"]}, "args.experiment is"),
        ({"experiment": "gausian"}, "did you mean 'gaussian'"),
        ({"experiment": "gaussian", "serve.max_replica": 3}, "did you mean 'serve.max_replicas'"),
        ({"experiment": "gaussian", "serve.max_replicas": "3 or 4"}, "serve.max_replicas is"),
        ({"experiment": "gaussian", "serve": {"port": 0}}, "serve.port is 0"),
    ],
)
def test_what_is_wrong_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(arguments)
