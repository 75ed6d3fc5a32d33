"""The README's own example, run as it is written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sbi_dist.experiment import shipped
from sbi_dist.problems.reference import PROBLEMS
from tests.ray.conftest import ROOT, Run
from tests.ray.test_pipeline import said

README = (ROOT / "README.md").read_text()


def _block(name: str) -> str:
    """The fenced block whose first line is the comment ``# name``."""
    found = re.search(rf"```\w+\n(# {re.escape(name)}\n.*?)```", README, re.DOTALL)
    assert found, f"README has no block {name}"
    return found.group(1)


def test_own_simulator(program: Run, tmp_path: Path) -> None:
    for name in ("decay.py", "decay.yaml"):
        (tmp_path / name).write_text(_block(name))
    commands = re.findall(r"^sbi-dist (.*decay\.yaml.*)$", README, re.MULTILINE)
    commands = [each for each in commands if "s3://" not in each]
    assert len(commands) == 2
    np.savetxt(
        tmp_path / "catalog.csv",
        np.random.default_rng(0).uniform(0, 2, (5, 20)),
        delimiter=",",
        header=",".join(f"x{i}" for i in range(20)),
        comments="",
    )
    for command in commands:
        said(program(*shlex.split(command)), 0)
    table = pq.read_table(
        next(tmp_path.glob("runs/decay/posteriors/observed-*/part-000000.parquet"))
    )
    draws = table["draws"].combine_chunks().to_numpy_ndarray()[0]
    # The data were made with rate 0.7 and amplitude 2.
    assert (np.abs(draws.mean(0) - [0.7, 2.0]) < 3 * draws.std(0)).all()
    assert (draws.std(0) < [0.2, 0.2]).all()
    catalog = pq.read_table(tmp_path / "draws" / "part-000000.parquet")
    assert catalog["draws"].combine_chunks().to_numpy_ndarray().shape == (5, 1000, 2)


def test_program(sbi_dist: Run, tmp_path: Path) -> None:
    (tmp_path / "decay_program.py").write_text(_block("decay_program.py"))
    decay = tmp_path / "decay"
    decay.write_text(
        "#!/usr/bin/awk -f\nBEGIN {srand(ARGV[3]); for (t = 0; t <= 5; t += 0.5) "
        "print ARGV[2] * exp(-ARGV[1] * t) + rand()}\n"
    )
    decay.chmod(0o755)
    (tmp_path / "program.yaml").write_text(
        "problem: decay_program.py:problem\nsimulate: {num_simulations: 40}\n"
    )
    said(sbi_dist("simulate", "program.yaml"), 0)
    said(sbi_dist("verify", "program.yaml", "--rows", "10"), 0)


def test_experiments_and_files_that_the_readme_names_exist() -> None:
    assert set(shipped()) == {"coalescent", "gaussian", "lynx_hare", *PROBLEMS}
    for name in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / name).is_file()
    for stage in (
        "run",
        "simulate",
        "verify",
        "train",
        "tune",
        "calibrate",
        "infer",
        "report",
        "status",
    ):
        assert f"`sbi-dist {stage} EXPERIMENT`" in README
        assert (ROOT / "jobs" / f"{stage}.py").is_file()
