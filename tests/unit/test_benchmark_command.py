"""What ``sbi-dist benchmark`` refuses before it starts anything, and with which sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbi_dist.cli import run_command


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("two_moon",), "TASK is 'two_moon' (did you mean 'two_moons'?)"),
        (("two_moons", "--sizes", "1e3"), "--sizes is '1e3'; it must be whole numbers"),
        (("two_moons", "--observations", "11"), "--observations is 11; it must be from 1 to 10"),
        (("two_moons", "--num-draws", "10"), "--num-draws is 10; it must be from 100"),
        (("two_moons", "--set", "problem=a:b"), "choose with TASK and --sizes"),
        (("two_moons", "--set", "simulate.rounds=2"), "the benchmark sets name, problem, "),
        (("two_moons", "--set", "train.bins=1"), "bins is 1; it must be at least 2"),
    ],
)
def test_what_it_refuses(
    given: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["benchmark", *given]) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
