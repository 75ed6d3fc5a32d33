"""The scientist's problem: a prior, a simulator, names, units and the observed data.

Also how a problem is found from ``pkg.mod:attr`` or ``file.py:attr`` and how it is fingerprinted.
How a simulator is run is in ``simulator.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import pickle
import sys
import sysconfig
import types
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbi_dist.errors import InputError
from sbi_dist.options import nearest
from sbi_dist.priors import as_prior, prior_to_data, sample_prior
from sbi_dist.program import Program
from sbi_dist.simulator import SimulatorForm, detect_form

__all__ = ["ATTEMPTS", "ObservationAxis", "Problem", "load_problem", "local_modules"]

# Sets of draws that finding a simulator's form tries.
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class ObservationAxis:
    """How to draw x: its first axis as a coordinate, its second as series.

    Attributes:
        label: what the first axis is, such as ``year``.
        values: its coordinates, length x_shape[0].
        series: names along the second axis, where x has one.
        value_label: what the numbers are, with their unit.
        log: whether the numbers are better seen on a logarithmic axis.
    """

    label: str = ""
    values: Sequence[float] | None = None
    series: Sequence[str] = ()
    value_label: str = "x"
    log: bool = False


@dataclasses.dataclass
class Problem:
    """A prior over theta and a simulator of x given theta.

    Args:
        prior: a torch distribution (or a sequence of them, taken as independent) of D parameters.
        simulator: callable on theta; see ``sbi_dist.simulator`` for its forms.
        parameter_names: D names; default theta_1, theta_2, ...
        parameter_units: D units, for tables.
        observed: the observed data, of one simulation's shape.
        true_parameters: the parameters that made ``observed``, where known; shape (D,).
        batched: force the simulator's form (None: found by running it).
        axis: how to draw x.
        log_likelihood: log p(x | theta) where it is known: callable on numpy theta (N, D) and one
            x of x_shape, giving (N,); used for importance weights only.
        title, description, reference: for the report.
        packages: installed packages whose version the simulator's results depend on; they enter
            the fingerprint and the list of versions.
        version: replaces the simulator's source code in the fingerprint, so that edits that do
            not change its results keep the stored simulations.

    Raises:
        InputError: names the field and what is allowed.
    """

    prior: Any
    simulator: Callable[..., Any]
    parameter_names: Sequence[str] | None = None
    parameter_units: Sequence[str] | None = None
    observed: Any = None
    true_parameters: Any = None
    batched: bool | None = None
    axis: ObservationAxis | None = None
    log_likelihood: Callable[..., Any] | None = None
    title: str = ""
    description: str = ""
    reference: str = ""
    packages: Sequence[str] = ()
    version: str | None = None
    # Found by running the simulator.
    known_form: SimulatorForm | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.prior = as_prior(self.prior)
        if not callable(self.simulator):
            raise InputError(
                f"problem.simulator is {type(self.simulator).__name__}; it must be callable as "
                "simulator(theta)"
            )
        for name in self.packages:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                raise InputError(
                    f"problem.packages names {name!r}, which is not installed here; install it, or "
                    "leave it out"
                ) from None
        if isinstance(self.simulator, Program):
            self._agree_with_program(self.simulator)
        names = self.parameter_names or [f"theta_{i + 1}" for i in range(self.num_parameters)]
        self.parameter_names = self._per_parameter("parameter_names", names)
        if len(set(self.parameter_names)) != len(self.parameter_names):
            raise InputError(f"problem.parameter_names {names} must be different from each other")
        if self.parameter_units is not None:
            self.parameter_units = self._per_parameter("parameter_units", self.parameter_units)
        if self.true_parameters is not None:
            truth = np.asarray(self.true_parameters, dtype=np.float32).reshape(-1)
            if truth.shape != (self.num_parameters,):
                raise InputError(
                    f"problem.true_parameters has {truth.size} numbers; the prior has "
                    f"{self.num_parameters} parameters"
                )
            self.true_parameters = truth
        if self.observed is not None:
            observed = np.asarray(self.observed, dtype=np.float32)
            if not np.isfinite(observed).all():
                count = int((~np.isfinite(observed)).sum())
                raise InputError(
                    f"problem.observed holds {count} value(s) that are NaN or infinite; every "
                    "value must be a finite number (leave missing data out of the simulator's x "
                    "as well)"
                )
            self.observed = observed

    def _agree_with_program(self, program: Program) -> None:
        if self.batched is None:
            self.batched = program.batch
        if program.parameter_names is None:
            return
        if self.parameter_names is None:
            self.parameter_names = program.parameter_names
        elif list(self.parameter_names) != list(program.parameter_names):
            raise InputError(
                f"problem.parameter_names {list(self.parameter_names)} are not those of its "
                f"program, {list(program.parameter_names)}; give the same names to both"
            )

    def _per_parameter(self, field: str, values: Sequence[str]) -> tuple[str, ...]:
        if isinstance(values, str) or len(values) != self.num_parameters:
            raise InputError(
                f"problem.{field} is {values!r}; it must be a list of {self.num_parameters} "
                "strings, one for each parameter of the prior"
            )
        return tuple("" if value is None else str(value) for value in values)

    @property
    def num_parameters(self) -> int:
        """D, the number of parameters."""
        return int(self.prior.event_shape[0])

    def form(self) -> SimulatorForm:
        """The simulator's form, found by running it once and then remembered.

        Raises:
            InputError: the simulator can't be run, or its x has another shape than ``observed``.
        """
        reason: InputError | None = None
        for attempt in range(ATTEMPTS if self.known_form is None else 0):
            try:
                self.known_form = self.find_form(attempt)
                break
            except InputError as error:  # simulations of these draws may fail
                reason = reason or error
        if self.known_form is None:
            assert reason is not None
            raise reason
        return self.known_form

    def find_form(self, attempt: int = 0) -> SimulatorForm:
        """Find the simulator's form by running it; each attempt takes other draws of the prior.

        Raises:
            InputError: the simulator can't be run, or its x has another shape than ``observed``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(attempt)
            draws = sample_prior(self.prior, 12)
        return self._matched_to_observed(detect_form(self.simulator, draws, self.batched))

    def _matched_to_observed(self, form: SimulatorForm) -> SimulatorForm:
        if self.observed is not None and tuple(self.observed.shape) != tuple(form.x_shape):
            raise InputError(
                f"problem.observed has shape {tuple(self.observed.shape)}, but the simulator gives "
                f"x of shape {tuple(form.x_shape)}; they must be equal"
            )
        return form

    def source(self) -> str:
        """``version``, or a digest of the simulator's code as it was when first asked for.

        Kept, since running the simulator may import more of its modules.
        """
        if self.version is not None:
            return self.version
        if not hasattr(self, "_source"):
            code = json.dumps(_code(self.simulator), sort_keys=True)
            self._source = hashlib.sha256(code.encode()).hexdigest()
        return self._source

    def package_versions(self) -> dict[str, str]:
        """Version of each of ``packages``."""
        return {name: metadata.version(name) for name in self.packages}

    def fingerprint(self) -> str:
        """16 hex digits that change with the prior, the simulator's code or ``packages``.

        The code is the syntax tree of the simulator's module (or file) without comments,
        docstrings and formatting, or ``version`` where that is given.
        """
        content = {
            "prior": prior_to_data(self.prior),
            "parameters": self.parameter_names,
            "simulator": self.source(),
        }
        if self.packages:
            content["packages"] = self.package_versions()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _code(function: Any) -> Any:
    """What a simulator computes by: its source, its local modules' source, and its values."""
    if isinstance(function, Program):
        return ["program", function.code()]
    if isinstance(function, functools.partial):
        return ["partial", _code(function.func), _values([function.args, function.keywords])]
    routine = inspect.isroutine(function)
    owner = function if routine else type(function)
    state = "" if routine else _values(sorted(getattr(function, "__dict__", {}).items()))
    try:
        source = inspect.getsource(inspect.getmodule(owner) or owner)
    except (OSError, TypeError):
        try:
            source = inspect.getsource(owner)
        except (OSError, TypeError):
            code = getattr(owner, "__code__", None)
            return [getattr(owner, "__qualname__", repr(owner)), code.co_code.hex() if code else ""]
    others = [
        # Not by inspect, which takes an empty file for a missing one.
        _without_comments(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for module in local_modules(function)
        if module is not inspect.getmodule(owner)
    ]
    return [getattr(owner, "__qualname__", ""), _without_comments(source), others, state]


def _values(values: Any) -> str:
    """A digest of values that a simulator holds; of their text where they can't be pickled."""
    try:
        data = pickle.dumps(values)
    except Exception:  # pickling runs a stranger's code
        data = repr(values).encode()
    return hashlib.sha256(data).hexdigest()


def local_modules(function: Any) -> list[types.ModuleType]:
    """The loaded modules of a simulator's own folder, which is not installed; by name.

    Empty for a simulator of an installed package, or of a script or notebook.
    """
    name = getattr(function, "__module__", None) or type(function).__module__
    if isinstance(function, functools.partial):
        return local_modules(function.func)
    own = sys.modules.get(name)
    path = getattr(own, "__file__", None)
    if own is None or path is None or name == "__main__" or _installed(Path(path)):
        return []
    # A package's folder is that of its outermost module.
    folder = Path(path).resolve().parents[name.count(".")]
    found = {}
    for other, module in list(sys.modules.items()):
        # Not getattr, which some modules answer by raising.
        place = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(place, str) and place.endswith(".py") and other != "__main__":
            resolved = Path(place).resolve()
            if folder in resolved.parents and not _installed(resolved):
                found[other] = module
    return [found[other] for other in sorted(found)]


def _installed(path: Path) -> bool:
    """Whether a file is one that the workers have too: of this package, or of an environment."""
    standard = sysconfig.get_paths()
    folders = [Path(standard[key]) for key in ("stdlib", "purelib", "platlib")]
    folders.append(Path(__file__).parent)
    return any(folder.resolve() in path.resolve().parents for folder in folders)


def _without_comments(source: str) -> str:
    try:
        tree = ast.parse(inspect.cleandoc(source) if source[:1].isspace() else source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body:
            continue
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body.pop(0)
    return ast.dump(tree)


def load_problem(reference: str, base: Path | None = None) -> Problem:
    """The problem that ``pkg.mod:attr`` or ``file.py:attr`` names.

    ``attr`` is a :class:`Problem` or a function without arguments that makes one. A file's path is
    relative to ``base`` (the experiment file's folder), else to the working directory.

    Raises:
        InputError: the reference has no such form, or names nothing.
    """
    place, separator, attribute = reference.rpartition(":")
    if not separator or not place or not attribute:
        raise InputError(
            f"problem is {reference!r}; it must be 'package.module:attribute' or "
            "'path/to/file.py:attribute'"
        )
    module = _load_file(place, base) if place.endswith(".py") else _load_module(place)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if isinstance(value, Problem)]
        near = nearest(attribute, names or vars(module))
        hint = f" (did you mean {near!r}?)" if near else ""
        raise InputError(f"problem: {place} has no attribute {attribute!r}{hint}")
    problem = getattr(module, attribute)
    if not isinstance(problem, Problem) and callable(problem):
        problem = problem()
    if not isinstance(problem, Problem):
        raise InputError(
            f"problem: {reference} is a {type(problem).__name__}; it must be a Problem, or a "
            "function that returns one"
        )
    return problem


def _load_module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"problem: module {name!r} can't be imported ({error})") from error
    except Exception as error:
        raise InputError(
            f"problem: module {name!r} fails on import ({type(error).__name__}: {error})"
        ) from error


def _load_file(place: str, base: Path | None) -> types.ModuleType:
    path = Path(place).expanduser()
    if not path.is_absolute():
        path = (base or Path.cwd()) / path
    path = path.resolve()
    if not path.is_file():
        raise InputError(f"problem: there is no file {path}")
    # One name a path, so that two files of the same name do not meet.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        del sys.modules[name]
        raise InputError(
            f"problem: {path} fails on import ({type(error).__name__}: {error})"
        ) from error
    return module
