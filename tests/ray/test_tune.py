"""A search by Ray Tune: what is kept of its trials, and that it goes on after what kills it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sbi_dist.estimation.data import ShardSource
from sbi_dist.estimation.loop import fit_source
from sbi_dist.experiment import load_experiment
from sbi_dist.pipeline import Pipeline
from sbi_dist.priors import support_bounds
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.tuning.search import Search, plan_search
from tests.ray.conftest import SLOW, Run, command, environment, ours, wait_until, write_experiment

# Bent, so that the linear regression that training starts from is far from the best.
BENT = SLOW.replace("time.sleep(0.004)", "theta = theta + [0, 2 * theta[0] ** 2]")
TRAIN = {
    "transforms": 2, "hidden_features": 16, "blocks": 1, "batch_size": 20, "max_epochs": 16,
    "schedule": "cosine", "learning_rate": 1e-3, "checkpoint_every_s": 0.1,
}  # fmt: skip
TUNE = {"trials": 4, "space": {"learning_rate": [2e-3, 4e-3, 1.0]}, "grace_epochs": 6, "seed": 0}


@pytest.fixture(scope="module")
def dataset(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment whose simulations are there."""
    folder = tmp_path_factory.mktemp("simulated")
    path = write_experiment(folder, BENT)
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "train": TRAIN, "tune": TUNE}))
    experiment, base = load_experiment(str(path), [f"store={folder / 'runs'}"])
    Pipeline(experiment, base).simulate()
    return folder


@pytest.fixture
def simulated(dataset: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    return tmp_path


def planned() -> tuple[Pipeline, Search]:
    """The experiment of the folder that we are in, and its search."""
    experiment, base = load_experiment("experiment.yaml")
    pipeline = Pipeline(experiment, base)
    this = pipeline.rounds.current()
    records = pipeline.rounds.records(this)
    assert records is not None
    shards = [[record.index, record.digest] for record in records]
    data = {"dataset": this.dataset_id, "shards": shards}
    return pipeline, plan_search(experiment.tune, experiment.train, data)


def calm_losses(pipeline: Pipeline, options: Any) -> list[float]:
    """The validation losses of a training that nothing disturbs, in this process."""
    this = pipeline.rounds.current()
    records = pipeline.rounds.records(this)
    assert records is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source = ShardSource(Dataset(this.store), records)
        _, history = fit_source(source, support_bounds(this.problem.prior), options)
    finally:
        torch.set_num_threads(threads)
    return history["validation_loss"]


def trial_processes() -> set[int]:
    """Processes of the session's Ray that run a trial, or wait for one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (path / "cmdline").read_bytes().split(b"\0")[0]
            if b"ImplicitFunc" in title and ours(path):
                found.add(int(path.name))
    return found


def times(folder: Path) -> dict[str, int]:
    """When each trial ended."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("trial-*.json")}


def test_a_search_goes_on_after_kills(simulated: Path, sbi_dist: Run, ray_address: str) -> None:
    """SIGTERM and kill -9 of the driver, kill -9 of a trial: as if nothing had happened."""
    pipeline, search = planned()
    folder = simulated / "runs/experiment/tune" / search.id
    # The hopeless one begins when others have passed the epoch at which it is judged.
    assert search.trials[3].options.learning_rate == 1.0

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command("tune", "experiment.yaml"), env=environment(ray_address), cwd=simulated
        )

    def checkpoints() -> set[Path]:
        # A process that is killed while it writes leaves a hidden file behind.
        return set(folder.glob("*/checkpoints/[!.]*"))

    driver = start()
    wait_until(checkpoints, "a first checkpoint")
    os.kill(min(trial_processes()), signal.SIGKILL)
    before = checkpoints()
    wait_until(lambda: checkpoints() - before, "another checkpoint")
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=60) == 143
    kept = times(folder)
    assert len(kept) < 4

    driver = start()
    wait_until(lambda: len(times(folder)) > len(kept), "the end of a trial")
    driver.kill()
    driver.wait(timeout=60)
    # What its trials had begun is over when they are.
    wait_until(lambda: not trial_processes(), "the end of the driver's processes")
    ended = times(folder)
    assert kept.items() <= ended.items() and len(ended) < 4

    searched = sbi_dist("tune", "experiment.yaml")
    assert searched.returncode == 0, searched.stderr
    assert {name: time for name, time in times(folder).items() if name in ended} == ended
    assert not checkpoints()
    records = {
        trial.id: json.loads((folder / f"trial-{trial.id}.json").read_text())
        for trial in search.trials
    }
    hopeless = records[search.trials[3].id]
    assert hopeless["status"] in ("stopped", "failed")
    assert hopeless["status"] == "failed" or hopeless["epochs"] >= 6
    assert records[search.trials[0].id]["status"] == "finished"
    finished = [trial for trial in search.trials if records[trial.id]["status"] == "finished"]
    for trial in finished:
        record = records[trial.id]
        assert record["validation_loss"] == calm_losses(pipeline, trial.options)
        assert record["loss"] == min(record["validation_loss"])
        assert record["epochs"] == 16 and record["weights"] > 0 and record["held_out"] == 40
        assert (folder / trial.id / "validation.npy").is_file()

    # Everything is there: nothing is trained again, and nothing but the table is said.
    after = times(folder)
    again = sbi_dist("tune", "experiment.yaml")
    assert again.returncode == 0 and again.stdout == searched.stdout and times(folder) == after
    assert len(again.stderr.strip().splitlines()) == 1
    best = min(records.values(), key=lambda each: each["loss"] or 0.0)
    assert searched.stdout.splitlines()[2].split()[:3] == [
        "1",
        best["trial"],
        f"{best['loss']:.4f}",
    ]
    chosen = yaml.safe_load((folder / "best.yaml").read_text())["train"]
    assert chosen == {**TRAIN, **best["settings"]}


def test_where_all_trials_fail_their_reason_is_told(simulated: Path, sbi_dist: Run) -> None:
    changes = ("--set", "train.embedding=convolutional_2d", "--set", "tune.trials=1")
    failed = sbi_dist("tune", "experiment.yaml", *changes)
    last = failed.stderr.strip().splitlines()[-1]
    assert (
        failed.returncode == 1
        and "all 1 trials failed" in last
        and "train.embedding=convolutional_2d takes" in last
    )
    (record,) = simulated.glob("runs/experiment/tune/*/trial-*.json")
    assert json.loads(record.read_text())["status"] == "failed"


def test_what_is_refused_is_told_before_anything_starts(simulated: Path, sbi_dist: Run) -> None:
    for change, sentence in {
        "tune.space.hiden_features=[1]": "did you mean 'hidden_features'?",
        "tune.cpus_per_trial=1000": "tune.cpus_per_trial asks for 1 x 1000",
        "tune.gpus_per_trial=64": "tune.gpus_per_trial asks for",
        "simulate.num_simulations=1000": "tune: ",
    }.items():
        refused = sbi_dist("tune", "experiment.yaml", "--set", change)
        assert refused.returncode == 2 and sentence in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    assert not list(simulated.glob("runs/experiment/tune/*/trial-*"))
