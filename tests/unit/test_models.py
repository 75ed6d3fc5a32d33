"""The models of a service: loaded once, followed, bounded, served on whatever the store does."""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import json
import shutil
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sbi_dist.errors import StageError
from sbi_dist.estimation.bundle import BUNDLE, WEIGHTS, save_bundle
from sbi_dist.posterior import Posterior
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.serving import model as model_file
from sbi_dist.serving.models import Model, Models
from sbi_dist.serving.refusal import Refusal
from sbi_dist.store import LocalStore
from tests.unit.test_untrusted_bundle import made

X = torch.tensor([[0.3, -0.2, 0.1]])
REFRESH_S = 0.05


class Watched(LocalStore):
    """A store on the disk that counts what it is asked for, and can be out of reach or slow."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, str]] = []
        self.out_of_reach = False
        self.open = threading.Event()
        self.open.set()

    def _ask(self, act: str, key: str) -> None:
        self.asked.append((act, key))
        if self.out_of_reach:
            raise StageError(f"store {self.uri}: {key} can't be read (secret of the endpoint)")
        if act == "get" and key.endswith(WEIGHTS):
            assert self.open.wait(20)

    def get(self, key: str) -> bytes:
        self._ask("get", key)
        return super().get(key)

    def identity(self, key: str) -> tuple[int, str]:
        self._ask("identity", key)
        return super().identity(key)

    def folders(self, prefix: str = "") -> list[str]:
        self._ask("folders", prefix)
        return super().folders(prefix)

    def loads(self, name: str) -> int:
        """How often a model's weights were fetched."""
        return self.asked.count(("get", f"models/{name}/{WEIGHTS}"))

    # ---- what a pipeline, or anyone else, does to the folder ----

    def model(self, name: str, seed: int = 0, **about: Any) -> None:
        prior = prior_to_data(BoxUniform([-2.0] * 2, [2.0] * 2))
        about = {"prior": prior, "parameter_names": ["a", "b"], "model": name, **about}
        save_bundle(LocalStore(self.root / "models" / name), made(seed=seed), about)

    def promote(self, name: str) -> None:
        self.put(PROMOTED, json.dumps({"model": name}).encode())

    def judge(self, name: str, verdict: Any, summary: Any = "") -> None:
        content = {"verdict": verdict, "summary": summary}
        self.put(f"calibration/{name}/calibration.json", json.dumps(content).encode())

    def edit(self, name: str, **changes: Any) -> None:
        """Change a bundle's ``bundle.json``."""
        key = f"models/{name}/{BUNDLE}"
        self.put(key, json.dumps({**json.loads(super().get(key)), **changes}).encode())


@pytest.fixture
def store(tmp_path) -> Watched:
    """Of an experiment with models ``one``, which is promoted, and ``two``."""
    made = Watched(tmp_path / "experiment")
    made.model("one", seed=1)
    made.model("two", seed=2)
    made.promote("one")
    return made


Scenario = Callable[..., Awaitable[None]]


def serving(**options: Any) -> Callable[[Scenario], Callable[..., None]]:
    """A test of models that have started, in an event loop of its own."""

    def decorated(scenario: Scenario) -> Callable[..., None]:
        @functools.wraps(scenario)
        def run(store: Watched, **fixtures: Any) -> None:
            async def all_of_it() -> None:
                settings = {"memory_mb": 1000.0, "largest_model_mb": 10.0, "refresh_s": REFRESH_S}
                models = Models(store, **{**settings, **options})
                await models.start()
                try:
                    await scenario(models, store, **fixtures)
                finally:
                    await models.close()

            asyncio.run(asyncio.wait_for(all_of_it(), 60))

        run.__signature__ = _of_fixtures(scenario)  # type: ignore[attr-defined]
        return run

    return decorated


def _of_fixtures(scenario: Scenario) -> Any:
    import inspect

    signature = inspect.signature(scenario)
    return signature.replace(
        parameters=[each for name, each in signature.parameters.items() if name != "models"]
    )


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        await asyncio.sleep(0.01)


async def looked(models: Models, times: int = 2) -> None:
    """Wait until the store was looked at in full, that often."""
    for _ in range(times):
        before = models._looked
        await until(lambda before=before: models._looked > before)


