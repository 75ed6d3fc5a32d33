"""The client of an S3 server: its settings, made once in each process and shared by all stores.

What is asked of the server is in :mod:`sbi_dist.store.s3`. Credentials are read by boto3 from the
process's own environment and profiles; nothing here keeps, ships or shows them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from typing import Any
from urllib.parse import urlsplit

from sbi_dist.errors import InputError
from sbi_dist.store.s3_retry import Outage

__all__ = ["Link", "Settings", "connect"]

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
CONNECTIONS = 64
DEFAULT_REGION = "us-east-1"

# A server must say that it wants the body of a larger request before that is sent.
EXPECT_BYTES = 128 * 2**10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a store takes along to another process, used there where that has none of its own."""

    endpoint: str | None = None
    region: str | None = None


@dataclasses.dataclass
class Link:
    """A client, and what this process has learnt about its server.

    Attributes:
        client: boto3's client, which threads may share.
        settings: the endpoint and region that were set, for stores that are shipped from here.
        conditional: False once the server has refused If-None-Match.
        buckets: those that have answered a request.
        outage: says that the server does not answer.
    """

    client: Any
    settings: Settings
    conditional: bool = True
    buckets: set[str] = dataclasses.field(default_factory=set)
    outage: Outage = dataclasses.field(default_factory=Outage)

    @property
    def endpoint(self) -> str:
        return self.client.meta.endpoint_url

    def redact(self, text: str) -> str:
        """A server's words without the credentials that they may repeat."""
        try:
            # No public way leads from a client to the credentials that it signs with.
            used = self.client._request_signer._credentials.get_frozen_credentials()
        except Exception:
            return ""
        for secret in (used.access_key, used.secret_key, used.token):
            if secret:
                text = text.replace(secret, "***")
        return text


_links: dict[tuple[object, ...], Link] = {}
_lock = threading.Lock()


def _forget() -> None:
    """A forked child must not use its parent's sockets, nor wait for a lock that nobody frees."""
    global _lock
    _lock = threading.Lock()
    _links.clear()


os.register_at_fork(after_in_child=_forget)


def connect(settings: Settings) -> Link:
    """This process's link for these settings.

    Raises:
        InputError: the environment or profile can't be used.
    """
    # With the environment, so that corrected credentials are used without a new process.
    used = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (settings, hashlib.sha256(repr(used).encode(errors="surrogateescape")).digest())
    link = _links.get(key)
    if link is None:
        with _lock:
            link = _links.get(key)
            if link is None:
                link = _links[key] = _build(settings)
    return link


def _build(settings: Settings) -> Link:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    from sbi_dist.store.s3_errors import configuration_refusal

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},  # the one policy of retries is in s3_retry
        tcp_keepalive=True,
    )
    try:
        session = boto3.session.Session()
        # Other programs read AWS_REGION, botocore only AWS_DEFAULT_REGION.
        region = os.environ.get("AWS_REGION") or session.region_name or settings.region

        def client(endpoint: str | None = None, **more: Any) -> Any:
            merged = config.merge(Config(**more))
            return session.client(
                "s3", region_name=region or DEFAULT_REGION, endpoint_url=endpoint, config=merged
            )

        made = client()
        default = client(ignore_configured_endpoint_urls=True).meta.endpoint_url
        endpoint: str | None = made.meta.endpoint_url
        if endpoint == default:
            endpoint = settings.endpoint
            if endpoint is not None:
                made = client(endpoint)
    except (BotoCoreError, ValueError) as error:
        raise configuration_refusal(error) from None
    parts = urlsplit(made.meta.endpoint_url)
    if "@" in parts.netloc:
        raise InputError(
            "the S3 endpoint URL holds a user name; give only the server in AWS_ENDPOINT_URL_S3, "
            "and the key in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if parts.scheme == "https" and bundle and not os.path.exists(bundle):
        raise InputError(
            f"AWS_CA_BUNDLE is {bundle!r}, where there is no file; correct or unset it"
        )
    made.meta.events.register("before-send.s3", _without_waiting)
    return Link(made, Settings(endpoint, region))


def _without_waiting(request: Any, **_: Any) -> None:
    """Send a small body at once, which saves a round trip.

    It also keeps botocore from waiting for ever on a connection that is lost in that moment.
    """
    headers = request.headers
    length = headers.get("X-Amz-Decoded-Content-Length") or headers.get("Content-Length") or 0
    if "Expect" in headers and int(length) <= EXPECT_BYTES:
        del headers["Expect"]
