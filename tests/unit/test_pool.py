"""Actors that there is no room for, and an autoscaler that may make some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sbi_dist import growth, session
from sbi_dist.errors import InputError, StageError
from sbi_dist.simulation import pool
from sbi_dist.simulation.pool import Actor, ActorPool


class Simulator:
    pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster with nothing in it, and whose autoscaler can be asked; what it was asked for."""
    import ray

    found: list[str] = []

    def refuse(resources: dict[str, float], count: int, label: str, *_: Any) -> str:
        found.append(f"{label}: {count} x {resources}")
        return "its autoscaler has no nodes to add that these would fit on"

    monkeypatch.setattr(session, "capacity", lambda resources: 0)
    monkeypatch.setattr(session, "grow", refuse)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(growth, "_tables", lambda: object())
    return found


def scaled() -> ActorPool:
    return ActorPool("simulate", Simulator, (), {"CPU": 16.0}, actors=40, autoscale=True)


def test_an_autoscaler_is_asked_for_one_actor(told: list[str]) -> None:
    with pytest.raises(InputError, match="an actor of the simulate stage asks for 1 x 16 = 16 CPU"):
        scaled()
    assert told == ["an actor of the simulate stage: 1 x {'CPU': 16.0}"]


def test_a_ray_of_this_process_has_no_autoscaler(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_own", True)
    monkeypatch.setattr(growth, "_tables", lambda: None)
    with pytest.raises(InputError, match="an actor of the simulate stage asks for 1 x 16 = 16 CPU"):
        scaled()
    assert told == []


def test_one_that_tells_nothing_is_waited_for_but_not_for_ever(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_tables", lambda: None)
    made = scaled()
    handle = SimpleNamespace(ready=SimpleNamespace(remote=object))
    made._class = SimpleNamespace(remote=lambda: handle)
    made.staff(1)
    assert len(made.starting) == 1 and told == []
    monkeypatch.setattr(pool, "PATIENCE_S", -1.0)
    with pytest.raises(StageError, match="simulate: no node with 16 CPU free for an actor came"):
        made.staff(1)
    made.actors.append(Actor(handle))
    made.staff(2)  # with one at work, more may take as long as they do
