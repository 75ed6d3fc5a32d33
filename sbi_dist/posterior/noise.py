"""Standard normal noise as a pure function of (stream, draw, component).

A counter-based generator (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3", doi:10.1145/2063384.2063405) has no state: any block of any stream is computed directly,
for all observations of a batch at once. So a draw depends on its observation, its seed and its
number alone, not on the batch that it was computed in, nor on the device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["normal_noise", "stream_keys"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_LOW_WORD, _HALF = np.uint64(_LOW), np.uint64(32)
_MULTIPLY, _STEP = (
    np.array(pair, dtype=np.uint64)[:, None, None] for pair in (_MULTIPLIERS, _WEYL)
)


def stream_keys(x: np.ndarray, identity: str, seed: int | Sequence[int]) -> Tensor:
    """A 64-bit stream key for each observation, int64 of shape (B, 2) holding two 32-bit words.

    Args:
        x: observations, float32 of shape (B, ...). Equal observations have equal streams.
        identity: the model's digest.
        seed: any integer, or one for each observation.
    """
    rows = np.ascontiguousarray(x, dtype=np.float32).reshape(len(x), -1)
    rows = rows + np.float32(0.0)  # -0.0 is 0.0
    words = rows.view(np.uint32).astype(np.uint64)
    if isinstance(seed, int):
        key = np.full(len(rows), _start(identity, seed), dtype=np.uint64)
    else:
        starts = {each: _start(identity, each) for each in set(seed)}
        key = np.array([starts[each] for each in seed], dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(words.shape[1]):
            key = _mixed(key ^ (words[:, column] + np.uint64(column) * np.uint64(_LOW)))
        key = _mixed(key)
    halves = np.stack([key & np.uint64(_LOW), key >> np.uint64(32)], axis=1)
    return torch.from_numpy(halves.astype(np.int64))


def _start(identity: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{identity}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mixed(key: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def normal_noise(keys: Tensor, first: int, count: int, components: int) -> Tensor:
    """Standard normal noise, float32 of shape (components, count, B), on the device of ``keys``.

    Draws ``first`` to ``first + count - 1`` of each stream; ``keys`` is (B, 2) of
    :func:`stream_keys`. The same draw comes out whatever range it is part of. Two words make two
    numbers (Box & Muller 1958, doi:10.1214/aoms/1177706645), in float32: below 6.8 in size.
    """
    words = _words_numpy if keys.device.type == "cpu" else _words_torch
    noise = torch.empty((components, count, len(keys)), dtype=torch.float32, device=keys.device)
    for block in range(-(-components // 4)):
        radius, angle = (each.add_(0.5).mul_(2.0**-32) for each in words(keys, first, count, block))
        radius.log_().mul_(-2).sqrt_()
        angle.mul_(2 * math.pi)
        for number, out in enumerate(noise[4 * block : 4 * block + 4]):
            pair, function = number // 2, (torch.cos, torch.sin)[number % 2]
            torch.mul(radius[pair], function(angle[pair]), out=out)
    return noise


def _words_numpy(keys: Tensor, first: int, count: int, block: int) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and 1 and 3, of each draw's counter: float32 of (2, count, B) each.

    On a CPU numpy's unsigned integers are several times as fast as torch's signed ones.
    """
    shape = (2, count, len(keys))
    even, odd, product, spare = (np.empty(shape, dtype=np.uint64) for _ in range(4))
    draws = np.arange(first, first + count, dtype=np.uint64)[:, None]
    even[0], even[1], odd[0], odd[1] = draws & _LOW_WORD, block, draws >> _HALF, 0
    key = keys.numpy().astype(np.uint64).T[:, None, :]
    for _ in range(10):
        np.multiply(even, _MULTIPLY, out=product)
        np.bitwise_and(product, _LOW_WORD, out=spare)
        np.right_shift(product, _HALF, out=product)
        np.bitwise_xor(product[::-1], odd, out=even)
        np.bitwise_xor(even, key, out=even)
        odd, spare = spare[::-1], odd
        key = (key + _STEP) & _LOW_WORD
    return torch.from_numpy(even.astype(np.float32)), torch.from_numpy(odd.astype(np.float32))


def _words_torch(keys: Tensor, first: int, count: int, block: int) -> tuple[Tensor, Tensor]:
    """As :func:`_words_numpy`, on any device."""
    shape = (count, len(keys))
    draws = torch.arange(first, first + count, device=keys.device, dtype=torch.int64)[:, None]
    c0, c1 = (draws & _LOW).expand(shape), (draws >> 32).expand(shape)
    c2, c3 = torch.full_like(c0, block), torch.zeros_like(c0)
    k0, k1 = keys.T
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c2]).float(), torch.stack([c1, c3]).float()


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32-bit product (the 64-bit one may wrap, its bits are right)."""
    product = word * multiplier
    return (product >> 32) & _LOW, product & _LOW
