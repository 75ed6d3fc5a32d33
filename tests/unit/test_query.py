"""``sbi-dist query``, against a service whose draws are known."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sbi_dist.catalog.table import decode_counts, read_draws
from sbi_dist.cli import run_command
from sbi_dist.serving.client import file as answer_file
from sbi_dist.store import LocalStore
from tests.unit import scripted_service as script
from tests.unit.scripted_service import Service, expected

X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)


@pytest.fixture
def service(monkeypatch) -> Iterator[Service]:
    monkeypatch.delenv("SBI_DIST_TOKEN", raising=False)
    running = Service()
    running.limits["max_observations"] = 8
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command takes over signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def catalog(tmp_path) -> str:
    np.save(tmp_path / "catalog.npy", X)
    return str(tmp_path / "catalog.npy")


def test_draws_are_stored_like_a_part_of_a_catalog(service, catalog, tmp_path, capsys) -> None:
    output = tmp_path / "part-000000.parquet"
    ask = ["query", service.url, "--observations", catalog, "--num-samples", "7", "--seed", "3"]
    assert run_command([*ask, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}\n" and "query: 50 observations in" in err
    assert "model model1, calibrated" in err
    found = read_draws(LocalStore(tmp_path))
    np.testing.assert_array_equal(found.draws, expected("model1", X, 7, 3))
    assert found.ids == [str(number) for number in range(50)] and set(found.statuses) == {"ok"}
    assert np.isnan(found.effective_sample_sizes).all()
    names = "effective_sample_size log_evidence out_of_distribution out_of_distribution_p draws"
    assert list(found.columns) == names.split()
    assert decode_counts(output.read_bytes()) == {"ok": 50}
    notes = {
        key.decode(): json.loads(value) for key, value in pq.read_schema(output).metadata.items()
    }
    assert notes["catalog"].startswith("catalog-") and notes["model"] == "model1"
    assert notes["parameter_names"] == ["a", "b"]
    assert (notes["num_samples"], notes["seed"], notes["hdi"]) == (7, 3, 0.9)
    assert sorted(os.listdir(tmp_path)) == ["catalog.npy", "part-000000.parquet"]


def test_summaries_are_stored_too(service, catalog, tmp_path) -> None:
    output = tmp_path / "part-000000.parquet"
    ask = ["query", service.url, "--observations", catalog, "--num-samples", "40", "--summary"]
    assert run_command([*ask, "--output", str(output)]) == 0
    columns = read_draws(LocalStore(tmp_path)).columns
    draws = expected("model1", X, 40)
    np.testing.assert_allclose(columns["mean"], draws.mean(axis=1), rtol=1e-4, atol=1e-6)
    assert columns["quantiles"].shape == (50, 7, 2) and "draws" not in columns


def test_row_groups_are_bounded(service, catalog, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(answer_file, "_GROUP_BYTES", 4 * 2 * 7 * 10)
    output = tmp_path / "part-000000.parquet"
    ask = ["query", service.url, "--observations", catalog, "--num-samples", "7"]
    assert run_command([*ask, "--output", str(output)]) == 0
    assert pq.read_metadata(output).num_row_groups > 3
    np.testing.assert_array_equal(
        read_draws(LocalStore(tmp_path)).draws, expected("model1", X, 7, 0)
    )


def test_standard_output(service, catalog) -> None:
    code = "import sys; from sbi_dist.cli import main; main(sys.argv[1:])"
    ask = [sys.executable, "-c", code, "query", service.url, "--observations", catalog]
    done = subprocess.run([*ask, "--output", "-"], capture_output=True, check=True)
    table = pq.read_table(io.BytesIO(done.stdout))
    draws = table["draws"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(draws, expected("model1", X, 1000))


def test_the_first_observations_are_printed(service, catalog, capsys) -> None:
    assert run_command(["query", service.url, "--observations", catalog]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "the first 20 of 50 observations" in err
    assert "a (m)" in out and "50 %" in lines[0]
    draws = expected("model1", X[:20], 1000)
    shown = [line.split() for line in lines if " b " in f"{line} "]
    assert len(shown) == 20
    for line, mean in zip(shown, draws[:, :, 1].mean(axis=1), strict=True):
        assert float(line[line.index("b") + 1]) == pytest.approx(mean, abs=0.06)


def test_one_observation_on_the_command_line(service, capsys) -> None:
    assert run_command(["query", service.url, "--x", "1.0, 2,3", "--num-samples", "2000"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "a (m)" in line).split()
    draws = expected("model1", np.array([[1, 2, 3]]), 2000)[0, :, 0]
    assert float(line[4]) == pytest.approx(draws.mean(), abs=0.06)
    assert float(line[5]) == pytest.approx(draws.std(), abs=0.06)


def test_rows_that_are_no_observations(service, tmp_path, capsys) -> None:
    file = tmp_path / "catalog.csv"
    file.write_text("observation_id,a,b,c\n[red]star,1,2,3\n007,1,,3\nthird,1,nan,3\n")
    output = tmp_path / "part-000000.parquet"
    ask = ["query", service.url, "--observations", str(file)]
    assert run_command([*ask, "--output", str(output)]) == 0
    assert "2 observation(s) have no posterior: 1 nonfinite, 1 null" in capsys.readouterr().err
    found = read_draws(LocalStore(tmp_path))
    assert found.ids == ["[red]star", "007", "third"]
    assert found.statuses == ["ok", "null", "nonfinite"]
    assert np.isnan(found.draws[1:]).all() and np.isfinite(found.draws[0]).all()
    assert decode_counts(output.read_bytes()) == {"nonfinite": 1, "null": 1, "ok": 1}
    assert run_command(ask) == 0
    out = capsys.readouterr().out
    assert "[red]star" in out and "null" in out


WRONG = {
    "nothing to ask for": ([], "give --observations FILE, or --x"),
    "both": (["--observations", "CATALOG", "--x", "1,2,3"], "give --observations FILE, or --x"),
    "no file": (["--observations", "none.npy"], "none.npy"),
    "another shape": (["--x", "1,2"], r"--x holds 2 number(s)"),
    "no number": (["--x", "1,2,three"], "--x is '1,2,three'"),
    "not finite": (["--x", "1,2,nan"], "every number must be finite"),
    "another ending": (["--x", "1,2,3", "--output", "draws.csv"], "ends in .parquet"),
    "a bucket": (["--x", "1,2,3", "--output", "s3://a/b.parquet"], "must be a file here"),
    "no folder": (["--x", "1,2,3", "--output", "/none/a.parquet"], "/none is no folder"),
    "too many draws": (["--x", "1,2,3", "--num-samples", "9999999"], "at most 1,000,000"),
    "no time": (["--x", "1,2,3", "--timeout", "0"], "timeout_s is 0"),
    "no such model": (["--x", "1,2,3", "--model", "unknown model"], "there is no model"),
    "no such token": (["--x", "1,2,3", "--token-file", "none"], "none can't be read"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_bad_input(service, catalog, capsys, arguments, sentence) -> None:
    arguments = [catalog if each == "CATALOG" else each for each in arguments]
    assert run_command(["query", service.url, *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not service.asked


def test_an_address_that_is_none(capsys) -> None:
    assert run_command(["query", "localhost:8000", "--x", "1"]) == 2
    assert "it must be as in http://host:8000" in capsys.readouterr().err


def test_nothing_is_left_of_a_query_that_failed(service, catalog, tmp_path, capsys) -> None:
    output = tmp_path / "old.parquet"
    output.write_bytes(b"as it was")
    service.script += [None, None, script.refuses(500, "Broken", "a bug")]
    ask = ["query", service.url, "--observations", catalog, "--output", str(output)]
    assert run_command(ask) == 1
    assert "Broken: a bug" in capsys.readouterr().err
    assert output.read_bytes() == b"as it was"
    assert sorted(os.listdir(tmp_path)) == ["catalog.npy", "old.parquet"]


def test_one_file_is_of_one_model(service, catalog, tmp_path) -> None:
    service.script.append(script.promotes("model2", script.breaks(1)))
    output = tmp_path / "part-000000.parquet"
    ask = ["query", service.url, "--observations", catalog, "--num-samples", "7"]
    assert run_command([*ask, "--output", str(output)]) == 0
    np.testing.assert_array_equal(read_draws(LocalStore(tmp_path)).draws, expected("model1", X, 7))


def test_no_observation_has_a_posterior(service, tmp_path, capsys) -> None:
    def fails(handler: script.Handler, parts: list[bytes]) -> None:
        script.whole(handler, [part.replace(b"ok", b"no") for part in parts])

    service.script.append(fails)
    output = tmp_path / "none.parquet"
    assert run_command(["query", service.url, "--x", "1,2,3", "--output", str(output)]) == 1
    assert "none of 1 observation(s) has a posterior" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(service, catalog, tmp_path: Path, number, code) -> None:
    service.work_s = 0.3
    program = "import sys; from sbi_dist.cli import main; main(sys.argv[1:])"
    output = tmp_path / "draws.parquet"
    ask = ["query", service.url, "--observations", catalog, "--output", str(output)]
    process = subprocess.Popen([sys.executable, "-c", program, *ask], stderr=subprocess.PIPE)
    while not service.asked:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    assert os.listdir(tmp_path) == ["catalog.npy"]
