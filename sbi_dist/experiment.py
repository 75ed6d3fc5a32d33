"""The experiment file: YAML, typed and checked, with overrides from the command line."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import yaml

from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.catalog.options import InferOptions
from sbi_dist.errors import InputError
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.options import Options, nearest, option
from sbi_dist.serving.options import ServeOptions
from sbi_dist.simulation.options import SimulateOptions
from sbi_dist.tuning.options import TuneOptions

__all__ = ["Experiment", "digest", "load_experiment", "shipped"]


@dataclasses.dataclass(frozen=True)
class Experiment(Options):
    """One experiment: a problem, a store, and a section for each stage."""

    name: str = option("", "name of the experiment; its folder in the store")
    problem: str = option("", "the problem, as package.module:attribute or file.py:attribute")
    store: str = option("runs", "directory, or s3://bucket/prefix, that holds everything durable")
    store_patience_s: float = option(
        600.0, "how long to wait for a store that does not answer, in seconds", gt=0, le=1e7
    )
    simulate: SimulateOptions = dataclasses.field(default_factory=SimulateOptions)
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)
    tune: TuneOptions = dataclasses.field(default_factory=TuneOptions)
    calibrate: CalibrateOptions = dataclasses.field(default_factory=CalibrateOptions)
    infer: InferOptions = dataclasses.field(default_factory=InferOptions)
    serve: ServeOptions = dataclasses.field(default_factory=ServeOptions)

    # Folder that relative problem files are looked up in; not part of the file.
    base: ClassVar[Path] = Path()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise InputError(
                f"name is {self.name!r}; it must be 1 to 100 letters, digits, '.', '_' or '-'"
            )
        if not self.problem:
            raise InputError(
                "problem is missing; give 'package.module:attribute' or 'path/to/file.py:attribute'"
            )

    def resolved(self) -> dict[str, Any]:
        """All fields with their values, defaults included."""
        return dataclasses.asdict(self)


def digest(content: Any, length: int = 12) -> str:
    """Hex digits that identify JSON-ready content."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _shipped_folder() -> Path:
    """Installed beside the package, or in the checkout that the package is run from."""
    package = Path(__file__).parent
    for folder in (package / "experiments", package.parent / "jobs" / "experiments"):
        if folder.is_dir():
            return folder
    return package


def shipped() -> dict[str, Path]:
    """The experiments that come with the package, by name."""
    return {path.stem: path for path in sorted(_shipped_folder().glob("*.yaml"))}


def load_experiment(reference: str, overrides: list[str] | None = None) -> tuple[Experiment, Path]:
    """The experiment in a file, or a shipped one by its name; and the folder of its file.

    ``overrides`` are ``key.path=value`` with values as in YAML.

    Raises:
        InputError: names the field, the value and what is allowed.
    """
    path = Path(reference).expanduser()
    known = shipped()
    if reference in known and not path.is_file():
        path = known[reference]
    if not path.is_file():
        near = nearest(reference, known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise InputError(
            f"experiment {reference!r} is neither a file nor a shipped experiment{hint}; shipped "
            f"are {', '.join(known)}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        reason = getattr(error, "problem", None) or "not text"
        raise InputError(f"{path}{line} is no valid YAML ({reason})") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; it must be a mapping of fields")
    content = copy.deepcopy(content)
    content.setdefault("name", path.stem)
    for override in overrides or []:
        _override(content, override)
    return _checked(content), path.resolve().parent


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {override!r} must be key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is no valid YAML") from error
    *parents, last = key.strip().split(".")
    place = content
    for parent in parents:
        inner = place.setdefault(parent, {})
        if inner is None:
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise InputError(f"--set {override!r}: {parent} is no section")
        place = inner
    place[last] = value


def _checked(content: dict[str, Any]) -> Experiment:
    sections = {
        field.name: field.type
        for field in dataclasses.fields(Experiment)
        if field.default_factory is not dataclasses.MISSING
    }
    # A section without fields is None in YAML.
    content = {k: ({} if k in sections and v is None else v) for k, v in content.items()}
    try:
        return _ADAPTER.validate_python(content)
    except pydantic.ValidationError as error:
        raise InputError(_explain(error.errors()[0])) from None


def _explain(problem: Any) -> str:
    """The first finding of pydantic as one sentence."""
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location)
    kind, value = problem["type"], problem.get("input")
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        owner: Any = Experiment
        for part in location[:-1]:
            owner = _SECTIONS[part]
        allowed = [entry.name for entry in dataclasses.fields(owner)]
        near = nearest(location[-1], allowed)
        hint = f"; did you mean {'.'.join([*location[:-1], near])!r}?" if near else ""
        return f"unknown key {field!r}{hint or '; allowed: ' + ', '.join(allowed)}"
    if kind == "value_error":
        return ".".join([*location, str(problem["ctx"]["error"])])
    if kind in ("dataclass_type", "dataclass_exact_type"):
        return f"{field} is {value!r}; it must be a section with fields"
    message = problem["msg"].replace("Input should be ", "must be ")
    message = message.replace("must be a valid ", "must be of type ")
    return f"{field} is {value!r}; it {message[0].lower()}{message[1:]}"


_SECTIONS = {
    "simulate": SimulateOptions,
    "train": TrainOptions,
    "tune": TuneOptions,
    "calibrate": CalibrateOptions,
    "infer": InferOptions,
    "serve": ServeOptions,
}
_ADAPTER = pydantic.TypeAdapter(Experiment, config=None)
