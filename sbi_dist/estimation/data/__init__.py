"""The data of a training: who reads which simulations, and in which order they are visited.

``held_out`` and ``order`` say which rows are for validation and which make each batch, by
arithmetic alone. ``source`` and ``rows`` read them. ``resident`` and ``streamed`` give batches of
what is in memory and of what is not; ``load`` chooses between them and fits the standardization.
``examples`` reads some rows of either kind once more.
"""

from sbi_dist.estimation.data.examples import examples
from sbi_dist.estimation.data.held_out import split
from sbi_dist.estimation.data.load import load_data
from sbi_dist.estimation.data.source import ArraySource, ShardSource, Source
from sbi_dist.estimation.data.training_data import TrainingData

__all__ = [
    "ArraySource",
    "ShardSource",
    "Source",
    "TrainingData",
    "examples",
    "load_data",
    "split",
]
