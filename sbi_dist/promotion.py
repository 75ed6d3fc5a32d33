"""Which model of an experiment is in use, and what its calibration said of it.

``models/promoted.json`` names the model in use, and the last one before it that did not fail its
calibration. A model that failed is put in use by force alone.
"""

from __future__ import annotations

import json
from typing import Any

from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import load_bundle
from sbi_dist.options import nearest
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.store import ObjectStore

__all__ = ["CALIBRATION", "FORMER", "Promotion", "calibration_key"]

CALIBRATION = "calibration.json"  # the outcome of a model's latest calibration

FORMER = "former"  # stands for the model that was in use before


def calibration_key(model_id: str) -> str:
    """Where the outcome of a model's latest calibration is kept."""
    return f"calibration/{model_id}/{CALIBRATION}"


class Promotion:
    """The model in use of one experiment.

    Args:
        store: the experiment's folder.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @property
    def model(self) -> str | None:
        """The model in use."""
        return self._read("model")

    @property
    def former(self) -> str | None:
        """The one to go back to: the last one in use before it that did not fail."""
        return self._read(FORMER)

    def calibration(self, model_id: str) -> dict[str, Any]:
        """What the latest calibration of a model found; empty where there was none."""
        try:
            content = json.loads(self._store.get(calibration_key(model_id)))
        except (KeyError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def verdict(self, model_id: str) -> str | None:
        """``pass``, ``warn`` or ``fail``; None where the model was not calibrated."""
        verdict = self.calibration(model_id).get("verdict")
        return verdict if isinstance(verdict, str) else None

    def failing(self, model_id: str) -> str:
        """Names of the tests that a model failed, as text."""
        tests = self.calibration(model_id).get("tests")
        named = [
            str(test.get("name"))
            for test in (tests if isinstance(tests, list) else [])
            if isinstance(test, dict) and test.get("verdict") == "fail"
        ]
        return ", ".join(named) or "no test is named"

    def put(self, model_id: str) -> None:
        """Put a model in use, whatever is known of it."""
        before, former = self.model, self.former
        if before not in (None, model_id) and self.verdict(str(before)) != "fail":
            former = before
        content = {"model": model_id} | ({} if former in (None, model_id) else {FORMER: former})
        self._store.put(PROMOTED, json.dumps(content).encode())

    def trained(self, model_id: str) -> bool:
        """Put a newly trained model in use, unless its calibration has to come first.

        It has where the model in use did not fail its own, and where the new one did.
        """
        before, verdict = self.model, self.verdict(model_id)
        checked = before not in (None, model_id) and self.verdict(str(before)) in ("pass", "warn")
        if verdict == "fail" or (checked and verdict is None):
            return False
        self.put(model_id)
        return True

    def failed(self, model_id: str) -> str | None:
        """Take a model that failed out of use; the one that is in use then, if any."""
        if self.model == model_id:
            former = self.former
            if former is not None and self.verdict(former) != "fail":
                self.put(former)
            else:
                self._store.delete(PROMOTED)
        return self.model

    def why_none(self) -> str:
        """Why no model is in use and what to do, as the end of a sentence that names the folder."""
        failed = [name for name in self._store.folders("models/") if self.verdict(name) == "fail"]
        if not failed:
            return "holds no trained model; run `sbi-dist run` or `sbi-dist train` first"
        return (
            f"has no model in use: {failed[-1]} failed its calibration "
            f"({self.failing(failed[-1])}); simulate more, train longer, or put it in use with "
            f"`sbi-dist promote EXPERIMENT --model {failed[-1]} --force`"
        )

    def choose(self, model_id: str, force: bool) -> str:
        """Put the model of that name in use, or the ``former`` one; its name.

        Raises:
            InputError: there is no such model, it is damaged, or it failed its calibration.
        """
        known = self._store.folders("models/")
        if model_id == FORMER:
            former = self.former
            if former is None:
                raise InputError(
                    f"--model is 'former', but no model was in use before; give one of "
                    f"{', '.join(known) or 'none that is trained'}"
                )
            model_id = former
        if model_id not in known:
            near = nearest(model_id, known)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise InputError(
                f"--model is {model_id!r}, which {self._store.uri} does not hold{hint}; there are "
                f"{', '.join(known) or 'none, train one first'}"
            )
        load_bundle(self._store.child(f"models/{model_id}"))
        if self.verdict(model_id) == "fail" and not force:
            raise InputError(
                f"--model is {model_id!r}, which failed its calibration "
                f"({self.failing(model_id)}); give another one, or --force"
            )
        self.put(model_id)
        return model_id

    def _read(self, field: str) -> str | None:
        try:
            content = json.loads(self._store.get(PROMOTED))
        except (KeyError, ValueError):
            return None
        found = content.get(field) if isinstance(content, dict) else None
        return found if isinstance(found, str) else None
