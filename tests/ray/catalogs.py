"""A catalog with bad rows, a small trained model, and what the infer stage makes of both."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from sbi_dist.catalog import infer as stage
from sbi_dist.catalog.actor import PartWriter
from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.plan import parts
from sbi_dist.catalog.source import open_catalog
from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.estimation.ensemble import Estimator
from sbi_dist.npe import NPE
from sbi_dist.posterior.posterior import PROMOTED, Posterior
from sbi_dist.priors import BoxUniform
from sbi_dist.store import ObjectStore

LOW, HIGH = [-1.0, 0.0], [1.0, 2.0]
PROBLEM = f"""
from sbi_dist import BoxUniform, Problem


def simulator(theta, rng):
    return theta + 0.1 * rng.standard_normal(2)


problem = Problem(BoxUniform({LOW}, {HIGH}), simulator, parameter_names=["a", "b"])
"""
# Draws take their time, so that there is one to be killed in.
ROWS, ROWS_PER_PART, NUM_SAMPLES = 1200, 30, 1000
PARTS = ROWS // ROWS_PER_PART
OPTIONS: dict[str, Any] = {"num_samples": NUM_SAMPLES, "output": "both", "seed": 3, "actors": 2}
BAD = {100: "null", 200: "wrong_length", 300: "nonfinite", 400: "null"}


@functools.cache
def estimator() -> Estimator:
    rng = np.random.default_rng(0)
    theta = rng.uniform(LOW, HIGH, (300, 2)).astype(np.float32)
    x = theta + 0.1 * rng.standard_normal((300, 2)).astype(np.float32)
    npe = NPE(
        BoxUniform(LOW, HIGH),
        transforms=2,
        hidden_features=16,
        max_epochs=2,
        show_progress_bars=False,
    )
    return npe.append_simulations(theta, x).train(seed=0)


def save_model(store: ObjectStore) -> ObjectStore:
    """Leave a model in an experiment's folder as the train stage does; the model's folder."""
    model = store.child("models/m")
    about = {"parameter_names": ["a", "b"], "prior": {"kind": "opaque"}}
    save_bundle(model, estimator(), about)
    store.put(PROMOTED, json.dumps({"model": "m"}).encode())
    return model


def write_experiment(folder: Path) -> None:
    (folder / "problem.py").write_text(PROBLEM)
    content = {"name": "experiment", "problem": "problem.py:problem", "infer": OPTIONS}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))


def catalog() -> bytes:
    """A Parquet file with a bad row of each kind, and one at the prior's very edge."""
    rng = np.random.default_rng(1)
    x = (rng.uniform(LOW, HIGH, (ROWS, 2)) + 0.1 * rng.standard_normal((ROWS, 2))).tolist()
    x[100], x[200], x[300], x[400] = None, [0.1], [np.nan, 0.5], [None, 0.5]
    x[500] = HIGH
    sink = io.BytesIO()
    ids = [f"galaxy {row}" for row in range(ROWS)]
    table = pa.table({"x": pa.array(x, pa.list_(pa.float64())), "observation_id": ids})
    # As it is in memory, so that tests may change a byte.
    pq.write_table(table, sink, row_group_size=170, compression="none", use_dictionary=False)
    return sink.getvalue()


def begin(model: ObjectStore, path: str, target: ObjectStore) -> None:
    """Ask for small parts: a job goes on with the division that it was begun with."""
    posterior = Posterior.from_store(model)
    source = open_catalog(path, (2,))
    request = stage._request(posterior, source, InferOptions(**OPTIONS))
    stage._begin(target, {**request, "rows_per_part": ROWS_PER_PART})


def calm(model: ObjectStore, path: str, target: ObjectStore) -> dict[str, bytes]:
    """The parts as one process writes them, one after the other, with the threads of an actor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    posterior, source = Posterior.from_store(model), open_catalog(path, (2,))
    options = InferOptions(**OPTIONS)
    request = stage._request(posterior, source, options)
    writer = PartWriter(posterior, options, target, stage._metadata(request))
    for part in parts(ROWS, ROWS_PER_PART):
        writer.prepare(part, source.read(part.start, part.stop))()
    torch.set_num_threads(threads)
    return stored(target)


def stored(target: ObjectStore) -> dict[str, bytes]:
    return {key: target.get(key) for key in target.list("part-")}