async def refusal_of(models: Models, name: str) -> Refusal:
    with pytest.raises(Refusal) as raised:
        await models.get(name)
    return raised.value


def same_draws(model: Model, store: Watched, name: str) -> None:
    expected = Posterior.load(f"{store.uri}/models/{name}").draws(X, 5, 3)[0]
    assert torch.equal(model.posterior.draws(X, 5, 3)[0], expected)


# ---- what there is ------------------------------------------------------------------------------


@serving()
async def test_promoted_and_by_id(models, store) -> None:
    promoted = await models.get("promoted")
    assert promoted is models.promoted is await models.get("one")
    assert promoted.id == "one" and promoted.about["model"] == "one"
    assert promoted.verdict == "none" and "was not checked" in promoted.verdict_summary
    same_draws(promoted, store, "one")
    assert models.ready("two") is None
    two = await models.get("two")
    same_draws(two, store, "two")
    assert models.ready("two") is two and models.promoted is promoted
    assert [each.id for each in models.loaded] == ["one", "two"]
    assert models.num_bytes == promoted.num_bytes + two.num_bytes > 0
    assert models.promotion_problem is None


@serving()
async def test_list(models, store) -> None:
    (store.root / "models" / "in training" / "checkpoints").mkdir(parents=True)
    (store.root / "models" / "training" / "checkpoints").mkdir(parents=True)
    shutil.copytree(store.root / "models" / "two", store.root / "models" / "broken")
    store.edit("broken", weights_sha256="0")
    await refusal_of(models, "broken")
    await models.get("two")
    await until(lambda: time.monotonic() - models._listed_at > REFRESH_S)
    listed = {each.pop("model"): each for each in await models.listed()}
    assert listed["one"] == {"promoted": True, "loaded": True, "refused": None}
    assert listed["two"] == {"promoted": False, "loaded": True, "refused": None}
    assert "does not match the checksum" in listed["broken"].pop("refused")
    assert listed["broken"] == {"promoted": False, "loaded": False}
    assert list(listed) == ["one", "broken", "two"]  # the promoted one first


@serving(refresh_s=30.0)
async def test_a_list_asked_for_often_is_read_once(models, store) -> None:
    await asyncio.gather(*(models.listed() for _ in range(20)))
    await models.listed()
    assert store.asked.count(("folders", "models/")) == 1


@serving(refresh_s=30.0)
async def test_a_loaded_model_costs_no_look_at_the_store(models, store) -> None:
    await models.get("two")
    before = len(store.asked)
    for name in ("one", "two", "promoted") * 100:
        assert (await models.get(name)) is models.ready(name)
    assert len(store.asked) == before


@pytest.fixture
def unpromoted(store) -> None:
    store.delete(PROMOTED)


@pytest.mark.usefixtures("unpromoted")
@serving(refresh_s=30.0)
async def test_nothing_is_promoted(models, store) -> None:
    refused = await refusal_of(models, "promoted")
    assert refused.status == 404 and "no model is promoted" in refused.detail
    assert models.promoted is None and (await models.get("two")).id == "two"
    assert not any(each["promoted"] for each in await models.listed())


@pytest.mark.usefixtures("unpromoted")
@serving()
async def test_the_first_promoted_model_is_found(models, store) -> None:
    assert models.promoted is None
    store.promote("two")
    await until(lambda: models.promoted)
    assert (await models.get("promoted")).id == "two"


@serving()
async def test_what_is_no_name_does_not_reach_the_store(models, store) -> None:
    names = ["", ".", "..", "../one", "one/../two", "one/", "/etc/passwd", "a b", "a\n", "x" * 101]
    names += [".hidden", "-x", "a\0", "é", "a%2fb", "s3://x", "~", "one\\two", "a:b"]
    for name in names:
        refused = await refusal_of(models, name)
        assert refused.status == 404 and len(refused.detail) < 300
    for name in ("three", "promoted.json", "ONE", "a..b", "x" * 100):
        assert (await refusal_of(models, name)).status == 404
    asked = {key for _, key in store.asked}
    assert not any(f"models/{name}/{BUNDLE}" in asked for name in names)
    assert f"models/three/{BUNDLE}" in asked


# ---- loading ------------------------------------------------------------------------------------


