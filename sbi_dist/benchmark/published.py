"""C2ST of other methods on the SBI benchmark, mean over its ten observations."""

from __future__ import annotations

__all__ = ["NPE"]

# Neural posterior estimation with a neural spline flow, by number of simulations: the results that
# Lueckmann et al. 2021 (arXiv:2101.04653, github.com/sbi-benchmark/results) publish, to three
# digits.
NPE: dict[str, dict[int, float]] = {
    "bernoulli_glm": {1_000: 0.863, 10_000: 0.678, 100_000: 0.559},
    "gaussian_linear": {1_000: 0.694, 10_000: 0.552, 100_000: 0.506},
    "gaussian_linear_uniform": {1_000: 0.696, 10_000: 0.553, 100_000: 0.509},
    "gaussian_mixture": {1_000: 0.716, 10_000: 0.615, 100_000: 0.548},
    "lotka_volterra": {1_000: 0.999, 10_000: 0.997, 100_000: 0.981},
    "sir": {1_000: 0.815, 10_000: 0.680, 100_000: 0.585},
    "slcp": {1_000: 0.975, 10_000: 0.901, 100_000: 0.831},
    "slcp_distractors": {1_000: 0.982, 10_000: 0.970, 100_000: 0.863},
    "two_moons": {1_000: 0.725, 10_000: 0.606, 100_000: 0.542},
}
