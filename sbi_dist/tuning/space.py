"""What a search may vary: fields of the ``train`` section, and values or a range for each.

Here a space is checked and places in it become settings. Which places are tried is ``search``'s
matter.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from sbi_dist.errors import InputError
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.options import nearest

__all__ = ["Choices", "Range", "parse_space"]

_DIGITS = 3  # significant ones of a number from a range: more would say nothing
_KEYS = ("low", "high", "log")
_FIELDS = {field.name: field for field in dataclasses.fields(TrainOptions)}
_HINTS = typing.get_type_hints(TrainOptions)
_TRAIN = pydantic.TypeAdapter(TrainOptions)

_OTHER_SIMULATIONS = (
    "trials that are validated on other simulations can't be compared; set it in the train section"
)
_NO_HYPERPARAMETERS = {
    "seed": _OTHER_SIMULATIONS,
    "validation_fraction": _OTHER_SIMULATIONS,
    "ensemble": "every trial trains one estimator; set it in the train section for the model",
    "warm_start": "every trial starts anew, so that all have the same chance",
    "max_epochs": "all trials have the same limit; set tune.max_epochs",
    "max_seconds": "what a trial reaches would depend on the machine; set tune.max_epochs",
    "shuffle_mb": "it follows from the memory there is; set it in the train section",
}


@dataclasses.dataclass(frozen=True)
class Choices:
    """A list of values, each as likely as the others."""

    values: tuple[Any, ...]

    def at(self, place: float) -> Any:
        """The value at a place in [0, 1)."""
        return self.values[min(int(place * len(self.values)), len(self.values) - 1)]


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``log``: evenly in their logarithms.

    ``whole`` gives whole numbers, otherwise there are three significant digits.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, place: float) -> float | int:
        """The number at a place in [0, 1)."""
        # A whole number stands for the interval up to the next one.
        end = self.high + 1 if self.whole else self.high
        if self.log:
            value = self.low * math.exp(place * math.log(end / self.low))
        else:
            value = self.low + place * (end - self.low)
        value = math.floor(value) if self.whole else float(f"{value:.{_DIGITS}g}")
        return min(max(value, self.low), self.high)


def parse_space(space: Mapping[str, Any]) -> dict[str, Choices | Range]:
    """The values of each field, fields in the order of their names.

    Args:
        space: field of :class:`TrainOptions` to a list of values, or to a mapping with ``low``,
            ``high`` and perhaps ``log``.

    Raises:
        InputError: names the field, its value and what is allowed.
    """
    if not space:
        raise InputError(
            "space is empty; give fields of the train section, such as "
            "learning_rate: {low: 1e-4, high: 1e-2, log: true}"
        )
    return {name: _parse(name, space[name]) for name in sorted(space, key=str)}


def _parse(name: Any, content: Any) -> Choices | Range:
    if name not in _FIELDS:
        near = nearest(str(name), [each for each in _FIELDS if _searchable(each)])
        hint = f"did you mean {near!r}?" if near else f"allowed: {', '.join(_allowed())}"
        raise InputError(f"space has {name!r}, which is no field of the train section; {hint}")
    if name in _NO_HYPERPARAMETERS:
        raise InputError(
            f"space has {name!r}, which can't be searched: {_NO_HYPERPARAMETERS[name]}"
        )
    if not _searchable(name):
        raise InputError(
            f"space has {name!r}, which can't be searched: it changes how a training runs, not "
            "what comes of it; set it in the train section"
        )
    if isinstance(content, list):
        if not content:
            raise InputError(f"space.{name} is an empty list; give values, or low and high")
        return Choices(tuple(_checked(name, value) for value in content))
    if isinstance(content, Mapping):
        return _range(name, content)
    raise InputError(
        f"space.{name} is {content!r}; it must be a list of values, or have low, high and "
        "perhaps log"
    )


def _searchable(name: str) -> bool:
    return name not in _NO_HYPERPARAMETERS and _FIELDS[name].metadata["outcome"]


def _allowed() -> list[str]:
    return [name for name in _FIELDS if _searchable(name)]


def _range(name: str, content: Mapping[str, Any]) -> Range:
    kinds = set(typing.get_args(_HINTS[name]) or (_HINTS[name],))
    if not kinds & {int, float}:
        choices = _FIELDS[name].metadata["choices"]
        which = f" of {', '.join(choices)}" if choices else ""
        raise InputError(f"space.{name} is {dict(content)!r}; it must be a list{which}")
    for key in content:
        if key not in _KEYS:
            near = nearest(str(key), _KEYS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(f"space.{name} has {key!r}; allowed: low, high and log{hint}")
    if "low" not in content or "high" not in content:
        raise InputError(f"space.{name} is {dict(content)!r}; it must have both low and high")
    log = content.get("log", False)
    if not isinstance(log, bool):
        raise InputError(f"space.{name}.log is {log!r}; it must be true or false")
    low, high = (_number(name, key, content[key]) for key in ("low", "high"))
    if low >= high:
        raise InputError(f"space.{name} has low {low:g} and high {high:g}; low must be less")
    if log and low <= 0:
        raise InputError(f"space.{name}.low is {low:g}; with log it must be greater than 0")
    return Range(low, high, log, whole=float not in kinds)


def _number(name: str, key: str, value: Any) -> Any:
    found = _checked(name, value)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise InputError(f"space.{name}.{key} is {value!r}; it must be a number")
    return found


def _checked(name: str, value: Any) -> Any:
    """A value as the train section takes it.

    Raises:
        InputError: the train section refuses it.
    """
    wrong = f"space.{name} has {value!r}"
    if isinstance(value, bool) and _HINTS[name] is not bool:
        raise InputError(f"{wrong}; it must not be true or false")
    try:
        return getattr(_TRAIN.validate_python({name: value}), name)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
    if problem["type"] == "value_error":
        raise InputError(f"space.{problem['ctx']['error']}")
    message = problem["msg"].replace("Input should be a valid", "it must be of type")
    raise InputError(f"{wrong}; {message[0].lower()}{message[1:]}")
