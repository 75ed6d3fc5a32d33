"""Checkpoints: whole or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_dist.estimation.checkpoint import DamagedCheckpoint, decode, encode
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.trainer import train
from sbi_dist.store import LocalStore

CPU = torch.device("cpu")
STATE = {
    "weights": torch.arange(5.0),
    "history": {"epoch": [0, 1], "training_loss": [None, 0.1], "notes": ["a"]},
    "position": [3, 4, 0],
}


def test_round_trip() -> None:
    state = decode(encode(STATE), CPU)
    assert torch.equal(state["weights"], STATE["weights"])
    assert {key: state[key] for key in ("history", "position")} == {
        key: STATE[key] for key in ("history", "position")
    }


@given(st.integers(min_value=0), st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_a_changed_byte_or_a_cut_is_noticed(place: int, change: int) -> None:
    data = encode(STATE)
    place %= len(data)
    changed = bytearray(data)
    changed[place] ^= change
    for bad in (bytes(changed), data[:place], data + b"\0"):
        with pytest.raises(DamagedCheckpoint):
            decode(bad, CPU)


def test_code_is_not_run() -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return print, ("run",)

    with pytest.raises(DamagedCheckpoint, match="more than plain data"):
        decode(encode({"weights": Harmful()}), CPU)


def test_a_training_that_was_killed_as_it_ended_leaves_nothing(tmp_path: Path) -> None:
    """The bundle is there, and checkpoints still are; who looks next removes them."""
    model = LocalStore(tmp_path)
    kept = ("weights.safetensors", "members/0/tensorboard/events.out")
    for key in (*kept, "checkpoints/step-000000000007.pt", "members/0/bundle.json", "stop"):
        model.put(key, b"1")
    model.put("bundle.json", b'{"model": "m"}')
    bounds = np.zeros(1), np.ones(1)
    assert train(model, [], bounds, model, TrainOptions(), {}) == {"model": "m"}
    assert sorted(model.list("")) == sorted([*kept, "bundle.json"])
