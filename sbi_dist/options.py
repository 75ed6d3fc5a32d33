"""Options as plain dataclasses that check themselves when built.

Each stage declares its own options with :func:`option`; the experiment file is made of them. No
third-party import here, so that the mathematics runs where only torch is installed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from sbi_dist.errors import InputError

__all__ = ["Options", "nearest", "option", "resources"]


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | None = None,
    outcome: bool = True,
) -> Any:
    """A dataclass field with a one-line description and the values that it allows.

    ``outcome=False`` marks a field that changes how a stage runs but not what it computes; such a
    field is left out of the stage's fingerprint. Numeric bounds apply to numbers only, so that a
    field may be "a positive number, or auto".
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "help": help,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "choices": tuple(choices) if choices is not None else None,
        "outcome": outcome,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_WORDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_CHECKS = {
    "ge": lambda value, bound: value >= bound,
    "gt": lambda value, bound: value > bound,
    "le": lambda value, bound: value <= bound,
    "lt": lambda value, bound: value < bound,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of every options dataclass: checks bounds and choices when built.

    Raises:
        InputError: names the field, its value and what is allowed.
    """

    # For pydantic, which reads the experiment file into these: a misspelt field is an error.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = field.metadata.get("choices")
            if choices is not None and isinstance(value, str) and value not in choices:
                raise InputError(
                    f"{field.name} is {value!r}; allowed: {', '.join(choices)}"
                    f"{_did_you_mean(value, choices)}"
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            for name, bound in field.metadata.get("bounds", {}).items():
                if not _CHECKS[name](value, bound):
                    raise InputError(f"{field.name} is {value}; it must be {_WORDS[name]} {bound}")

    def outcome(self) -> dict[str, Any]:
        """The fields that change what the stage computes, for its fingerprint."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("outcome", True)
        }


def resources(cpus: float, gpus: float) -> dict[str, float]:
    """What a process takes, by Ray's names."""
    wanted = {"CPU": float(cpus), "GPU": float(gpus)}
    return {name: amount for name, amount in wanted.items() if amount}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to ``word``, or None where none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return f" (did you mean {near!r}?)" if near else ""
