"""How many weights an architecture has, by arithmetic: nothing of it is made."""

from __future__ import annotations

import math
from itertools import pairwise

from sbi_dist.estimation.options import TrainOptions

__all__ = ["load_seconds", "num_weights"]


def num_weights(options: TrainOptions, features: int, x_shape: tuple[int, ...]) -> int:
    """Trainable numbers of a flow of ``features`` parameters for x of ``x_shape``.

    Those of ``ConditionalFlow``. Where x has a shape that the embedding can't take, any number.
    """
    hidden, blocks = options.hidden_features, options.blocks
    total, context = _embedding(options, x_shape)
    total += _linear(context, 2 * features)
    total += _residual(context, 2 * features, hidden, blocks, 0)
    if options.estimator == "maf":
        layer = _linear(features, hidden) + _linear(context, hidden)
        layer += blocks * _linear(hidden, hidden) + _linear(hidden, 2 * features)
        return total + options.transforms * layer
    for number in range(options.transforms):
        moved = features if features == 1 else (features + number % 2) // 2
        outputs = moved * (3 * options.bins - 1)
        fixed = 0 if features == 1 else features - moved
        total += _residual(fixed, outputs, hidden, blocks, context)
    if features > 1:
        total += options.transforms * (features * (features - 1) + 2 * features)
    return total


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _residual(inputs: int, outputs: int, hidden: int, blocks: int, context: int) -> int:
    block = 2 * _linear(hidden, hidden) + (_linear(context, hidden) if context else 0)
    return _linear(inputs + context, hidden) + blocks * block + _linear(hidden, outputs)


def _mlp(*sizes: int) -> int:
    return sum(_linear(inputs, outputs) for inputs, outputs in pairwise(sizes))


def _embedding(options: TrainOptions, x_shape: tuple[int, ...]) -> tuple[int, int]:
    """Its weights, and the length of its output."""
    width, features = options.embedding_hidden, options.embedding_features
    size = math.prod(x_shape)
    if options.embedding == "none":
        return 0, size
    if options.embedding == "fully_connected":
        return _mlp(size, width, width, features), features
    if options.embedding == "permutation_invariant":
        values = x_shape[1] if len(x_shape) == 2 else 1
        return _mlp(values, width, width) + _mlp(width, width, features), features
    flat = options.embedding == "convolutional_1d"
    places = x_shape[:1] if flat else x_shape[-2:]
    channels = x_shape[1:] if flat else x_shape[:-2]
    count, depth, total, layers = math.prod(channels), max(8, width // 4), 0, 0
    while places and max(places) > 4 and layers < 6:
        total += (count * 5 ** len(places) + 1) * depth
        places = tuple((length + 1) // 2 for length in places)
        count, depth, layers = depth, min(2 * depth, width), layers + 1
    return total + _mlp(count * math.prod(places), width, features), features


def load_seconds(options: TrainOptions, features: int) -> float:
    """About how long a core takes to make a flow and to compile it for sampling.

    Without what grows as the number of weights, which takes less than reading them.
    """
    layers = options.transforms * (options.blocks + 1)
    # Of each parameter, a table of its bijection; of each layer, its modules and steps.
    seconds = 1e-2 * features + 2e-3 * layers
    if options.estimator == "maf":
        return seconds + 5e-5 * layers * features + 1e-9 * features**3
    return seconds + 1e-9 * options.transforms * features**3
