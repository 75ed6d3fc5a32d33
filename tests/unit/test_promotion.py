"""Which model is in use, by what calibration said of the models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.promotion import Promotion, calibration_key
from sbi_dist.serving.stored import Stored
from sbi_dist.store import LocalStore
from tests.unit.test_untrusted_bundle import made


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def judge(store: LocalStore, model: str, verdict: str) -> None:
    tests = [{"name": "sbc", "verdict": verdict}, {"name": "tarp", "verdict": "pass"}]
    found = {"verdict": verdict, "summary": f"it is a {verdict}", "tests": tests}
    store.put(calibration_key(model), json.dumps(found).encode())


def test_a_new_model_is_in_use_where_none_was_checked(store) -> None:
    promotion = Promotion(store)
    assert promotion.model is None and promotion.former is None
    assert promotion.trained("one") and promotion.model == "one"
    assert promotion.trained("two") and (promotion.model, promotion.former) == ("two", "one")
    assert promotion.trained("two") and promotion.former == "one"


@pytest.mark.parametrize("verdict", ["pass", "warn"])
def test_one_that_passed_is_replaced_by_one_that_passes(store, verdict) -> None:
    promotion = Promotion(store)
    promotion.trained("one")
    judge(store, "one", verdict)
    assert not promotion.trained("two") and promotion.model == "one"
    assert promotion.trained("one")
    judge(store, "two", "fail")
    assert not promotion.trained("two") and promotion.model == "one"
    judge(store, "two", "warn")
    assert promotion.trained("two") and promotion.model == "two"


def test_one_that_failed_is_replaced_by_any(store) -> None:
    promotion = Promotion(store)
    promotion.trained("one")
    judge(store, "one", "fail")
    assert promotion.trained("two") and promotion.model == "two"


def test_one_that_fails_gives_way_to_the_one_before(store) -> None:
    promotion = Promotion(store)
    for model in ("one", "two"):
        promotion.trained(model)
    assert promotion.failed("three") == "two"
    judge(store, "two", "fail")
    assert promotion.failed("two") == "one" and promotion.model == "one"
    judge(store, "one", "fail")
    assert promotion.failed("one") is None and promotion.model is None
    save_bundle(store.child("models/one"), made(seed=1), {})
    assert re.search(r"one failed its calibration \(sbc\).*--force", promotion.why_none())
    assert not promotion.trained("one") and promotion.model is None
    assert promotion.trained("three")


def test_the_last_one_that_passed_is_never_forgotten(store) -> None:
    promotion = Promotion(store)
    for model, verdict in (("good", "pass"), ("bad", "fail")):
        judge(store, model, verdict)
        promotion.put(model)  # the second one by force
    assert promotion.trained("new") and promotion.former == "good"
    judge(store, "new", "fail")
    assert promotion.failed("new") == "good" and promotion.model == "good"
    assert promotion.former is None


def test_by_hand_it_takes_force(store) -> None:
    promotion = Promotion(store)
    save_bundle(store.child("models/one"), made(seed=1), {})
    judge(store, "one", "fail")
    with pytest.raises(InputError, match=r"failed its calibration \(sbc\).*--force"):
        promotion.choose("one", force=False)
    assert promotion.model is None
    assert promotion.choose("one", force=True) == "one" and promotion.model == "one"


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b'{"model": 3}', b'"one"', b"\xff"])
def test_what_is_damaged_counts_as_nothing(store, damaged) -> None:
    store.put(PROMOTED, damaged)
    store.put(calibration_key("one"), damaged)
    promotion = Promotion(store)
    assert promotion.model is None and promotion.verdict("one") is None
    assert promotion.trained("one") and promotion.model == "one"


def test_the_service_reads_the_same_verdict(store) -> None:
    judge(store, "one", "warn")
    assert Stored(store, 1.0).verdict("one") == ("warn", "it is a warn")
