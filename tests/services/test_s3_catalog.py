"""The infer stage from and to a real S3 server that is killed on the way."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sbi_dist.catalog.infer import infer
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import open_catalog
from sbi_dist.catalog.table import read_draws
from sbi_dist.errors import InputError, StageError
from sbi_dist.posterior.posterior import Posterior
from sbi_dist.store import LocalStore, S3Store
from tests.ray import catalogs
from tests.ray.catalogs import BAD, PARTS, ROWS
from tests.services.s3_server import S3Server
from tests.services.test_s3_pipeline import command, ended


def test_the_server_is_killed_on_the_way(
    tmp_path: Path, s3_server: S3Server, store: S3Store
) -> None:
    """Source, model and target in a bucket: the results of one process on a local disk."""
    model = catalogs.save_model(store.child("experiment"))
    store.put("data/c.parquet", catalogs.catalog())
    uri, target = f"{store.uri}/data/c.parquet", store.child("out")
    catalogs.begin(model, uri, target)
    expected = catalogs.calm(model, uri, LocalStore(tmp_path / "calm"))
    job = tmp_path / "job"
    job.mkdir()
    arguments = [
        "infer", "experiment.yaml", "--store", store.uri, "--observations", uri,
        "--output", target.uri,
    ]  # fmt: skip
    for name, value in catalogs.OPTIONS.items():
        arguments += ["--set", f"infer.{name}={value}"]

    def parts() -> int:
        return len(list(target.list("part-")))

    run = command(job, *arguments, **s3_server.environment)
    try:
        deadline = time.monotonic() + 120
        while parts() < 4:
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < deadline, "no parts within two minutes"
            time.sleep(0.05)
        s3_server.kill()
        time.sleep(2.0)
        assert run.poll() is None, "it was to wait for the server"
    finally:
        s3_server.restart()
    assert parts() < PARTS, "the kill was to come in the middle"
    code, out, err = ended(run)
    assert code == 0, err
    assert out.strip() == target.uri
    assert catalogs.stored(target) == expected
    read = read_draws(target)
    assert read.ids == [f"galaxy {row}" for row in range(ROWS)]
    assert {row: read.statuses[row] for row in BAD} == BAD
    assert not (job / "runs").exists(), "all was to be in the store"
    assert s3_server.environment["AWS_SECRET_ACCESS_KEY"] not in out + err


def test_an_object_that_is_replaced_is_noticed(store: S3Store) -> None:
    content = catalogs.catalog()
    store.put("c.parquet", content)
    model = catalogs.save_model(store)
    source = open_catalog(f"{store.uri}/c.parquet", (2,))
    assert open_catalog(f"{store.uri}/c.parquet", (2,)).name == source.name
    # An object of the same size, whose rows are others.
    store.put("c.parquet", content.replace(b"galaxy 7", b"galaxy x"))
    assert open_catalog(f"{store.uri}/c.parquet", (2,)).name != source.name
    with pytest.raises(StageError, match=r"s3://.*c\.parquet was changed or removed while"):
        infer(
            Posterior.from_store(model),
            model,
            source,
            InferOptions(num_samples=10, actors=1),
            store.child("out"),
            show_progress=False,
        )
    assert not list(store.list("out/part-"))
    store.delete("c.parquet")
    with pytest.raises(StageError, match="was changed or removed"):
        source.check()
    with pytest.raises(InputError, match="there is no such object"):
        open_catalog(f"{store.uri}/c.parquet", (2,))


def test_identity(store: S3Store) -> None:
    with pytest.raises(KeyError):
        store.identity("k")
    store.put("k", b"abc")
    first = store.identity("k")
    assert first == store.identity("k") and first[0] == 3
    store.put("k", b"abd")
    assert store.identity("k") != first and store.identity("k")[0] == 3
    store.put("k", b"")
    assert store.identity("k")[0] == 0
