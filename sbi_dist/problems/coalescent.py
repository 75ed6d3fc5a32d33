"""Growth of a population from the genomes of a sample, simulated by msprime.

A population of constant size began to grow exponentially some time ago. What is seen is how often
the derived alleles occur in a sample of it, the site-frequency spectrum, in half a megabase of
recombining sequence. Here are the problem and the call of msprime, which the extra
``sbi_dist[coalescent]`` installs.

The growth leaves long outer branches in the genealogies, and so an excess of rare alleles
(Griffiths and Tavaré 1994). The mean spectrum is known in closed form. The likelihood is not, as
neighbouring sites share their genealogies: to take them as independent, as usual, gives intervals
that are too narrow.
"""

from __future__ import annotations

import math

import numpy as np

from sbi_dist.errors import InputError
from sbi_dist.priors import BoxUniform
from sbi_dist.problem import ObservationAxis, Problem

try:
    import msprime
except ImportError as error:
    raise InputError(
        f"problem: sbi_dist.problems.coalescent needs msprime, which can't be imported ({error}); "
        "install it with pip install 'sbi_dist[coalescent]'"
    ) from error

__all__ = [
    "CLASSES",
    "LENGTH",
    "MSPRIME_VERSION",
    "MUTATION_RATE",
    "OBSERVED",
    "OBSERVED_SEED",
    "RECOMBINATION_RATE",
    "SAMPLE_SIZE",
    "TRUE_PARAMETERS",
    "class_counts",
    "problem",
    "simulator",
    "spectrum",
]

SAMPLE_SIZE = 100  # diploid individuals, so 200 copies of the sequence
LENGTH = 500_000  # base pairs

# Both per base pair and generation, about those of humans: Jónsson et al. (2017), Nature 549, 519,
# and the 1 cM/Mb that is usual as a round number.
MUTATION_RATE = 1.29e-8
RECOMBINATION_RATE = 1e-8

# The first derived allele count of each class of x, and the end of the last. Fibonacci numbers:
# without growth the expected number of sites is proportional to 1/i, so that all these classes but
# the first and the last hold about as many. From ten thousand simulations a network learns more of
# the classes than of the 199 counts, most of which are noise.
CLASSES = np.array([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200])

# An ancestral population of 10,000 that grew 20-fold in the last 2,000 generations.
TRUE_PARAMETERS = np.array([4.0, 1.3, 3.3])

# simulator(TRUE_PARAMETERS, numpy.random.default_rng(OBSERVED_SEED)) of this version of msprime;
# written out, so that another version does not change the data.
OBSERVED_SEED = 1994
MSPRIME_VERSION = "1.4.4"
OBSERVED = np.array([1271, 283, 246, 166, 156, 107, 132, 69, 130, 141, 116])


def spectrum(theta: np.ndarray, rng: np.random.Generator, length: int = LENGTH) -> np.ndarray:
    """Number of sites by derived allele count 1 ... 199, float64 of shape (199,).

    Sites mutate once (infinitely many sites); recombination is between base pairs. Two copies that
    are in a population of N diploids coalesce at rate 1 / (2 N) a generation.

    Args:
        theta: shape (3,): log10 of the ancestral size N (diploid individuals), log10 of the ratio
            of present to ancestral size, log10 of the time since growth began (generations).
        rng: gives msprime its two seeds.
        length: of the sequence, base pairs.
    """
    ancestral, growth, time = 10.0 ** np.asarray(theta, dtype=np.float64)
    demography = msprime.Demography()
    # Backwards in time: exponential decrease from the present size, then constant.
    demography.add_population(
        name="sampled", initial_size=ancestral * growth, growth_rate=math.log(growth) / time
    )
    demography.add_population_parameters_change(time=time, initial_size=ancestral, growth_rate=0.0)
    genealogy_seed, mutation_seed = (int(seed) for seed in rng.integers(1, 2**31, size=2))
    genealogies = msprime.sim_ancestry(
        samples=[msprime.SampleSet(SAMPLE_SIZE, population="sampled", ploidy=2)],
        demography=demography,
        sequence_length=length,
        recombination_rate=RECOMBINATION_RATE,
        discrete_genome=True,
        random_seed=genealogy_seed,
    )
    mutated = msprime.sim_mutations(
        genealogies, rate=MUTATION_RATE, discrete_genome=False, random_seed=mutation_seed
    )
    counts: np.ndarray = mutated.allele_frequency_spectrum(polarised=True, span_normalise=False)
    # The first and the last entry are of alleles that none or all of the sample have.
    return counts[1:-1]


def class_counts(counts: np.ndarray) -> np.ndarray:
    """Sums over the classes of derived allele counts, shape (..., 11), of a spectrum (..., 199)."""
    sums: np.ndarray = np.add.reduceat(counts, CLASSES[:-1] - 1, axis=-1)
    return sums


def simulator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of sites in each class of derived allele counts, shape (11,); see ``spectrum``."""
    return class_counts(spectrum(theta, rng))


def _frequencies() -> tuple[float, ...]:
    """log10 of each class's middle (geometric, of its smallest and largest) allele frequency."""
    middle = np.sqrt(CLASSES[:-1] * (CLASSES[1:] - 1.0))
    return tuple(float(value) for value in np.log10(middle / (2 * SAMPLE_SIZE)))


problem = Problem(
    # Sizes of 3,000 to 30,000, up to 100-fold growth, within the last 300 to 10,000 generations.
    prior=BoxUniform([3.5, 0.0, 2.5], [4.5, 2.0, 4.0]),
    simulator=simulator,
    batched=False,
    parameter_names=("log10_size", "log10_growth", "log10_time"),
    parameter_units=("log10 individuals", "log10 fold", "log10 generations"),
    packages=("msprime",),
    observed=OBSERVED,
    true_parameters=TRUE_PARAMETERS,
    axis=ObservationAxis(
        label="log10 of derived allele frequency",
        values=_frequencies(),
        value_label="sites",
        log=True,
    ),
    title="Population growth from a site-frequency spectrum",
    description=(
        "A population of constant size began to grow exponentially. In 100 of its individuals half "
        "a megabase is sequenced, and the sites that differ are counted by how many of the 200 "
        "copies have the derived allele, in 11 classes (1, 2, 3-4, 5-7, ... 144-199). Growth shows "
        "as an excess of rare alleles. Three parameters are inferred: the ancestral size, how many "
        "times larger the population is now, and when the growth began. Neighbouring sites share "
        "their genealogies, so the likelihood is not known; msprime simulates the coalescent with "
        "recombination and mutations at human rates (1e-8 and 1.29e-8 per base pair and "
        "generation). The data are one simulation of an ancestral population of 10,000 that grew "
        "20-fold in 2,000 generations."
    ),
    reference=(
        "Griffiths and Tavaré (1994), Sampling theory for neutral alleles in a varying "
        "environment, Phil. Trans. R. Soc. B 344, 403; Kelleher, Etheridge and McVean (2016), "
        "Efficient coalescent simulation and genealogical analysis for large sample sizes, PLoS "
        "Computational Biology 12, e1004842; Baumdicker et al. (2022), Efficient ancestry and "
        "mutation simulation with msprime 1.0, Genetics 220, iyab229."
    ),
)