@serving(refresh_s=30.0)
async def test_one_load_for_all_who_ask(models, store) -> None:
    got = await asyncio.gather(*(models.get("two") for _ in range(50)))
    assert store.loads("two") == 1 and all(model is got[0] for model in got)


@serving(refresh_s=30.0)
async def test_one_who_goes_does_not_end_the_load(models, store) -> None:
    store.open.clear()
    asking = [asyncio.create_task(models.get("two")) for _ in range(3)]
    await until(lambda: store.loads("two"))
    asking[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking[0]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(models.get("two"), 0.05)
    # Others are answered meanwhile.
    assert (await models.get("promoted")).id == "one"
    store.open.set()
    assert (await asking[1]) is (await asking[2])
    assert store.loads("two") == 1


@serving(refresh_s=30.0)
async def test_too_many_loads_are_turned_away(models, store) -> None:
    store.open.clear()
    asking = [asyncio.create_task(models.get("two"))]
    await until(lambda: store.loads("two"))
    for number in range(80):
        (store.root / "models" / f"m{number}").symlink_to(store.root / "models" / "two")
        asking.append(asyncio.create_task(models.get(f"m{number}")))
    asking.append(asyncio.create_task(models.get("two")))
    await asyncio.sleep(0.3)
    refused = [each for each in asking if each.done()]
    assert len(refused) == 81 - 64
    for each in refused:
        error = each.exception()
        assert isinstance(error, Refusal) and error.status == 503 and error.retry_after
    store.open.set()
    for each in asking:
        if each not in refused:
            assert isinstance(await each, Model)


@serving()
async def test_a_model_is_warm_when_it_is_given_out(models, store, monkeypatch) -> None:
    """Its sampler is the service's, and has drawn by then."""
    made: list[tuple[str, int]] = []
    sampler = model_file.Sampler

    def noted(estimator: Any, device: str, threads: int) -> Any:
        made.append((device, threads))
        return sampler(estimator, device, threads)

    monkeypatch.setattr(model_file, "Sampler", noted)
    model = await models.get("two")
    assert made == [("cpu", 1)]
    assert model.posterior.sampler._members[0]._free  # memory of tiles that were drawn


class Panic(BaseException):
    """As those of libraries in Rust, which are no ``Exception``."""


@pytest.mark.parametrize("error", [ImportError("no x"), MemoryError(), RecursionError(), Panic()])
def test_what_a_load_raises_does_not_end_the_service(error, store, monkeypatch) -> None:
    monkeypatch.setattr(model_file, "_warm", _raising(error))
    events: list[tuple[str, str]] = []

    @serving(on_event=lambda *event: events.append(event))
    async def scenario(models: Models, store: Watched) -> None:
        refused = await refusal_of(models, "promoted")
        assert refused.status == 409 and type(error).__name__ in refused.detail
        monkeypatch.undo()
        store.model("one", seed=3)  # stored anew, it is tried again
        await until(lambda: models.promoted)
        assert models.promotion_problem is None

    scenario(store=store)
    assert events == [("refused", "one"), ("ok", "one")]


def _raising(error: BaseException) -> Callable[..., None]:
    def raising(*_: Any) -> None:
        raise error

    return raising


# ---- what is refused ----------------------------------------------------------------------------


def broken(store: Watched, name: str, how: str) -> str:
    """Break a model; a word of what it is refused with."""
    folder = store.root / "models" / name
    if how == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
        return "does not match the checksum"
    if how == "no weights":
        (folder / WEIGHTS).unlink()
        return "weights.safetensors is missing"
    if how == "large weights":
        (folder / WEIGHTS).write_bytes(b"")
        with open(folder / WEIGHTS, "r+b") as file:
            file.truncate(11_000_000)
        return r"weights.safetensors has 11.0 MB; at most 10 are loaded"
    if how == "large bundle":
        with open(folder / BUNDLE, "r+b") as file:
            file.truncate(10**12)
        return "bundle.json has 1,000,000.0 MB"
    if how == "no end":
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to("/dev/zero")
        return "weights.safetensors is missing"
    if how == "json":
        (folder / BUNDLE).write_bytes(b'{"format": 1,')
        return "JSONDecodeError"
    if how == "format":
        store.edit(name, format=7)
        return "has format 7"
    if how == "bomb":
        store.edit(name, x_shape=[10**9])
        return "x_shape"
    weights = b"\x08" + b"\0" * 7 + b"{}      "
    (folder / WEIGHTS).write_bytes(weights)
    store.edit(name, weights_sha256=hashlib.sha256(weights).hexdigest())
    return "does not fit the weights"


HOW = ["cut", "no weights", "large weights", "large bundle", "no end", "json", "format", "bomb"]


@pytest.mark.parametrize("how", [*HOW, "empty weights"])
@serving()
async def test_broken_bundles(models, store, how) -> None:
    word = broken(store, "two", how)
    fetched = store.loads("two")
    refused = await refusal_of(models, "two")
    assert refused.status == 409 and word in refused.detail
    assert str(store.root) not in refused.detail and len(refused.detail) <= 400
    if how.startswith("large") or how == "no end":
        assert store.loads("two") == fetched
    # It is not loaded again for as long as it is the same.
    loads = store.loads("two")
    for _ in range(5):
        again = await refusal_of(models, "two")
        assert (again.status, again.detail) == (409, refused.detail)
        await asyncio.sleep(REFRESH_S / 2)
    assert store.loads("two") == loads
    store.delete(f"models/two/{WEIGHTS}")
    store.model("two", seed=2)
    await until(lambda: time.monotonic() - models._refused["two"].looked > REFRESH_S)
    assert (await models.get("two")).id == "two"
    assert models._refused == {}


@serving(refresh_s=30.0)
async def test_a_broken_model_that_is_asked_for_often_costs_nothing(models, store) -> None:
    broken(store, "two", "cut")
    await asyncio.gather(*(refusal_of(models, "two") for _ in range(20)))
    before = len(store.asked)
    await asyncio.gather(*(refusal_of(models, "two") for _ in range(20)))
    assert store.loads("two") == 1 and len(store.asked) == before


@serving()
async def test_a_model_whose_draws_are_not_finite(models, store) -> None:
    content = json.loads(store.get(f"models/two/{BUNDLE}"))
    content["standardization"]["x_mean"] = [1e3] * 3  # of the scale asinh: no number has this one
    store.edit("two", standardization=content["standardization"])
    refused = await refusal_of(models, "two")
    assert refused.status == 409 and "not finite for an x like those" in refused.detail


# ---- the promoted one ---------------------------------------------------------------------------


@serving()
async def test_promotion_while_requests_come(models, store) -> None:
    """Each gets the one or the other, no one an error, and the new one is warm."""
    stop, got = asyncio.Event(), []

    async def asking() -> None:
        while not stop.is_set():
            model = await models.get("promoted")
            got.append(model.id)
            await asyncio.to_thread(model.posterior.draws, X, 2, 0)

    askers = [asyncio.create_task(asking()) for _ in range(4)]
    for name in ("two", "one", "two"):
        store.promote(name)
        await until(lambda name=name: models.promoted.id == name)
        await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*askers)
    changes = sum(one != other for one, other in pairwise(got))
    assert changes == 3 and got[0] == "one" and got[-1] == "two"
    # Going back takes no load: what was promoted before is still there.
    assert store.loads("one") == store.loads("two") == 1


