"""Two services on one machine keep apart, also while a replica of one is gone."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.store import LocalStore
from tests.services.served import Served, until
from tests.unit.test_untrusted_bundle import made

TOKEN = {"Authorization": "Bearer secretDoNotShow"}


def service(folder: Path, name: str, **settings: object) -> Served:
    """One whose only model is of that name."""
    store = LocalStore(folder / name / "gaussian")
    prior = prior_to_data(BoxUniform([-2.0] * 2, [2.0] * 2))
    about = {"prior": prior, "parameter_names": ["a", "b"], "model": name}
    save_bundle(store.child(f"models/{name}"), made(), about)
    store.put(PROMOTED, json.dumps({"model": name}).encode())
    return Served(str(folder / name), {}, serve__cpus_per_replica=0.25, **settings)


@pytest.mark.slow
def test_a_replica_is_gone_and_the_other_service_does_not_answer(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secretDoNotShow\n")
    with contextlib.ExitStack() as ending:
        other = service(tmp_path, "open")
        ending.callback(other.remove)
        guarded = service(tmp_path, "guarded", serve__tokens_file=tokens)
        ending.callback(guarded.remove)
        (victim,) = guarded.replicas()
        os.kill(victim.pid, signal.SIGKILL)
        found: collections.Counter[tuple[bool, int, str | None]] = collections.Counter()
        without = (False, 401, None)

        def ask(with_token: bool) -> None:
            headers = TOKEN if with_token else {}
            # Until there is a replica again, some get no answer.
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=3)
                promoted = answer.json().get("promoted") if answer.status_code < 500 else None
                found[with_token, answer.status_code, promoted] += 1

        def again() -> bool:
            """Ask; whether a replica has answered for a while."""
            ask(False)
            ask(True)
            new = [each for each in guarded.replicas() if each != victim]
            return bool(new) and min(found[without], found[True, 200, "guarded"]) > 10

        until(again, 180.0, "another replica answers, each by its rules")
        unexpected = [
            key for key in found if key[1] < 500 and key != without and key[2] != "guarded"
        ]
        assert not unexpected, found
        assert httpx.get(f"{other.url}/v1/models").json()["promoted"] == "open"
