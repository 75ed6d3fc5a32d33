"""Which settings a search tries: a list that is a function of (space, trials, seed) alone.

The first trial is the train section as it is. The others are points of an additive recurrence
(Korobov's; the multiples of irrational numbers modulo 1), which covers the space more evenly than
independent random points do, from an offset that the seed gives. More trials add points behind
these and change none. Nothing here trains, and no Ray is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from sbi_dist.estimation.options import TrainOptions
from sbi_dist.experiment import digest
from sbi_dist.tuning.options import TuneOptions
from sbi_dist.tuning.space import Choices, Range

__all__ = ["Search", "Trial", "plan_search"]

# A space whose points repeat so often in a row has few others.
_REPEATS = 1000
# With such a value of a field, the fields behind it do nothing.
_IDLE = (
    ("estimator", "maf", ("bins", "tail_bound")),
    ("embedding", "none", ("embedding_features", "embedding_hidden")),
    ("schedule", "average", ("decays",)),
    ("schedule", "cosine", ("decays", "patience")),
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes:
        id: 12 hex digits of its options and of the simulations.
        number: its place in the list, from 0.
        settings: what differs from the train section.
        options: all that it is trained with.
    """

    id: str
    number: int
    settings: dict[str, Any]
    options: TrainOptions


@dataclasses.dataclass(frozen=True)
class Search:
    """A search over settings on one list of shards.

    Attributes:
        id: 12 hex digits of all that its outcome depends on, but for the number of trials.
        trials: what is tried, the train section's own settings first.
        train: the train section.
        data: the dataset's id and its shards.
    """

    id: str
    trials: tuple[Trial, ...]
    train: TrainOptions
    data: dict[str, Any]


def plan_search(options: TuneOptions, train: TrainOptions, data: dict[str, Any]) -> Search:
    """The search that the options ask for.

    All trials hold out the same simulations, those of ``train.seed``, start from the same seed and
    have the same limit of epochs, so that their losses can be compared. Each trains one estimator,
    whatever ``train.ensemble`` is.

    Args:
        options: the tune section.
        train: the train section.
        data: JSON that identifies the simulations: ``dataset`` and ``shards``.
    """
    base = dataclasses.replace(
        train, ensemble=1, warm_start=False, max_epochs=options.max_epochs or train.max_epochs
    )
    space = options.values()
    trials: list[Trial] = []
    for settings in itertools.islice(_distinct(space, base, options.seed), options.trials):
        chosen = dataclasses.replace(base, **settings)
        trials.append(Trial(digest({**data, **chosen.outcome()}), len(trials), settings, chosen))
    identity = {
        **data,
        "train": base.outcome(),
        "space": {name: dataclasses.asdict(values) for name, values in space.items()},
        "seed": options.seed,
        "grace_epochs": options.grace_epochs,
        "reduction": options.reduction,
    }
    return Search(digest(identity), tuple(trials), train, data)


def _distinct(
    space: dict[str, Choices | Range], base: TrainOptions, seed: int
) -> Iterator[dict[str, Any]]:
    """What settings change in the train section, each change once; at first nothing."""
    seen: set[str] = set()
    repeats = 0
    for settings in itertools.chain([{}], _points(space, seed)):
        changed = _changes(settings, base)
        if _first_time(changed, seen):
            repeats = 0
            yield changed
            continue
        repeats += 1
        if repeats >= _REPEATS:
            break
    if all(isinstance(values, Choices) for values in space.values()):
        every = itertools.product(*(cast(Choices, each).values for each in space.values()))
        for chosen in every:
            changed = _changes(dict(zip(space, chosen, strict=True)), base)
            if _first_time(changed, seen):
                yield changed


def _first_time(changed: dict[str, Any], seen: set[str]) -> bool:
    name = json.dumps(changed, sort_keys=True)
    if name in seen:
        return False
    seen.add(name)
    return True


def _changes(settings: dict[str, Any], base: TrainOptions) -> dict[str, Any]:
    """The settings that differ from the train section, without those that do nothing."""
    idle: set[str] = set()
    for field, value, others in _IDLE:
        if settings.get(field, getattr(base, field)) == value:
            idle.update(others)
    return {
        name: value
        for name, value in settings.items()
        if name not in idle and value != getattr(base, name)
    }


def _points(space: dict[str, Choices | Range], seed: int) -> Iterator[dict[str, Any]]:
    """Settings at the points of the recurrence, without end."""
    size = len(space)
    # The powers of 1 / g with g ** (size + 1) = g + 1, the golden ratio for one field, keep the
    # points far from each other in every number of them.
    g = 2.0
    for _ in range(64):
        g = (1 + g) ** (1 / (size + 1))
    steps = g ** -np.arange(1.0, size + 1)
    offset = np.random.Generator(np.random.Philox(key=seed)).random(size)
    for number in itertools.count():
        places = (offset + number * steps) % 1.0
        yield {
            name: values.at(float(place))
            for (name, values), place in zip(space.items(), places, strict=True)
        }
