"""Requests made up from the service's own OpenAPI document: no answer but those it describes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from sbi_dist.estimation.bundle import save_bundle
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.serving.app import make_app
from sbi_dist.serving.options import ServeOptions
from sbi_dist.serving.service import Service
from sbi_dist.store import LocalStore
from tests.services.browser import serving

load_all_checks()
EXAMPLES = 25


@pytest.fixture(scope="module")
def interface(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (100, 2)).astype(np.float32)
    ends = np.full(2, 2.0)
    standardization = Standardization.fit(theta, theta + 1, -ends, ends, "linear")
    options = TrainOptions(transforms=1, hidden_features=8, blocks=1)
    estimator = DensityEstimator(options, standardization, (2,)).eval()
    store = LocalStore(Path(tmp_path_factory.mktemp("store")))
    save_bundle(store.child("models/m1"), estimator, {})
    store.put(PROMOTED, b'{"model": "m1"}')
    service = Service(store, "made-up", ServeOptions(max_draws=10_000, max_total_draws=100_000))
    with serving(make_app(service)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    assert service.memory.used == 0 and service.queue.requests == 0


def test_answers_are_those_that_are_described(interface: Any) -> None:
    operations = [found.ok() for found in interface.get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:
        _check(operation)


def _check(operation: Any) -> None:
    @given(case=operation.as_strategy(), promoted=st.booleans())
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def check(case: Any, promoted: bool) -> None:
        if promoted and "model" in (case.path_parameters or {}):
            case.path_parameters["model"] = "promoted"
        # A time so short that it is rightly up (504) is no server's error.
        if case.headers:
            case.headers.pop("X-Timeout-S", None)
        response = case.call()
        assert response.status_code < 500 or response.status_code == 503, response.text
        # No schema can say that lengths of data have to agree.
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    check()
