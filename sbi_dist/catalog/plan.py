"""How a catalog is divided: parts that are written once, and what of a part is held at once."""

from __future__ import annotations

import dataclasses
import math

from sbi_dist.catalog.options import InferOptions
from sbi_dist.errors import InputError

__all__ = ["Part", "check_size", "parts", "rows_at_once", "rows_per_part"]

# A part is some seconds of work, and an object of moderate size.
_PART_DRAWS, _PART_BYTES, _PART_ROWS = 2 * 10**6, 32 * 1024**2, 65_536
# Of draws with weights, whose likelihood may be slow.
_PART_WEIGHED = 5 * 10**5
# Draws at once: several copies of them are made on the way.
_BLOCK_BYTES = 4 * 1024**2
# Draws of one observation, which are held as a whole: about eight times that is needed to store
# them.
_MOST_BYTES = 128 * 1024**2


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop - 1`` of a catalog."""

    number: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Name of its object in the folder of the draws."""
        return f"part-{self.number:06d}.parquet"

    def __len__(self) -> int:
        return self.stop - self.start


def parts(observations: int, rows: int) -> list[Part]:
    """The parts of so many rows each, the last one of what is left."""
    starts = range(0, observations, rows)
    return [
        Part(number, start, min(start + rows, observations)) for number, start in enumerate(starts)
    ]


def check_size(options: InferOptions, num_parameters: int) -> None:
    """Refuse draws that are too many to be held.

    Raises:
        InputError: names the field and the most that it may be.
    """
    most = _MOST_BYTES // (4 * num_parameters)
    for field, count in (("num_samples", options.num_samples), ("proposals", options.proposals)):
        if count is not None and count > most:
            raise InputError(
                f"infer.{field} is {count}; the draws of an observation are held in memory, where "
                f"{num_parameters} parameters leave room for {most:,} ({_MOST_BYTES >> 20} MB); "
                "ask for fewer, or for several seeds with an --output folder each"
            )


def rows_per_part(
    observations: int, options: InferOptions, num_parameters: int, x_shape: tuple[int, ...]
) -> int:
    """Rows of a part, so that the parts are of one size."""
    of_summary = num_parameters * (num_parameters + 5 + len(options.quantiles))
    numbers = options.num_samples * num_parameters * options.keeps_draws
    numbers += of_summary * options.summarizes
    most = _PART_DRAWS // options.num_samples
    if options.proposals is not None:
        most = min(most, _PART_WEIGHED // options.proposals)
    for row in (numbers, math.prod(x_shape)):
        most = min(most, _PART_BYTES // (4 * max(1, row)))
    most = max(1, min(most, _PART_ROWS))
    count = -(-observations // most)
    return -(-observations // max(1, count))


def rows_at_once(draws: int, num_parameters: int, x_shape: tuple[int, ...]) -> int:
    """Observations that are drawn for at once."""
    row = max(draws * num_parameters, math.prod(x_shape))
    return max(1, _BLOCK_BYTES // (4 * row))
