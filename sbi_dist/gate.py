"""The gate before the model in use: a trained model is calibrated, and put in use if it passes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.calibration.stage import calibrate, held_out_name, held_out_simulations, request_of
from sbi_dist.calibration.text import as_text
from sbi_dist.errors import CalibrationError, InputError
from sbi_dist.estimation.bundle import BUNDLE
from sbi_dist.experiment import Experiment
from sbi_dist.progress import say
from sbi_dist.promotion import Promotion
from sbi_dist.rounds import Round
from sbi_dist.session import connected
from sbi_dist.simulation.shard import ShardRecord
from sbi_dist.store import ObjectStore

__all__ = ["Gate", "Judged"]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a calibration came to.

    Attributes:
        model_id: the model.
        text: what each test found, for a terminal.
        error: that it failed, unless it is in use by force all the same.
    """

    model_id: str
    text: str
    error: CalibrationError | None


class Gate:
    """Calibrates the models of one experiment.

    Args:
        experiment: the experiment.
        store: its folder.
        promotion: the model in use.
        address: Ray cluster, for where Ray is needed; None for a local one.
    """

    def __init__(
        self, experiment: Experiment, store: ObjectStore, promotion: Promotion, address: str | None
    ) -> None:
        self._experiment, self._store = experiment, store
        self._promotion, self._address = promotion, address

    def judge(
        self,
        this: Round,
        records: Sequence[ShardRecord],
        model_id: str,
        force: bool = False,
        automatic: bool = False,
    ) -> Judged:
        """Calibrate a trained model, and put it in use if it passes.

        Args:
            this: the round that it was trained in; its problem makes the held-out simulations.
            records: the shards that it was trained on.
            force: put it in use whatever comes of it.
            automatic: in proportion to what it was trained on, and not again where a calibration
                of that size or a larger one is there.

        Raises:
            InputError: it failed a calibration with more simulations than are asked for.
        """
        options, observed = self._experiment.calibrate, this.problem.observed
        outweighed = self._failed_with(model_id)
        if automatic:
            count = max(outweighed, options.count(sum(record.rows for record in records)))
            options = dataclasses.replace(options, num_simulations=count)
        elif options.count() < outweighed and not force:
            raise InputError(
                f"calibrate.num_simulations is {options.count():,}, but model {model_id} failed "
                f"its calibration with {outweighed:,}, which weighs more; give at least as many, "
                "or --force to put it in use all the same"
            )
        known = self._known(this, model_id, options) if automatic else None
        found = known or self._calibrate(this, records, model_id, options, observed)
        say(f"calibrate: model {model_id} has the verdict {found['verdict']}")
        if found["verdict"] != "fail" or force:
            if self._promotion.model != model_id:
                self._promotion.put(model_id)
            return Judged(model_id, as_text(found), None)
        if known is not None and self._promotion.model == model_id:
            then = "it is in use by force, and stays so"
        else:
            in_use = self._promotion.failed(model_id)
            then = "no model is in use" if in_use is None else f"in use is {in_use}"
        error = CalibrationError(
            f"calibrate: model {model_id} failed its calibration "
            f"({self._promotion.failing(model_id)}); {then}; simulate more, train longer, or give "
            "--force to `sbi-dist calibrate`"
        )
        return Judged(model_id, as_text(found), error)

    def _calibrate(
        self,
        this: Round,
        records: Sequence[ShardRecord],
        model_id: str,
        options: CalibrateOptions,
        observed: Any,
    ) -> dict[str, Any]:
        with contextlib.ExitStack() as until_done:
            connect: Callable[[], object] = lambda: until_done.enter_context(  # noqa: E731
                connected(self._address)
            )
            held_out = held_out_simulations(
                this.problem,
                options,
                self._experiment.simulate,
                self._store.child("calibration/simulations"),
                {"experiment": self._experiment.name},
                connect,
            )
            return calibrate(
                self._store.child(f"models/{model_id}"),
                held_out,
                (this.store, records),
                options,
                self._store.child(f"calibration/{model_id}"),
                self._experiment.name,
                observed,
                connect,
            )

    def _failed_with(self, model_id: str) -> int:
        """Held-out simulations of the calibration that the model failed; 0: it did not."""
        found = self._promotion.calibration(model_id)
        try:
            return int(found["request"]["num_simulations"]) if found["verdict"] == "fail" else 0
        except (KeyError, TypeError, ValueError):  # none, or one of another version
            return 0

    def _known(
        self, this: Round, model_id: str, options: CalibrateOptions
    ) -> dict[str, Any] | None:
        """What an earlier calibration found that was of the same and not smaller, if any."""
        found = self._promotion.calibration(model_id)
        try:
            about = json.loads(self._store.get(f"models/{model_id}/{BUNDLE}"))
            name = held_out_name(this.problem, options, self._experiment.simulate)
            wanted = request_of(about["weights_sha256"][:16], name, options, this.problem.observed)
            known = dict(found["request"])
            as_many = known.pop("num_simulations") >= wanted.pop("num_simulations")
            as_text(found)
        except (KeyError, TypeError, ValueError):  # none, or one of another version
            return None
        return found if as_many and known == wanted else None
