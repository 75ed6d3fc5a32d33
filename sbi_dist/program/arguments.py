"""The parts of ``Program``'s arguments: words and placeholders of its command, names, files.

Each is checked here by itself; what they must be together is in ``program.py``, and what belongs
to a format is in ``formats.py``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sbi_dist.errors import InputError

__all__ = [
    "RESERVED",
    "checked_names",
    "command_words",
    "filled",
    "identity_of",
    "of_the_system",
    "path_inside",
    "placeholders",
    "read_files",
]

RESERVED = ("seed", "input", "output", "scratch", "rows")  # placeholders of their own
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def command_words(command: Any) -> tuple[str, ...]:
    words = command
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError:
            words = ()
    kinds = (str, os.PathLike)
    if not isinstance(words, Sequence) or not words or not all(isinstance(w, kinds) for w in words):
        raise InputError(
            f"program.command is {command!r}; it must be a list of strings, the program first, or "
            "one string, its quotes closed"
        )
    return tuple(map(os.fspath, words))


def checked_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    names = [names] if isinstance(names, str) else list(names)
    if (
        not names
        or not all(isinstance(name, str) and re.fullmatch(r"[^{}\n]+", name) for name in names)
        or len({*names, *RESERVED}) < len(names) + len(RESERVED)
    ):
        raise InputError(
            f"program.parameter_names is {names!r}; it must be a list of different strings "
            f"without braces, none of them {', '.join(RESERVED)}"
        )
    return tuple(names)


def path_inside(field: str, path: str | os.PathLike[str]) -> str:
    """``path`` in its shortest form, which must lead to a file below the scratch directory."""
    short = PurePosixPath(path)
    if not short.parts or short.is_absolute() or ".." in short.parts:
        raise InputError(
            f"program.{field} is {str(path)!r}; it must be a path relative to the scratch "
            "directory, without .."
        )
    return str(short)


def read_files(files: Any, folder: Path) -> list[tuple[str, bytes, bool]]:
    """Of each file its path in a scratch directory, its content, and whether it is executable."""
    found = []
    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        given = Path(file).expanduser()
        path = folder / given
        name = given.name if given.is_absolute() else path_inside("files", given)
        try:
            found.append((name, path.read_bytes(), os.access(path, os.X_OK)))
        except OSError as error:
            raise InputError(
                f"program.files: {path} can't be read ({error.strerror}); each must be a file, "
                "its path relative to base (default: the current directory) or absolute"
            ) from None
    return found


def placeholders(word: str) -> list[str]:
    """Names of the placeholders in ``word``; a brace without its pair is an error."""
    matches = list(_BRACES.finditer(word))
    for match in matches:
        if match[0] in ("{", "}"):
            raise InputError(
                f"program.command has a single {match[0]!r} in {word!r}; a brace itself is "
                f"written {match[0] * 2!r}"
            )
    return [match[1] for match in matches if match[1] is not None]


def filled(word: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] is not None and match[1] not in values:
            raise ValueError(
                f"program.command has the placeholder {match[0]}, but theta has fewer parameters"
            )
        return match[0][0] if match[1] is None else values[match[1]]

    return _BRACES.sub(value, word)


def identity_of(word: str) -> Any:
    """``word``, or name and digest of the file whose absolute path it is."""
    if not os.path.isabs(word) or not os.path.isfile(word):
        return word
    with open(word, "rb") as file:
        return [PurePosixPath(word).name, hashlib.file_digest(file, "sha256").hexdigest()]


def of_the_system(path: str) -> bool:
    folders = [Path(name) for name in ("/usr", "/bin", "/sbin", sys.prefix, sys.base_prefix)]
    places = [Path(path).absolute(), Path(path).resolve()]
    return any(folder in place.parents for folder in folders for place in places)
