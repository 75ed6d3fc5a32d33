"""Noise as a function of (stream, draw, component): the generator and what is made of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sbi_dist.posterior.noise import _words_numpy, _words_torch, normal_noise, stream_keys

few = settings(deadline=None, max_examples=40)
words = st.integers(0, 2**32 - 1)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, by Salmon et al. (2011), section 3.3."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high0, low0 = divmod(product0, 2**32)
        high1, low1 = divmod(product1, 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def box_muller(output: list[int]) -> np.ndarray:
    """The four numbers of four words, in float64."""
    u = (np.array(output) + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2 * np.log(u[::2])), 2 * np.pi * u[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """To float32: the angle is below 2 pi, good to 2 pi 2^-24, and a radius below 6.8.

    Where the first word is near its largest, float32 has 2^-24 of it left: the radius below
    sqrt(2^-22) is good to 2^-12 of that.
    """
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=6.8 * 2 * np.pi * 2.0**-23)


def noise(keys: object, first: int, count: int, components: int) -> np.ndarray:
    """Of shape (B, count, components), for keys (B, 2)."""
    return normal_noise(torch.as_tensor(keys), first, count, components).permute(2, 1, 0).numpy()


# ---- the generator ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # from the file kat_vectors of Random123
        ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a8885a308d313198a2e03707344",
            "a4093822299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_reference_gives_the_known_answers(counter, key, answer) -> None:
    def split(text: str) -> list[int]:
        return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]

    assert philox(split(counter), split(key)) == [int(word, 16) for word in answer.split()]


@given(words, words, st.integers(0, 2**40), st.integers(0, 3))
@few
def test_noise_is_that_of_the_reference(k0, k1, draw, block) -> None:
    output = philox([draw % 2**32, draw // 2**32, block, 0], [k0, k1])
    found = noise([[k0, k1]], draw, 1, 4 * block + 4)[0, 0, 4 * block :]
    close(found, box_muller(output))


@given(
    st.lists(st.tuples(words, words), min_size=1, max_size=3),
    st.integers(0, 2**40),
    st.integers(1, 5),
    st.integers(0, 3),
)
@few
def test_the_words_of_other_devices_are_the_same(keys, first, count, block) -> None:
    given = torch.tensor(keys), first, count, block
    for one, other in zip(_words_numpy(*given), _words_torch(*given), strict=True):
        assert one.shape == (2, count, len(keys)) and torch.equal(one, other)


def test_noise_of_counter_and_key_zero() -> None:
    answer = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    close(noise([[0, 0]], 0, 1, 4)[0, 0], box_muller(answer.tolist()))


# ---- ranges -------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 3) | st.just(2**32 - 5),  # across the word of the counter
)
@few
def test_a_draw_is_the_same_in_whatever_range(counts, components, first) -> None:
    keys = [[1, 2], [3, 2**32 - 1], [2**32 - 1, 0]]
    whole = noise(keys, first, sum(counts), components)
    assert whole.shape == (3, sum(counts), components) and whole.dtype == np.float32
    start, parts = first, []
    for count in counts:
        parts.append(noise(keys, start, count, components))
        start += count
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    # Nor do other observations matter, or how many components are asked for.
    np.testing.assert_array_equal(noise(keys[1:2], first, sum(counts), components)[0], whole[1])
    more = noise(keys, first, sum(counts), components + 3)
    np.testing.assert_array_equal(more[..., :components], whole)


def test_no_draws() -> None:
    assert noise([[1, 2]], 0, 0, 3).shape == (1, 0, 3)


# ---- the distribution ---------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    count = 20_000
    z = noise([[12345, 67890]], 0, count, 5)[0].astype(np.float64)
    assert np.isfinite(z).all()
    # 5 standard errors of the first four moments' estimates; the variance of z^k is known.
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert np.abs((z**power).mean(axis=0) - mean).max() < 5 * math.sqrt(variance / count)
    for column in z.T:
        # Kolmogorov: P(sqrt(n) D > 2) = 2 exp(-8) = 7e-4 for each, at a fixed seed.
        assert stats.kstest(column, "norm").statistic < 2.0 / math.sqrt(count)
    # Correlations between components and with the next draw have sd 1 / sqrt(n).
    bound = 5 / math.sqrt(count)
    assert np.abs(np.corrcoef(z.T)[np.triu_indices(5, 1)]).max() < bound
    assert abs(np.corrcoef(z[:-1, 0], z[1:, 0])[0, 1]) < bound


def test_observations_have_independent_streams() -> None:
    # Neighbours on a grid, which a weak hash would give related streams.
    x = (np.arange(500, dtype=np.float32)[:, None] * np.float32([1.0, 0.5, 0.25])) / 64
    keys = stream_keys(x, "model", 0)
    assert len(torch.unique(keys, dim=0)) == 500
    assert ((keys >= 0) & (keys < 2**32)).all()
    z = noise(keys, 0, 40, 1)[..., 0].astype(np.float64)
    assert len(np.unique(z)) > 0.999 * z.size
    bound = 5 / math.sqrt(499 * 40)
    assert abs(np.corrcoef(z[1:].ravel(), z[:-1].ravel())[0, 1]) < bound
    # Over observations, at one draw: as normal as a stream of its own.
    assert stats.kstest(noise(keys, 7, 1, 4).ravel(), "norm").statistic < 2.0 / math.sqrt(2000)


def test_every_bit_of_a_key_is_used() -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    base = stream_keys(x, "model", 0)
    others = [stream_keys(x, "model", 1), stream_keys(x, "model", -1), stream_keys(x, "model2", 0)]
    for column in range(3):
        nudged = x.copy()
        nudged[0, column] = np.nextafter(np.float32(0), np.float32(1))
        others.append(stream_keys(nudged, "model", 0))
    assert len(torch.unique(torch.cat([base, *others]), dim=0)) == 7
    # Each changes about half of the 64 bits: 32 with sd 4; 5 sd.
    for other in others:
        changed = sum(int(word).bit_count() for word in (base ^ other)[0])
        assert 12 <= changed <= 52


# ---- keys ---------------------------------------------------------------------------------------


@given(st.permutations(range(5)))
@few
def test_keys_follow_the_observation_not_its_place(order) -> None:
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    keys = stream_keys(x, "m", 4)
    assert keys.dtype == torch.int64 and keys.shape == (5, 2)
    assert torch.equal(stream_keys(x[list(order)], "m", 4), keys[list(order)])


def test_equal_observations_have_equal_streams() -> None:
    x = np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    keys = stream_keys(x, "m", 0)
    assert torch.equal(keys[0], keys[1])  # -0.0 is 0.0
    assert not torch.equal(keys[0], keys[2])  # the place within an observation matters
    strided = np.asfortranarray(np.repeat(x, 2, axis=0))[::2]
    assert torch.equal(stream_keys(strided, "m", 0), keys)