@serving()
async def test_the_old_model_is_served_while_the_new_one_is_loaded(models, store) -> None:
    store.open.clear()
    store.promote("two")
    await until(lambda: store.loads("two"))
    for _ in range(5):
        assert (await models.get("promoted")).id == "one"
        await asyncio.sleep(0.01)
    store.open.set()
    await until(lambda: models.promoted.id == "two")


@pytest.mark.parametrize("how", HOW)
@serving()
async def test_a_broken_model_that_is_promoted(models, store, how) -> None:
    word = broken(store, "two", how)
    store.promote("two")
    await until(lambda: models.promotion_problem)
    assert word in models.promotion_problem
    assert (await models.get("promoted")).id == "one"
    loads = store.loads("two")
    await looked(models)
    assert store.loads("two") == loads
    await until(lambda: time.monotonic() - models._listed_at > REFRESH_S)
    listed = {each["model"]: each for each in await models.listed()}
    assert listed["one"]["promoted"] and not listed["two"]["promoted"]
    assert word in listed["two"]["refused"]
    # Repaired in place, it is served; and so it is after a rollback.
    store.delete(f"models/two/{WEIGHTS}")
    store.model("two", seed=2)
    await until(lambda: models.promoted.id == "two")
    assert models.promotion_problem is None


@serving()
async def test_rollback_from_a_broken_model(models, store) -> None:
    broken(store, "two", "cut")
    store.promote("two")
    await until(lambda: models.promotion_problem)
    store.promote("one")
    await until(lambda: models.promotion_problem is None)
    assert models.promoted.id == "one" and store.loads("one") == 1


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[]", b"null", b"\xff", b'{"model": 3}', b'{"model": "../two"}'),
        *(b'{"model": ".."}', b'{"model": "two/"}', b'{"model": "/etc/passwd"}', b"[" * 100_000),
        *(b'{"model": "three"}', b'{"model": "' + b"x" * 10**6 + b'"}', b" " * 2_000_000),
    ],
    ids=range(14),
)
@serving()
async def test_a_promotion_of_nothing(models, store, content) -> None:
    store.put(PROMOTED, content)
    await until(lambda: models.promotion_problem)
    problem = models.promotion_problem
    assert "promoted.json" in problem or "'three'" in problem
    assert len(problem) < 400 and str(store.root) not in problem
    assert (await models.get("promoted")).id == "one"
    await looked(models)
    assert models.promotion_problem == problem
    asked = {key for _, key in store.asked}
    assert not any("passwd" in key or ".." in key for key in asked)
    store.promote("two")
    await until(lambda: models.promoted.id == "two")
    assert models.promotion_problem is None


