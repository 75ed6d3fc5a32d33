"""One S3 server for the whole session, a network before it that fails, and a browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sbi_dist.store import S3Store
from tests.services.proxy import Proxy
from tests.services.s3_server import NotStarted, S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    try:
        server = S3Server()
    except NotStarted as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"the S3 server does not start: {error}")
        pytest.skip(f"the S3 server does not start: {error}")
    yield server
    server.stop()


@pytest.fixture
def become(s3_server, monkeypatch) -> Callable[..., None]:
    """Take on an identity of the server's in this process."""

    def change(identity: str, endpoint: str | None = None) -> None:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                monkeypatch.delenv(name)
        for name, value in s3_server.environment_of(identity).items():
            monkeypatch.setenv(name, value)
        if endpoint is not None:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)

    change("admin")
    return change


@pytest.fixture
def store(s3_server, become, request) -> S3Store:
    """An empty store with all rights."""
    return S3Store(s3_server.bucket, f"tests/{request.node.name}", patience_s=60.0)


@pytest.fixture
def proxy(s3_server) -> Iterator[Proxy]:
    running = Proxy(s3_server.port)
    yield running
    running.down()


@pytest.fixture(scope="module")  # as its event loop keeps others from running
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    missing = ""
    try:
        from tests.services.browser import CHROMIUM, chromium
    except ImportError as error:
        missing = str(error)
    else:
        missing = "" if CHROMIUM else "there is no program chromium"
    if missing:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no browser: {missing}")
        pytest.skip(f"no browser: {missing}")
    with chromium() as running:
        yield running
