"""From the command line to posteriors: stages, exit codes and what a killed stage leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from sbi_dist import Posterior
from sbi_dist.simulation.dataset import Dataset
from sbi_dist.store import LocalStore
from tests.ray.conftest import SLOW, Run, command, environment, write_experiment

FAST = SLOW.replace("time.sleep(0.004)", "pass")


def said(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The command's last line on standard error, once its exit code is as expected."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""


@pytest.fixture(scope="module")
def finished(
    ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which an experiment was run to its end, and what that said."""
    folder = tmp_path_factory.mktemp("finished")
    write_experiment(folder, FAST)
    result = subprocess.run(
        command("run", "experiment.yaml"),
        cwd=folder,
        env=environment(ray_address),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return folder, result


def test_run_then_each_stage_finds_its_work_done(
    finished: tuple[Path, subprocess.CompletedProcess[str]], sbi_dist: Run, tmp_path: Path
) -> None:
    folder, first = finished
    said(first, 0)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert "report/index.html" in first.stdout and "posterior draws:" in first.stdout
    root = tmp_path / "runs/experiment"
    page = (root / "report/index.html").read_text()
    assert "<html" in page and "data:image/png;base64" in page
    part = next(root.glob("posteriors/observed-*/part-000000.parquet"))
    table = pq.read_table(part)
    assert table.column_names == [
        "observation_id", "status", "effective_sample_size", "log_evidence",
        "out_of_distribution", "out_of_distribution_p", "draws",
    ]  # fmt: skip
    draws = table["draws"].combine_chunks().to_numpy_ndarray()
    assert draws.shape == (1, 500, 2) and np.isfinite(draws).all()
    assert (draws >= [-1, 0]).all() and (draws <= [1, 2]).all()

    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
    kept |= {path: path.stat().st_mtime_ns for path in root.rglob("weights.safetensors")}
    for stage in ("simulate", "train", "infer", "report"):
        said(sbi_dist(stage, "experiment.yaml"), 0)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    status = sbi_dist("status", "experiment.yaml")
    said(status, 0)
    content = yaml.safe_load(status.stdout)
    assert content["simulations"] == 400 and content["trained"]
    assert content["experiment"]["train"]["hidden_features"] == 16

    # The folder alone is enough: of the experiment, or of the model.
    posterior = Posterior.load(str(root))
    again = posterior.sample((500,), [0.1, 1.0], seed=0).numpy()
    assert np.allclose(again, draws[0], atol=1e-5)
    assert posterior.parameter_names == ["a", "b"]

    # What changes no outcome changes no name: nothing is simulated or trained again.
    result = sbi_dist("train", "experiment.yaml", "--set", "simulate.actors=1")
    said(result, 0)
    assert len(list(root.glob("models/*/bundle.json"))) == 1


def test_infer_reads_files_and_gives_bad_rows_a_status(
    finished: tuple[Path, subprocess.CompletedProcess[str]], sbi_dist: Run, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    rows = np.array([[0.1, 1.0], [np.nan, 0.0], [0.5, 0.5]])
    np.save(tmp_path / "rows.npy", rows)
    lines = ["observation_id,first,second", "x1,0.1,1.0", "x2,,0.0", "x3,0.5,0.5"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    found = {}
    for name in ("rows.npy", "rows.csv"):
        result = sbi_dist(
            "infer", "experiment.yaml", "--observations", name, "--num-samples", "50",
            "--output", f"out-{name}",
        )  # fmt: skip
        said(result, 0)
        found[name] = pq.read_table(tmp_path / f"out-{name}" / "part-000000.parquet")
    assert found["rows.npy"]["status"].to_pylist() == ["ok", "nonfinite", "ok"]
    assert found["rows.csv"]["observation_id"].to_pylist() == ["x1", "x2", "x3"]
    npy, csv = (
        found[name]["draws"].combine_chunks().to_numpy_ndarray()
        for name in ("rows.npy", "rows.csv")
    )
    assert np.isnan(npy[1]).all() and np.isfinite(npy[[0, 2]]).all()
    assert np.array_equal(npy, csv, equal_nan=True)


def test_summaries_of_a_catalog(
    finished: tuple[Path, subprocess.CompletedProcess[str]], sbi_dist: Run, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    np.save(tmp_path / "rows.npy", [[0.1, 1.0], [np.nan, 0.0]])
    chosen = ["--set", "infer.output=summary", "--set", "infer.observations=rows.npy"]
    result = sbi_dist("infer", "experiment.yaml", *chosen)
    said(result, 0)
    assert (
        "summaries of 500 draws for each of 2 observation(s) (1 nonfinite, 1 ok)" in result.stderr
    )
    table = pq.read_table(f"{result.stdout.strip()}/part-000000.parquet")
    assert "draws" not in table.column_names
    mean = table["mean"].combine_chunks().to_numpy_ndarray()
    draws = Posterior.load(str(tmp_path / "runs/experiment")).sample((500,), [0.1, 1.0], seed=0)
    assert np.allclose(mean[0], draws.mean(0), atol=1e-5) and np.isnan(mean[1]).all()
    # There is nothing to draw, but all else of the report.
    result = sbi_dist("report", "experiment.yaml", *chosen)
    said(result, 0)
    page = (tmp_path / "runs/experiment/report/index.html").read_text()
    assert "The posteriors of 2 observations are kept as summaries in" in page
    # The problem's own data keep their draws.
    result = sbi_dist("infer", "experiment.yaml", "--set", "infer.output=summary")
    said(result, 0)
    names = pq.read_table(f"{result.stdout.strip()}/part-000000.parquet").column_names
    assert "draws" in names and "mean" in names


def test_run_without_observed_data_ends_with_a_model(sbi_dist: Run, tmp_path: Path) -> None:
    source = FAST.replace("observed=[0.1, 1.0]", "")
    write_experiment(tmp_path, source, num_simulations=60, actors=1)
    result = sbi_dist("run", "experiment.yaml")
    said(result, 0)
    assert "no observed data" in result.stdout and "--observations FILE" in result.stdout
    posterior = Posterior.load(str(tmp_path / "runs/experiment"))
    assert posterior.sample((3,), [0.1, 1.0]).shape == (3, 2)


def test_catalog_of_many_parts_equals_one_batch(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sbi_dist.catalog import plan
    from sbi_dist.catalog.infer import infer
    from sbi_dist.catalog.options import InferOptions
    from sbi_dist.catalog.source import ArraySource
    from sbi_dist.catalog.table import read_draws
    from sbi_dist.estimation.bundle import save_bundle
    from sbi_dist.npe import NPE
    from sbi_dist.priors import BoxUniform
    from sbi_dist.store import LocalStore

    prior = BoxUniform([-1.0, 0.0], [1.0, 2.0])
    rng = np.random.default_rng(0)
    theta = rng.uniform([-1, 0], [1, 2], (300, 2)).astype(np.float32)
    x = theta + 0.1 * rng.standard_normal((300, 2)).astype(np.float32)
    npe = NPE(prior, transforms=2, hidden_features=16, max_epochs=2, show_progress_bars=False)
    estimator = npe.append_simulations(theta, x).train(seed=0)
    model = LocalStore(tmp_path / "model")
    save_bundle(model, estimator, {"parameter_names": ["a", "b"], "prior": {"kind": "opaque"}})
    posterior = Posterior.from_store(model)
    catalog = ArraySource.of("many", x)
    monkeypatch.setattr(plan, "_PART_BYTES", 100 * 1000 * 2 * 4)
    options = InferOptions(num_samples=1000, seed=3)
    target = LocalStore(tmp_path / "draws")
    manifest = infer(posterior, model, catalog, options, target, show_progress=False)
    assert manifest["rows_per_part"] == 100 and len(list(target.list("part-"))) == 3
    read = read_draws(target)
    assert read.ids == [str(i) for i in range(300)]
    some = [0, 150, 299]
    expected = posterior.sample_batched((1000,), x[some], seed=3).transpose(0, 1).numpy()
    assert np.allclose(read.draws[some], expected, atol=1e-5)


BAD_PROBLEMS = {
    "unpacks two of three": (
        "def simulator(theta):\n    a, b = theta\n    return np.array([a, b])",
        "BoxUniform([0.0] * 3, [1.0] * 3)",
        "",
        "which has 3 parameters",
    ),
    "text": (
        "def simulator(theta):\n    return np.array(['a', 'b'])",
        "BoxUniform([0.0], [1.0])",
        "",
        "expected real numbers",
    ),
    "NaN observation": (
        "def simulator(theta):\n    return theta",
        "BoxUniform([0.0] * 2, [1.0] * 2)",
        "observed=[0.1, float('nan')]",
        "problem.observed holds 1 value(s) that are NaN",
    ),
    "observation of another shape": (
        "def simulator(theta):\n    return theta",
        "BoxUniform([0.0] * 2, [1.0] * 2)",
        "observed=[0.1, 0.2, 0.3]",
        "problem.observed has shape (3,), but the simulator gives x of shape (2,)",
    ),
    "prior upside down": (
        "def simulator(theta):\n    return theta",
        "BoxUniform([1.0] * 2, [0.0] * 2)",
        "",
        "must be below high",
    ),
    "syntax": ("def simulator(theta:\n", "None", "", "fails on import"),
}


@pytest.mark.parametrize("name", BAD_PROBLEMS)
def test_bad_problem_is_one_sentence(sbi_dist: Run, tmp_path: Path, name: str) -> None:
    simulator, prior, more, sentence = BAD_PROBLEMS[name]
    source = (
        "import numpy as np\nfrom sbi_dist import BoxUniform, Problem\n\n"
        f"{simulator}\n\nproblem = Problem({prior}, simulator, {more})\n"
    )
    write_experiment(tmp_path, source)
    result = sbi_dist("simulate", "experiment.yaml")
    assert sentence in said(result, 2)
    assert len(result.stderr.strip().splitlines()) == 1


BAD_ARGUMENTS = {
    "unknown experiment": (["simulate", "gausian"], "did you mean 'gaussian'?"),
    "unknown key": (
        ["simulate", "gaussian", "--set", "simulate.num_simulation=5"],
        "did you mean 'simulate.num_simulations'?",
    ),
    "wrong type": (
        ["simulate", "gaussian", "--set", "simulate.num_simulations=many"],
        "simulate.num_simulations is 'many'",
    ),
    "too many CPUs": (
        ["simulate", "gaussian", "--set", "simulate.actors=1000"],
        "asks for 1000 x 1 = 1000 CPUs",
    ),
    "too many GPUs": (
        ["simulate", "gaussian", "--set", "simulate.gpus_per_actor=64"],
        "GPUs, and the Ray cluster has",
    ),
    "empty store at train": (["train", "gaussian"], "run `sbi-dist simulate` first"),
    "nothing to infer with": (["infer", "gaussian"], "`sbi-dist train` first"),
    "unknown command": (["simulte", "gaussian"], "No such command"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_one_sentence(sbi_dist: Run, name: str) -> None:
    arguments, sentence = BAD_ARGUMENTS[name]
    result = sbi_dist(*arguments)
    assert result.returncode == 2 and sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_no_such_cluster(program: Run) -> None:
    result = program("simulate", "gaussian", "--address", "127.0.0.1:1")
    assert "no Ray cluster can be reached" in said(result, 2)


def test_bad_observations_are_one_sentence(
    finished: tuple[Path, subprocess.CompletedProcess[str]], sbi_dist: Run, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan))
    np.save(tmp_path / "wide.npy", np.zeros((2, 5)))
    (tmp_path / "text.csv").write_text("a,b\nx,y\n")
    expected = {
        "nan.npy": "none of its 2 observation(s) is usable",
        "wide.npy": "has shape (5,), the model takes (2,)",
        "text.csv": "not numeric",
        "none.npy": "can't be read",
        "problem.py": "must end in .parquet, .csv or .npy",
    }
    for name, sentence in expected.items():
        assert sentence in said(sbi_dist("infer", "experiment.yaml", "--observations", name), 2)


def test_damaged_shard_is_told_at_train(sbi_dist: Run, tmp_path: Path) -> None:
    write_experiment(tmp_path, FAST, actors=1)
    said(sbi_dist("simulate", "experiment.yaml"), 0)
    shard = next(tmp_path.glob("runs/experiment/simulations/*/shard-000002.parquet"))
    data = bytearray(shard.read_bytes())
    table = pq.read_table(shard)
    x = table["x"].combine_chunks().to_numpy_ndarray()
    data[data.find(x.tobytes())] ^= 4
    good = shard.read_bytes()
    shard.write_bytes(bytes(data))
    assert "shard-000002.parquet is damaged" in said(sbi_dist("train", "experiment.yaml"), 2)
    said(sbi_dist("simulate", "experiment.yaml", "--repair"), 0)
    repaired = pq.read_table(shard)["x"].combine_chunks().to_numpy_ndarray()
    assert repaired.tobytes() == x.tobytes() and len(shard.read_bytes()) > 0.9 * len(good)
    said(sbi_dist("train", "experiment.yaml"), 0)


def test_overlap_ends_with_a_model_of_all_simulations(sbi_dist: Run, tmp_path: Path) -> None:
    slow = SLOW.replace("0.004", "0.012")
    write_experiment(tmp_path, slow, num_simulations=700, shard_size=20, actors=1)
    result = sbi_dist("run", "experiment.yaml", "--overlap")
    said(result, 0)
    assert result.stderr.count("train: begins on the first") >= 1
    # What led to the final model is gone; that it did is noted.
    models = tmp_path / "runs/experiment/models"
    bundles = [json.loads(path.read_text()) for path in models.glob("*/bundle.json")]
    assert len(bundles) == 1
    assert bundles[0]["started_from"] != bundles[0]["model"]
    assert sum(rows for _, rows in _rows_of(bundles[0], tmp_path)) == 700
    assert not list(tmp_path.rglob("overlap.json")) and not list(models.glob("*/stop"))
    # The same model by its name as without overlap: nothing is left to do.
    again = sbi_dist("run", "experiment.yaml")
    said(again, 0)
    assert "epoch" not in again.stderr


def _rows_of(bundle: dict[str, Any], folder: Path) -> list[tuple[int, int]]:
    """Index and rows of the shards that a model was trained on."""
    (place,) = folder.glob("runs/experiment/simulations/*")
    records = Dataset(LocalStore(place)).stored().records
    shards = bundle["dataset"]["shards"]
    assert all(records[index].digest == digest for index, digest in shards)
    return [(index, records[index].rows) for index, _ in shards]
