"""The problems of the SBI benchmark, and reference draws from their posteriors.

Lueckmann et al. (2021, arXiv:2101.04653) give ten observations of each task, and 10,000 draws from
the posterior of each. They come in the wheel of ``sbibm``, which is read here as data and is never
imported, as that would need Pyro and Julia.

    reference = load_reference("two_moons", 1)
    reference.draws  # (10000, 2)
"""

from __future__ import annotations

import bz2
import dataclasses
import io
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from sbi_dist.errors import InputError
from sbi_dist.options import nearest
from sbi_dist.problem import Problem, load_problem

__all__ = [
    "DRAWS",
    "INSTALL",
    "OBSERVATIONS",
    "PROBLEMS",
    "Reference",
    "load_reference",
    "parse_table",
    "reference_problem",
]

# Of sbi_dist.problems, each a module with a ``problem``.
PROBLEMS = (
    "bernoulli_glm",
    "gaussian_linear",
    "gaussian_linear_uniform",
    "gaussian_mixture",
    "lotka_volterra",
    "sir",
    "slcp",
    "slcp_distractors",
    "two_moons",
)
OBSERVATIONS = range(1, 11)
DRAWS = 10_000

INSTALL = "pip install --no-deps sbibm==1.1.0"

# Distractors do not change the posterior: its draws are those of slcp, and in the same folder.
_FOLDERS = {"slcp_distractors": "slcp"}
_OBSERVATION_FILES = {"slcp_distractors": "observation_distractors.csv"}
_DRAWS_FILE = "reference_posterior_samples.csv.bz2"

# The largest of the files, 10,000 rows of ten numbers, has 1 MB.
_LARGEST = 8 * 1024**2


@dataclasses.dataclass(frozen=True)
class Reference:
    """One observation of a task, and draws from its posterior.

    Attributes:
        task: one of ``PROBLEMS``.
        number: of the observation, 1 to 10.
        observation: x, float64 of the problem's x_shape.
        true_parameters: the theta that x was simulated with, float64 of shape (D,).
        draws: from p(theta | x), float64 of shape (10000, D).
    """

    task: str
    number: int
    observation: np.ndarray
    true_parameters: np.ndarray
    draws: np.ndarray


def reference_problem(task: str) -> Problem:
    """The problem of a task of the benchmark, with the benchmark's first observation.

    Raises:
        InputError: there is no such task.
    """
    if task not in PROBLEMS:
        near = nearest(task, PROBLEMS)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise InputError(f"reference.task is {task!r}{hint}; it must be one of {_listed(PROBLEMS)}")
    return load_problem(f"sbi_dist.problems.{task}:problem")


def load_reference(task: str, number: int, source: str | Path | None = None) -> Reference:
    """One observation of a task, with its true parameters and reference draws.

    Args:
        task: one of ``PROBLEMS``.
        number: of the observation, 1 to 10.
        source: the wheel of sbibm, or a folder into which it was installed or unpacked. Default:
            the sbibm that is installed here.

    Raises:
        InputError: no such task, number or source, or a file there that is not as expected.
    """
    problem = reference_problem(task)
    if isinstance(number, bool) or not isinstance(number, int) or number not in OBSERVATIONS:
        raise InputError(
            f"reference.observation is {number!r}; it must be an integer from "
            f"{OBSERVATIONS[0]} to {OBSERVATIONS[-1]}"
        )
    assert problem.observed is not None
    folder = f"tasks/{_FOLDERS.get(task, task)}/files/num_observation_{number}"
    files = _Files(source)

    def table(name: str, rows: int, columns: int) -> np.ndarray:
        path = f"{folder}/{name}"
        return parse_table(files.read(path), rows, columns, files.named(path))

    size = problem.num_parameters
    observation_file = _OBSERVATION_FILES.get(task, "observation.csv")
    return Reference(
        task=task,
        number=number,
        observation=table(observation_file, 1, problem.observed.size).reshape(
            problem.observed.shape
        ),
        true_parameters=table("true_parameters.csv", 1, size)[0],
        draws=table(_DRAWS_FILE, DRAWS, size),
    )


