"""What an actor of the calibrate stage does: draw for held-out simulations, keep what tests take.

A plain class; the driver makes Ray actors of it, or uses it in its own process. Draws stay here: of
each simulation, one row of a small table goes to the store.
"""

from __future__ import annotations

import dataclasses
import io
import os
import time

import numpy as np
import pyarrow.parquet as pq
import torch

from sbi_dist.calibration.held_out import HeldOut
from sbi_dist.calibration.options import CalibrateOptions
from sbi_dist.calibration.reduce import reduce_block
from sbi_dist.calibration.reference import Regression, Scale
from sbi_dist.calibration.table import Ranks, from_arrow, merge, to_arrow
from sbi_dist.catalog.actor import PartRecord, load_posterior
from sbi_dist.catalog.plan import Part, rows_at_once
from sbi_dist.store import ObjectStore

__all__ = ["CalibrationActor", "Reference", "decode", "encode"]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is known of the simulations that the model was trained on.

    Attributes:
        scale: of each parameter.
        regression: a guess of the parameters by x; None where they are too few for one.
    """

    scale: Scale
    regression: Regression | None


class CalibrationActor:
    """Writes parts: of each held-out simulation a row of a table.

    Args:
        model: folder of the model.
        options: of the stage.
        target: folder of the parts.
        reference: see there.
        held_out: the simulations.
    """

    def __init__(
        self,
        model: ObjectStore,
        options: CalibrateOptions,
        target: ObjectStore,
        reference: Reference,
        held_out: HeldOut,
    ) -> None:
        torch.set_num_threads(max(1, int(options.cpus_per_actor)))
        self._posterior = load_posterior(model, options.gpus_per_actor, "calibrate")
        self._options, self._target = options, target
        self._reference, self._held_out = reference, held_out

    def ready(self) -> int:
        """Process id, once the model is loaded."""
        return os.getpid()

    def draw(self, part: Part, _: None = None) -> tuple[list[PartRecord], float]:
        """Draw for a part and store its table; its record, and the seconds that this took."""
        began = time.perf_counter()
        if not self._target.exists(part.key):
            table = self._table(part)
            self._target.put_if_absent(part.key, encode(table, self._posterior.parameter_names))
        record = PartRecord(part.number, {"ok": len(part)})
        return [record], time.perf_counter() - began

    def flush(self) -> tuple[list[PartRecord], float]:
        """Nothing is left to be written."""
        return [], 0.0

    def _table(self, part: Part) -> Ranks:
        simulations = self._held_out.read(part.start, part.stop)
        usable = np.flatnonzero(simulations.ok)
        size = self._posterior.estimator.num_parameters
        at_once = rows_at_once(self._options.num_draws, size, self._posterior.x_shape)
        return merge(
            [
                self._block(
                    simulations.simulation_id[some], simulations.theta[some], simulations.x[some]
                )
                for some in np.split(usable, range(at_once, len(usable), at_once))
            ]
        )

    def _block(self, row: np.ndarray, theta: np.ndarray, x: np.ndarray) -> Ranks:
        posterior, options = self._posterior, self._options
        regression = self._reference.regression
        if not len(row):
            nothing = np.zeros((0, options.num_draws, posterior.estimator.num_parameters))
            return reduce_block(row, theta, nothing, scale=self._reference.scale, seed=options.seed)
        given = torch.from_numpy(np.ascontiguousarray(x))
        # A seed for each: the draws of equal observations are to be independent too.
        seeds = (row + options.seed).tolist()
        draws, log_q = posterior.draws(given, options.num_draws, seeds, with_log_prob=True)
        log_q_theta = posterior.sampler.log_prob(torch.from_numpy(theta)[None], given)[0]
        assert log_q is not None
        return reduce_block(
            row,
            theta,
            draws.numpy(),
            log_q.numpy(),
            log_q_theta.numpy(),
            scale=self._reference.scale,
            reference=None if regression is None else regression.predict(x),
            ood=posterior.out_of_distribution(given)[1],
            seed=options.seed,
        )


def encode(table: Ranks, names: list[str]) -> bytes:
    """A table as a Parquet file; the same rows give the same bytes."""
    sink = io.BytesIO()
    pq.write_table(to_arrow(table, names), sink, compression="zstd")
    return sink.getvalue()


def decode(data: bytes) -> Ranks:
    """The table in a Parquet file."""
    return from_arrow(pq.read_table(io.BytesIO(data), use_threads=False))[0]
