"""Seconds that sbi's run_sbc takes on two cores, of our posterior or of sbi's own.

``python calibration_sbi.py ours|sbi ROWS DRAWS``: reads simulations.npz (theta and x to train on,
held_out_theta and held_out_x) and runs/gaussian in the working directory; prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from sbi.diagnostics import run_sbc
from sbi.diagnostics.sbc import check_uniformity_frequentist
from sbi.inference import NPE
from sbi.utils import BoxUniform

from sbi_dist.posterior import Posterior


def main(peer: str, rows: int, draws: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    data = {name: torch.from_numpy(value) for name, value in np.load("simulations.npz").items()}
    theta, x = data["held_out_theta"][:rows], data["held_out_x"][:rows]
    posterior: Any
    if peer == "ours":
        posterior = Posterior.load("runs/gaussian")
    else:
        prior: Any = BoxUniform(torch.full((3,), -2.0), torch.full((3,), 2.0))
        inference = NPE(prior, density_estimator="nsf", show_progress_bars=False)
        inference.append_simulations(data["theta"], data["x"]).train()
        posterior = inference.build_posterior()
    posterior.sample_batched((10,), x[:2], show_progress_bars=False)
    began = time.perf_counter()
    ranks, _ = run_sbc(theta, x, posterior, draws, show_progress_bar=False)
    seconds = time.perf_counter() - began
    ks = check_uniformity_frequentist(ranks, draws).tolist()
    # On a line of its own: sbi leaves its last one open.
    print("\n" + json.dumps({"rows": rows, "seconds": seconds, "ks": ks}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
