"""Random numbers by place: numpy's Philox streams, each begun anywhere in constant time."""

from __future__ import annotations

import threading

import numpy as np

__all__ = ["stream"]

_WORD = (1 << 64) - 1


class _Local(threading.local):
    """One generator a thread, set to what is asked for: a new one takes five times as long."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.bits)


_local = _Local()


def stream(key: int, counter: tuple[int, int, int, int]) -> np.random.Generator:
    """The generator of ``Philox(key=key, counter=counter)``, until this thread asks for another.

    Args:
        key: a non-negative integer, of which the last 128 bits are used.
        counter: four words of 64 bits. The first one counts blocks of four float64.
    """
    _local.bits.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array(counter, dtype=np.uint64),
            "key": np.array([key & _WORD, key >> 64 & _WORD], dtype=np.uint64),
        },
        "buffer": np.zeros(4, dtype=np.uint64),
        "buffer_pos": 4,  # nothing in it
        "has_uint32": 0,
        "uinteger": 0,
    }
    return _local.generator
