"""Dockerfiles, read: stages, instructions, variables, and which files of a context are seen."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Dockerfile", "Instruction", "Stage", "expand", "ignored", "pairs", "words"]

_KEYWORDS = frozenset(
    "FROM ARG ENV RUN COPY WORKDIR USER LABEL ENTRYPOINT CMD HEALTHCHECK EXPOSE VOLUME".split()
)
_FLAG = re.compile(r"--([a-z-]+)=(\S+)\s*")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its flags, and the rest as text or, in the JSON form, as a list."""

    line: int
    keyword: str
    flags: Mapping[str, str]
    text: str

    @property
    def listed(self) -> list[str] | None:
        """The arguments of the JSON form, ``["a", "b"]``; None in the shell form."""
        if not self.text.startswith("["):
            return None
        value = json.loads(self.text)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"line {self.line}: {self.text!r} must be a list of strings")
        return value

    def command(self) -> list[str]:
        """What is executed: of the shell form, by a shell."""
        return self.listed or ["/bin/sh", "-c", self.text]


@dataclass
class Stage:
    """What follows a FROM; its base is an image or another stage, with variables in it."""

    line: int
    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Dockerfile:
    """The ARGs before the first FROM, and the stages.

    Raises:
        ValueError: a line that is no instruction known here; with its number.
    """

    arguments: list[Instruction]
    stages: list[Stage]

    @classmethod
    def parse(cls, text: str) -> Dockerfile:
        arguments: list[Instruction] = []
        stages: list[Stage] = []
        for line, joined in _logical_lines(text):
            keyword, _, rest = joined.partition(" ")
            if keyword not in _KEYWORDS:
                raise ValueError(f"line {line}: {keyword!r} is not known here: {sorted(_KEYWORDS)}")
            flags, rest = _flags(rest.strip()) if keyword != "RUN" else ({}, rest.strip())
            if keyword == "RUN" and rest.startswith("--"):
                raise ValueError(f"line {line}: RUN with flags is not known here")
            if keyword == "FROM":
                base, _, name = rest.partition(" AS ")
                stages.append(Stage(line, base.strip(), name.strip() or str(len(stages))))
            elif stages:
                stages[-1].instructions.append(Instruction(line, keyword, flags, rest))
            elif keyword == "ARG":
                arguments.append(Instruction(line, keyword, flags, rest))
            else:
                raise ValueError(f"line {line}: {keyword} before the first FROM")
        if not stages:
            raise ValueError("no FROM")
        return cls(arguments, stages)

    def globals(self, given: Mapping[str, str]) -> dict[str, str]:
        """The variables that FROM may use, with the build arguments ``given``."""
        known: dict[str, str] = {}
        for instruction in self.arguments:
            name, _, default = instruction.text.partition("=")
            known[name] = given.get(name, expand(default, known))
        return known

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def needed(self, given: Mapping[str, str]) -> list[Stage]:
        """The stages that the last one is made of, in their order, as BuildKit chooses them."""
        known = self.globals(given)
        wanted, queue = set(), [self.stages[-1]]
        while queue:
            stage = queue.pop()
            wanted.add(stage.name)
            names = [expand(stage.base, known)]
            names += [each.flags["from"] for each in stage.instructions if "from" in each.flags]
            queue += [found for name in names if (found := self.stage(name))]
        return [stage for stage in self.stages if stage.name in wanted]


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """Instructions on one line each: comments dropped, also inside of continued lines."""
    found: list[tuple[int, str]] = []
    start, parts = 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        start = start if parts else number
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not line.rstrip().endswith("\\"):
            found.append((start, " ".join(parts)))
            parts = []
    if parts:
        raise ValueError(f"line {start}: the last line is continued")
    return found


def _flags(text: str) -> tuple[dict[str, str], str]:
    flags = {}
    while match := _FLAG.match(text):
        flags[match[1]] = match[2]
        text = text[match.end() :]
    return flags, text


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Put ``$NAME``, ``${NAME}``, ``${NAME:-default}`` and ``${NAME:+other}`` in; unknown is ''."""

    def value(match: re.Match[str]) -> str:
        found = variables.get(match["plain"] or match["braced"], "")
        if match["how"] == "-":
            return found or expand(match["other"], variables)
        if match["how"] == "+":
            return expand(match["other"], variables) if found else ""
        return found

    name = r"[A-Za-z_][A-Za-z0-9_]*"
    pattern = (
        rf"\$(?:(?P<plain>{name})|\{{(?P<braced>{name})(?::(?P<how>[-+])(?P<other>[^}}]*))?\}})"
    )
    return re.sub(pattern, value, text)


def words(text: str) -> list[str]:
    """Arguments separated by spaces, of COPY."""
    listed = json.loads(text) if text.startswith("[") else text.split()
    return [str(each) for each in listed]


def pairs(text: str) -> dict[str, str]:
    """``A=1 B="two words"``, of ENV and LABEL; quotes taken off."""
    found = {}
    rest = text.strip()
    while rest:
        match = re.match(r'([A-Za-z0-9_.-]+)=("[^"]*"|\S*)\s*', rest)
        if not match:
            raise ValueError(f"{rest!r} must be NAME=VALUE")
        found[match[1]] = match[2].strip('"')
        rest = rest[match.end() :]
    return found


def ignored(path: Path, patterns: list[str]) -> bool:
    """Whether a file (relative to the context) is left out by the lines of a .dockerignore.

    The last pattern that matches the path or a folder above it decides, as in Docker's matcher.
    """
    left_out = False
    for line in patterns:
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep = pattern.startswith("!")
        regex = _glob(pattern.removeprefix("!").strip("/"))
        if any(regex.fullmatch(str(each)) for each in (path, *path.parents) if str(each) != "."):
            left_out = not keep
    return left_out


def _glob(pattern: str) -> re.Pattern[str]:
    regex = ""
    for part in re.findall(r"\*\*/?|\*|\?|\[[^]]*\]|[^*?[]+", pattern):
        if part.startswith("**"):
            regex += "(?:.*/)?" if part.endswith("/") else ".*"
        elif part == "*":
            regex += "[^/]*"
        elif part == "?":
            regex += "[^/]"
        else:
            regex += part if part.startswith("[") else re.escape(part)
    return re.compile(regex)