@serving()
async def test_a_promotion_that_is_gone(models, store) -> None:
    store.delete(PROMOTED)
    await until(lambda: models.promotion_problem)
    assert "promoted.json is gone" in models.promotion_problem
    assert (await models.get("promoted")).id == "one"
    store.promote("one")
    await until(lambda: models.promotion_problem is None)


@serving()
async def test_a_promoted_model_that_is_deleted_is_served_on(models, store) -> None:
    shutil.rmtree(store.root / "models")
    await looked(models)
    assert (await models.get("promoted")).id == "one"
    same = models.promoted.posterior.draws(X, 3, 0)[0]
    assert torch.isfinite(same).all()


# ---- what changes in the store ------------------------------------------------------------------


@serving()
async def test_a_model_that_is_stored_anew(models, store) -> None:
    one, two = await models.get("one"), await models.get("two")
    for name, old in (("one", one), ("two", two)):
        store.model(name, seed=7)
        await until(lambda name=name, old=old: models.ready(name) is not old)
        new = models.ready(name)
        same_draws(new, store, name)
        assert not torch.equal(new.posterior.draws(X, 5, 3)[0], old.posterior.draws(X, 5, 3)[0])
    assert models.promoted is models.ready("one")


@serving()
async def test_a_model_that_is_stored_anew_and_broken_is_served_as_it_was(models, store) -> None:
    two, promoted = await models.get("two"), models.promoted
    for name in ("one", "two"):
        broken(store, name, "json")
    await until(lambda: len(models._refused) == 2)
    assert models.ready("two") is two and models.promoted is promoted
    listed = {each["model"]: each for each in await models.listed()}
    assert listed["two"]["loaded"] and "JSONDecodeError" in listed["two"]["refused"]


@serving()
async def test_a_model_that_is_deleted_is_no_more(models, store) -> None:
    await models.get("two")
    shutil.rmtree(store.root / "models" / "two")
    await until(lambda: models.ready("two") is None)
    assert (await refusal_of(models, "two")).status == 404


@serving()
async def test_the_verdict_of_calibration(models, store) -> None:
    store.edit("two", calibration={"verdict": "warn", "summary": "a  little\nnarrow"})
    two = await models.get("two")
    assert (two.verdict, two.verdict_summary) == ("warn", "a little narrow")
    # Written later, for the promoted one as well.
    for name in ("two", "one"):
        store.judge(name, "pass", "all ranks are even")
        await until(lambda name=name: models.ready(name).verdict == "pass")
        assert models.ready(name).verdict_summary == "all ranks are even"
    assert models.promoted is models.ready("one") and models.promoted.verdict == "pass"
    assert models.ready("two").posterior is two.posterior and store.loads("two") == 1
    store.judge("two", "fail", "x" * 10**4)
    await until(lambda: models.ready("two").verdict == "fail")
    assert len(models.ready("two").verdict_summary) == 1000
    store.delete("calibration/two/calibration.json")
    await until(lambda: models.ready("two").verdict == "warn")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"verdict": "perfect"}', b'{"verdict": ["pass"]}', b"[" * 10**5, b"\xff", b"3"],
)
@serving()
async def test_what_is_no_verdict(models, store, content) -> None:
    store.put("calibration/two/calibration.json", content)
    assert (await models.get("two")).verdict == "none"