def parse_table(content: bytes, rows: int, columns: int, named: str) -> np.ndarray:
    """The numbers under a line of names, as comma-separated values; float64 (rows, columns).

    Args:
        content: of the file; compressed by bzip2 where its name ends so.
        rows, columns: how many there must be.
        named: the file, for errors.

    Raises:
        InputError: it can't be unpacked, or holds anything but ``rows`` times ``columns`` finite
            numbers below one line.
    """
    names = [str(column) for column in range(columns)]
    try:
        text = _unpacked(content) if named.endswith(".bz2") else content
        table = csv.read_csv(
            io.BytesIO(text),
            csv.ReadOptions(use_threads=False, column_names=names, skip_rows=1),
            csv.ParseOptions(quote_char=False),
            csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.float64()),
                null_values=[],
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, OSError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"reference.source: {named} can't be read ({reason:.200}); it must be a table of "
            f"{columns} column{'s' * (columns > 1)} of numbers. Give the wheel of sbibm 1.1.0 as "
            f"it was published, or {INSTALL}"
        ) from error
    numbers = np.stack([np.asarray(column) for column in table.columns], axis=-1)
    bad = int((~np.isfinite(numbers)).sum())
    if len(numbers) != rows or bad:
        raise InputError(
            f"reference.source: {named} has {len(numbers):,} rows of numbers, {bad:,} of which are "
            f"NaN or infinite; it must have {rows:,}, of finite numbers. Give the wheel of sbibm "
            f"1.1.0 as it was published, or {INSTALL}"
        )
    return numbers


def _unpacked(content: bytes) -> bytes:
    unpacker = bz2.BZ2Decompressor()
    text = unpacker.decompress(content, max_length=_LARGEST)
    if not unpacker.eof:
        raise ValueError(f"it is cut short, or larger than {_LARGEST:,} bytes")
    return text


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)


class _Files:
    """The files below the folder ``sbibm``, in a wheel, a folder or what is installed here."""

    def __init__(self, source: str | Path | None) -> None:
        if source is None:
            self.place = self._installed()
        else:
            self.place = Path(source).expanduser()
        if self.place.is_dir():
            # Also the folder of the package itself.
            inner = self.place / "sbibm"
            self.place = inner if inner.is_dir() else self.place
        elif not zipfile.is_zipfile(self.place):
            there = "no wheel" if self.place.exists() else "not there"
            raise InputError(
                f"reference.source is {str(self.place)!r}, which is {there}; give the wheel of "
                f"sbibm 1.1.0 or a folder that it was installed into, or leave it out and {INSTALL}"
            )

    @staticmethod
    def _installed() -> Path:
        try:
            return Path(str(metadata.distribution("sbibm").locate_file("sbibm")))
        except metadata.PackageNotFoundError:
            raise InputError(
                "reference.source is not given and sbibm is not installed here; give the path of "
                f"its wheel, or {INSTALL}"
            ) from None

    def named(self, path: str) -> str:
        return f"{self.place}/{path}"

    def read(self, path: str) -> bytes:
        try:
            if self.place.is_dir():
                with (self.place / path).open("rb") as file:
                    content = file.read(_LARGEST + 1)
            else:
                with zipfile.ZipFile(self.place) as wheel, wheel.open(f"sbibm/{path}") as file:
                    content = file.read(_LARGEST + 1)
        except (KeyError, FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"reference.source is {str(self.place)!r}, which has no {path}; give the wheel of "
                f"sbibm 1.1.0 or a folder that it was installed into, or leave it out and {INSTALL}"
            ) from None
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as error:
            raise InputError(
                f"reference.source: {self.named(path)} can't be read ({error}); give the wheel of "
                f"sbibm 1.1.0 as it was published, or {INSTALL}"
            ) from error
        if len(content) > _LARGEST:
            raise InputError(
                f"reference.source: {self.named(path)} is larger than {_LARGEST:,} bytes, which no "
                f"file of sbibm is; give its wheel as it was published, or {INSTALL}"
            )
        return content
