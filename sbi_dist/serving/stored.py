"""What an experiment's folder holds of its models, read with bounds; nothing is kept of it.

The folder may be on a store that fails, and what is in it may be anyone's. Names are checked
before they become keys, and sizes before anything is fetched.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

from sbi_dist.estimation.bundle import BUNDLE, WEIGHTS
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.promotion import calibration_key
from sbi_dist.serving.model import Verdict, verdict_of
from sbi_dist.store import ObjectStore

__all__ = ["Damaged", "Stored", "Tag", "Unreachable", "is_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LARGEST_BUNDLE, _LARGEST_NOTE = 64_000_000, 1_000_000
_MB = 1e6

Tag = tuple[tuple[int, str], tuple[int, str] | None]
"""Identities of a model's ``bundle.json`` and weights: others when one was replaced."""


class Unreachable(Exception):
    """The store fails or does not answer."""


class Damaged(Exception):
    """What is stored can't be used; says why, without a path."""


def is_name(name: str) -> bool:
    """Whether a model may be called so."""
    return _NAME.fullmatch(name) is not None


class Stored:
    """The models in an experiment's folder. Every method may raise ``Unreachable``.

    Args:
        store: of the folder.
        largest_model_mb: of weights.
    """

    def __init__(self, store: ObjectStore, largest_model_mb: float) -> None:
        self._store, self._largest = store, largest_model_mb

    def promoted_identity(self) -> tuple[int, str] | None:
        """That of ``promoted.json``; None where there is none."""
        return self._identity(PROMOTED)

    def promoted(self) -> str:
        """The model that ``promoted.json`` names.

        Raises:
            Damaged: it names none.
        """
        data = self._note(PROMOTED)
        if data is None:
            raise Damaged(f"{PROMOTED} is gone, or larger than a few words")
        try:
            name = json.loads(data)["model"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Damaged(f"{PROMOTED} is damaged: it names no model") from None
        if not isinstance(name, str) or not is_name(name):
            raise Damaged(f"{PROMOTED} names {name!r:.50}, which is no id of a model")
        return name

    def bundle_identity(self, name: str) -> tuple[int, str] | None:
        """That of a model's ``bundle.json``; None where there is none."""
        return self._identity(f"models/{name}/{BUNDLE}")

    def tag(self, name: str) -> Tag | None:
        """That of a model; None where there is none."""
        bundle = self.bundle_identity(name)
        if bundle is None:
            return None
        return bundle, self._identity(f"models/{name}/{WEIGHTS}")

    def files(self, name: str, tag: Tag) -> tuple[bytes, bytes]:
        """The content of ``bundle.json`` and of the weights.

        Raises:
            Damaged: one is too large, or missing.
        """
        limits = (_LARGEST_BUNDLE / _MB, self._largest)
        for file, identity, limit in zip((BUNDLE, WEIGHTS), tag, limits, strict=True):
            if identity is None:
                raise Damaged(f"{file} is missing")
            if identity[0] > limit * _MB:
                size = identity[0] / _MB
                raise Damaged(f"{file} has {size:,.1f} MB; at most {limit:,.0f} are loaded")
        text, weights = (self._get(f"models/{name}/{file}") for file in (BUNDLE, WEIGHTS))
        if text is None or weights is None:
            raise Damaged("it was deleted while it was loaded")
        return text, weights

    def verdict_identity(self, name: str) -> tuple[int, str] | None:
        """That of what calibration wrote; None where it wrote nothing."""
        return self._identity(calibration_key(name))

    def verdict(self, name: str) -> Verdict | None:
        """What calibration wrote, if it is valid."""
        return verdict_of(self._note(calibration_key(name)))

    def names(self, known: set[str]) -> list[str]:
        """Models that have a bundle, in order; those of ``known`` are not looked at again."""
        with _reaching():
            folders = self._store.folders("models/")
        return [
            name
            for name in folders
            if is_name(name) and (name in known or self.bundle_identity(name))
        ]

    def _identity(self, key: str) -> tuple[int, str] | None:
        with _reaching():
            try:
                return self._store.identity(key)
            except KeyError:
                return None

    def _get(self, key: str) -> bytes | None:
        with _reaching():
            try:
                return self._store.get(key)
            except KeyError:
                return None

    def _note(self, key: str) -> bytes | None:
        """A small object; None where there is none, or one that is not small."""
        found = self._identity(key)
        return self._get(key) if found is not None and found[0] <= _LARGEST_NOTE else None


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Whatever a store's client raises: another try may find it well.
        raise Unreachable(f"{type(error).__name__}: {error}") from error
