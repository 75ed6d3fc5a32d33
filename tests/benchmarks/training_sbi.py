"""sbi's training of a neural spline flow with its own defaults, on given simulations.

``python training_sbi.py FOLDER ESTIMATOR SEED LIMIT_S``: reads simulations.npz (theta, x, low, high
and the fresh theta and x) in FOLDER, writes sbi.npz there: validation losses and seconds by
epoch, the rows that sbi held out, and -log q of the fresh rows.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform


class _Limited(NPE):
    """NPE that stops after so many seconds, as it stops when it has converged."""

    limit_s = float("inf")

    def _converged(self, epoch: int, stop_after_epochs: int) -> bool:
        converged = super()._converged(epoch, stop_after_epochs)
        seconds = sum(self._summary["epoch_durations_sec"])
        if epoch and (epoch % 10 == 0 or seconds > 60):
            print(epoch, round(seconds, 1), round(self._val_loss, 4), file=sys.stderr, flush=True)
        self.finished = converged
        if not converged and seconds >= self.limit_s:
            self._neural_net.load_state_dict(self._best_model_state_dict)
            return True
        return converged


def main(folder: Path, estimator: str, seed: int, limit_s: float) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = {
        name: torch.from_numpy(value) for name, value in np.load(folder / "simulations.npz").items()
    }
    prior: Any = BoxUniform(data["low"].float(), data["high"].float())
    inference = _Limited(prior, density_estimator=estimator, show_progress_bars=False)
    inference.limit_s = limit_s
    began = time.perf_counter()
    net = inference.append_simulations(data["theta"], data["x"]).train()
    seconds = time.perf_counter() - began
    net.eval()
    held_out = inference.val_indices

    def losses(theta: torch.Tensor, x: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            parts = [net.loss(theta[i : i + 5000], x[i : i + 5000]) for i in range(0, len(x), 5000)]
        return torch.cat(parts).double().numpy()

    np.savez(
        folder / "sbi.npz",
        validation_loss=np.array(inference.summary["validation_loss"]),
        epoch_s=np.array(inference.summary["epoch_durations_sec"]),
        seconds=seconds,
        finished=inference.finished,
        held_out=held_out.numpy(),
        best_validation_loss=losses(data["theta"][held_out], data["x"][held_out]).mean(),
        fresh_loss=losses(data["fresh_theta"], data["fresh_x"]).mean(),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