# ---- memory -------------------------------------------------------------------------------------


@serving(memory_mb=0.001)
async def test_the_promoted_model_is_never_evicted(models, store) -> None:
    for number in range(3):
        store.model(f"m{number}", seed=number)
        await models.get(f"m{number}")
        assert [each.id for each in models.loaded] == ["one", f"m{number}"]
    store.promote("two")
    await until(lambda: models.promoted.id == "two")
    assert [each.id for each in models.loaded] == ["two"]
    assert store.loads("one") == 1
    assert (await models.get("one")).id == "one" and store.loads("one") == 2


def test_the_one_used_longest_ago_makes_room(store) -> None:
    for number in range(4):
        store.model(f"m{number}", seed=number)

    @serving(refresh_s=30.0)
    async def of_one(models: Models, store: Watched) -> None:
        sizes.append(models.promoted.num_bytes)

    sizes: list[int] = []
    of_one(store=store)

    @serving(memory_mb=3.5 * sizes[0] / 1e6, refresh_s=30.0)
    async def scenario(models: Models, store: Watched) -> None:
        held = await models.get("m0")
        gone = weakref.ref(held.posterior)
        await models.get("m1")
        await models.get("m0")  # used again
        await models.get("m2")
        assert {each.id for each in models.loaded} == {"one", "m0", "m2"}
        models.ready("m2")
        await models.get("m3")
        assert {each.id for each in models.loaded} == {"one", "m2", "m3"}
        assert models.num_bytes <= 3.5 * sizes[0]
        # A request that has it goes on with it, and then its memory is free.
        assert torch.isfinite(held.posterior.draws(X, 3, 0)[0]).all()
        del held
        gc.collect()
        assert gone() is None

    scenario(store=store)


# ---- a store that fails -------------------------------------------------------------------------


def test_a_store_that_fails(store) -> None:
    events: list[tuple[str, str]] = []

    @serving(on_event=lambda *event: events.append(event))
    async def scenario(models: Models, store: Watched) -> None:
        await models.listed()
        store.out_of_reach = True
        refused = await refusal_of(models, "two")
        assert refused.status == 503 and refused.retry_after
        assert "secret" not in refused.detail and str(store.root) not in refused.detail
        await looked(models)
        assert (await models.get("promoted")).id == (await models.get("one")).id == "one"
        assert [each["model"] for each in await models.listed()] == ["one", "two"]
        store.promote("two")
        await looked(models)
        assert models.promoted.id == "one"
        store.out_of_reach = False
        await until(lambda: models.promoted.id == "two")

    scenario(store=store)
    kinds = [kind for kind, _ in events]
    assert kinds[0] == kinds[-1] == "ok" and set(kinds[1:-1]) == {"unreachable"}


def test_a_store_that_fails_when_the_service_starts(store) -> None:
    store.out_of_reach = True

    @serving()
    async def scenario(models: Models, store: Watched) -> None:
        for name in ("promoted", "two"):
            refused = await refusal_of(models, name)
            assert refused.status == 503 and refused.retry_after
        with pytest.raises(Refusal) as raised:
            await models.listed()
        assert raised.value.status == 503
        store.out_of_reach = False
        await until(lambda: models.promoted)
        assert [each["model"] for each in await models.listed()] == ["one", "two"]

    scenario(store=store)


def test_a_store_that_hangs_does_not_hold_up_the_end(store) -> None:
    async def scenario() -> None:
        models = Models(store, memory_mb=100, largest_model_mb=10, refresh_s=0.05)
        await models.start()
        store.open.clear()
        asking = asyncio.create_task(models.get("two"))
        await until(lambda: store.loads("two"))
        began = time.monotonic()
        await models.close()
        assert time.monotonic() - began < 2
        with pytest.raises(asyncio.CancelledError):
            await asking

    try:
        asyncio.run(scenario())
    finally:
        store.open.set()
