"""The amortized-Gaussian tutorial of the sbi toolbox, on the library named by the first argument.

The body is the tutorial's; only the imports (and their prefixes) depend on the library. Prints one
JSON line with the times and the losses.
"""

from __future__ import annotations

import json
import sys
import time

started = time.perf_counter()
LIBRARY = sys.argv[1]

import matplotlib  # noqa: E402

matplotlib.use("agg")

import numpy as np  # noqa: E402
import torch  # noqa: E402

if LIBRARY == "sbi":
    from sbi.analysis import pairplot
    from sbi.inference import SNPE, simulate_for_sbi
    from sbi.utils import BoxUniform
    from sbi.utils.user_input_checks import check_sbi_inputs, process_prior, process_simulator
else:
    from sbi_dist import (
        SNPE,
        BoxUniform,
        check_sbi_inputs,
        pairplot,
        process_prior,
        process_simulator,
        simulate_for_sbi,
    )
imported = time.perf_counter()
torch.manual_seed(int(sys.argv[2]))

num_dim = 3
prior = BoxUniform(low=-2 * torch.ones(num_dim), high=2 * torch.ones(num_dim))


def simulator(theta):
    # linear gaussian
    return theta + 1.0 + torch.randn_like(theta) * 0.1


ray_started = 0.0
if LIBRARY != "sbi":
    from sbi_dist.session import connect

    before = time.perf_counter()
    connect()
    ray_started = time.perf_counter() - before

prior, num_parameters, prior_returns_numpy = process_prior(prior)
simulator = process_simulator(simulator, prior, prior_returns_numpy)
check_sbi_inputs(simulator, prior)
inference = SNPE(prior=prior)
before = time.perf_counter()
theta, x = simulate_for_sbi(simulator, proposal=prior, num_simulations=2000)
simulated = time.perf_counter() - before
# The same simulations for both libraries.
generator = torch.Generator().manual_seed(int(sys.argv[2]))
theta = torch.rand(2000, 3, generator=generator) * 4 - 2
x = theta + 1 + 0.1 * torch.randn(2000, 3, generator=generator)
inference = inference.append_simulations(theta, x)
before = time.perf_counter()
density_estimator = inference.train()
trained = time.perf_counter() - before
posterior = inference.build_posterior(density_estimator)

theta_1 = prior.sample((1,))
x_obs_1 = simulator(theta_1)
theta_2 = prior.sample((1,))
x_obs_2 = simulator(theta_2)
for x_obs, theta_true in ((x_obs_1, theta_1), (x_obs_2, theta_2)):
    posterior_samples = posterior.sample((10000,), x=x_obs)
    _ = pairplot(
        posterior_samples,
        limits=[[-2, 2], [-2, 2], [-2, 2]],
        figsize=(5, 5),
        labels=[r"$\theta_1$", r"$\theta_2$", r"$\theta_3$"],
        points=theta_true,
    )
total = time.perf_counter() - started

best = inference.summary["best_validation_loss"]
# Not part of the tutorial: the loss on 10,000 fresh simulations, the same for both.
test_theta = torch.rand(10_000, 3, generator=generator) * 4 - 2
test_x = test_theta + 1 + 0.1 * torch.randn(10_000, 3, generator=generator)
with torch.no_grad():
    if LIBRARY == "sbi":
        test_loss = -float(density_estimator.log_prob(test_theta[None], test_x).mean())
    else:
        test_loss = -float(density_estimator.log_prob(test_theta, test_x).mean())
# sbi leaves its last line open.
print(
    "\n"
    + json.dumps(
        {
            "library": LIBRARY,
            "import_s": imported - started,
            "ray_s": ray_started,
            "simulate_s": simulated,
            "train_s": trained,
            "total_s": total,
            "validation_loss": float(np.min(best)),
            "test_loss": test_loss,
        }
    )
)
