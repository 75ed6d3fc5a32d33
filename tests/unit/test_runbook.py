"""The commands of the runbook are ones that there are, and so are its files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from sbi_dist.cli import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/runbook.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S)).replace("\\\n", " ").splitlines()
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
COMMANDS = sorted({each for each in [*BLOCKS, *SPANS] if re.match(r"sbi-dist \w", each)})


def unknown(line: str) -> list[str]:
    """Words of a command line that its command does not know."""
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        found = command.commands.get(words[0])
        if found is None:
            return words[:1]
        command, words = found, words[1:]
    known = {name for option in command.params for name in option.opts}
    # `submit` hands the options of the stage on.
    if command.name == "submit":
        known |= {name for each in cli.commands.values() for o in each.params for name in o.opts}
    return [word for word in words if word.startswith("--") and word not in known]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_are_known(line: str) -> None:
    assert unknown(line) == []


def test_mistakes_would_be_seen() -> None:
    assert len(COMMANDS) > 20
    assert unknown("sbi-dist simulat EXPERIMENT") == ["simulat"]
    assert unknown("sbi-dist simulate EXPERIMENT --repairs") == ["--repairs"]
    assert unknown("sbi-dist jobs stop JOB --adress URL") == ["--adress"]


def test_fields_are_known() -> None:
    from sbi_dist.experiment import load_experiment

    experiment = load_experiment("gaussian")[0]
    for section, field in set(
        re.findall(r"\b(simulate|train|tune|calibrate|infer|serve)\.([a-z]\w+)", TEXT)
    ):
        assert hasattr(getattr(experiment, section), field), f"{section}.{field}"


def test_files_are_there() -> None:
    for path in set(re.findall(r"\b(?:k8s|cluster)/[\w./-]+\b", TEXT)):
        assert (ROOT / path).exists(), path
