"""Standard normal noise as a pure function of (stream, draw, component).

A counter-based generator (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3", doi:10.1145/2063384.2063405) has no state: any block of any stream is computed directly,
for all observations of a batch at once. So a draw depends on its observation, its seed and its
number alone, not on the batch that it was computed in, nor on the device.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

__all__ = ["normal_noise", "stream_keys"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def stream_keys(x: np.ndarray, identity: str, seed: int) -> Tensor:
    """A 64-bit stream key for each observation, int64 of shape (B, 2) holding two 32-bit words.

    Args:
        x: observations, float32 of shape (B, ...). Equal observations have equal streams.
        identity: the model's digest.
        seed: any integer.
    """
    rows = np.ascontiguousarray(x, dtype=np.float32).reshape(len(x), -1)
    rows = rows + np.float32(0.0)  # -0.0 is 0.0
    words = rows.view(np.uint32).astype(np.uint64)
    start = hashlib.blake2b(f"{identity}/{seed}".encode(), digest_size=8).digest()
    key = np.full(len(rows), int.from_bytes(start, "little"), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(words.shape[1]):
            key = _mixed(key ^ (words[:, column] + np.uint64(column) * np.uint64(_LOW)))
        key = _mixed(key)
    halves = np.stack([key & np.uint64(_LOW), key >> np.uint64(32)], axis=1)
    return torch.from_numpy(halves.astype(np.int64))


def _mixed(key: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def normal_noise(keys: Tensor, first: int, count: int, components: int) -> Tensor:
    """Standard normal noise, float32 of shape (B, count, components).

    Draws ``first`` to ``first + count - 1`` of each stream; ``keys`` is (B, 2) of
    :func:`stream_keys`. The same draw comes out whatever range it is part of.
    """
    blocks = -(-components // 4)
    device = keys.device
    draws = torch.arange(first, first + count, device=device, dtype=torch.int64)
    shape = (len(keys), count, blocks)
    c0 = (draws & _LOW)[None, :, None].expand(shape)
    c1 = (draws >> 32)[None, :, None].expand(shape)
    c2 = torch.arange(blocks, device=device, dtype=torch.int64).expand(shape)
    c3 = torch.zeros((), device=device, dtype=torch.int64).expand(shape)
    k0, k1 = keys[:, 0, None, None], keys[:, 1, None, None]
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    words = torch.stack([c0, c1, c2, c3], dim=-1).flatten(-2)[..., :components]
    uniform = (words.double() + 0.5) / 2.0**32
    return torch.special.ndtri(uniform).float()


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32-bit product (the 64-bit one may wrap, its bits are right)."""
    product = word * multiplier
    return (product >> 32) & _LOW, product & _LOW
