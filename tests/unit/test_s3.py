"""Stores in buckets, before a server that answers as told: faults, refusals, and what travels.

What stores in buckets have in common with directories is in test_store.py.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import email.utils
import os
import pickle
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sbi_dist.catalog.source import open_catalog
from sbi_dist.errors import InputError, StageError
from sbi_dist.store import S3Store, open_store, s3, s3_client, s3_retry

KEY_ID, SECRET, TOKEN = "KEYID-do-not-show", "SECRET-do-not-show", "TOKEN-do-not-show"


@dataclasses.dataclass
class Answer:
    """What the server answers.

    With ``cut``, so many bytes are left out and the connection ends; with -1, it does so before
    the length is told.
    """

    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    cut: int = 0
    wait_s: float = 0.0


@dataclasses.dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


LOST = Answer(status=0)  # the connection is reset without an answer


class Server:
    """An S3 server that gives the answers of a list, one for each request."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: list[Answer | Callable[[Seen], Answer]] = []
        self.requests: list[Seen] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # an answer goes out in one piece, without Nagle's delay

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, ssl.SSLError):
                    self.close_connection = True

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                seen = Seen(self.command, self.path, headers, self.rfile.read(length))
                server.requests.append(seen)
                answer = server.answers.pop(0) if server.answers else Answer(500)
                if callable(answer):
                    answer = answer(seen)
                if answer is LOST:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    self.connection.close()
                    return
                if answer.wait_s:
                    time.sleep(answer.wait_s)
                self.send_response_only(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.cut == -1:
                    self.flush_headers()
                    self.close_connection = True
                    return
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: len(answer.body) - answer.cut])
                self.close_connection = self.close_connection or bool(answer.cut)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    """Distinctive credentials, no profile, and short waits."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none/credentials")
    monkeypatch.setattr(s3_retry, "START_S", 0.001)
    monkeypatch.setattr(s3_retry, "BUSY_S", 0.001)
    monkeypatch.setattr(s3_retry, "CAP_S", 0.01)


@pytest.fixture
def server(running, monkeypatch) -> Server:
    running.answers, running.requests = [], []
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
    # The client is shared by the tests, for it takes long to make; what it has learnt is not.
    link = s3_client.connect(s3_client.Settings())
    link.conditional, link.outage = True, s3_retry.Outage()
    link.buckets.clear()
    return running


@pytest.fixture
def store(server) -> S3Store:
    return S3Store("bucket", "runs", patience_s=5.0)


def xml(code: str, status: int, message: str = "", more: str = "", **headers: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, named, b'<?xml version="1.0"?>' + body.encode())


def listing(*keys: str, token: str = "", folders: tuple[str, ...] = ()) -> Answer:
    items = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
    items += "".join(
        f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in folders
    )
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    body = (
        "<ListBucketResult><Name>bucket</Name>"
        f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>{more}{items}</ListBucketResult>"
    )
    return Answer(body=b'<?xml version="1.0"?>' + body.encode())


def written_by(request: Seen) -> dict[str, str]:
    """The metadata that a request gives its object."""
    return {n: v for n, v in request.headers.items() if n.startswith("x-amz-meta-")}


OK = Answer(body=b"content")
WRITTEN = Answer(headers={"ETag": '"e"'})
CRC = {"x-amz-checksum-crc32": base64.b64encode(struct.pack(">I", zlib.crc32(b"content"))).decode()}


def no_secret(text: str) -> None:
    for secret in (KEY_ID, SECRET, TOKEN):
        assert secret not in text


# ---- what passes --------------------------------------------------------------------------------

TRANSIENT = {
    "slow down": xml("SlowDown", 503),
    "busy": Answer(429),
    "internal error": xml("InternalError", 500),
    "error in HTML": Answer(502, {}, b"<html>bad gateway</html>"),
    "gateway timeout": Answer(504),
    "timeout": xml("RequestTimeout", 400),
    "lost": LOST,
}
READS = {
    "cut body": Answer(body=b"content", cut=3),
    "empty body": Answer(body=b"content", cut=7),
    "wrong checksum": Answer(headers=CRC, body=b"c0ntent"),
    "wrong digest": Answer(headers={"x-amz-meta-sha256": "0" * 64}, body=b"c0ntent"),
}


@pytest.mark.parametrize("fault", [*TRANSIENT, *READS])
def test_reads_are_tried_again(store, server, fault) -> None:
    server.answers = [{**TRANSIENT, **READS}[fault]] * 2 + [OK]
    assert store.get("a/k") == b"content"
    assert [(r.method, r.path) for r in server.requests] == [("GET", "/bucket/runs/a/k")] * 3


@pytest.mark.parametrize("fault", TRANSIENT)
def test_the_rest_is_tried_again(store, server, fault) -> None:
    failed = TRANSIENT[fault]
    server.answers = [failed, WRITTEN, failed, Answer(204), failed, listing("runs/a")]
    store.put("k", b"content")
    store.delete("k")
    assert list(store.list()) == ["a"]
    assert [r.method for r in server.requests] == ["PUT"] * 2 + ["DELETE"] * 2 + ["GET"] * 2
    assert server.requests[0].body == server.requests[1].body == b"content"


@pytest.mark.parametrize("fault", ["cut", "empty"])
def test_a_cut_listing_is_no_short_listing(store, server, fault) -> None:
    full = listing("runs/a", "runs/b")
    server.answers = [dataclasses.replace(full, cut=40 if fault == "cut" else len(full.body)), full]
    assert list(store.list()) == ["a", "b"]


def test_an_answer_cut_among_its_headers(store, server) -> None:
    """Python takes what has come for all of them, and the body for an empty one."""

    def cut(_: Seen) -> Answer:
        return Answer(cut=-1)

    server.answers = [cut, OK, cut, OK]
    assert store.get("k") == b"content" and store.get_tail("k", 3) == b"ent"


def test_a_cut_error(store, server) -> None:
    missing = xml("NoSuchKey", 404)
    cut = dataclasses.replace(missing, cut=50)
    server.answers = [cut, missing]
    with pytest.raises(KeyError):
        store.get("k")
    server.answers = [cut, OK]
    assert store.get("k") == b"content"
    server.answers = [Answer(404)] * 5  # of a server that gives no codes
    with pytest.raises(KeyError):
        store.get("k")
    server.answers = [Answer(403)] * 5
    with pytest.raises(InputError, match=r"may not read \(AccessDenied\)"):
        store.get("k")


def test_damaged_objects(store, server) -> None:
    server.answers = [READS["wrong digest"]] * 10
    with pytest.raises(StageError, match=r"s3://bucket/runs: k is damaged, .*; delete it, and"):
        store.get("k")
    assert len(server.requests) == s3.DAMAGED_TRIES


def test_tails(store, server) -> None:
    def part(words: str, body: bytes, cut: int = 0) -> Answer:
        return Answer(206, {"Content-Range": f"bytes {words}"}, body, cut)

    server.answers = [part("4-6/7", b"ent", cut=1), part("3-6/7", b"tent"), part("4-6/7", b"ent")]
    assert store.get_tail("k", 3) == b"ent"
    assert [r.headers["range"] for r in server.requests] == ["bytes=-3"] * 3
    server.answers = [OK]  # of a server that knows no ranges
    assert store.get_tail("k", 3) == b"ent"


def test_ranges(store, server) -> None:
    def part(words: str, body: bytes, cut: int = 0) -> Answer:
        return Answer(206, {"Content-Range": f"bytes {words}"}, body, cut)

    wrong = [part("2-4/7", b"nte", cut=1), part("0-2/7", b"con"), part("2-6/7", b"ntent")]
    server.answers = [*wrong, LOST, part("2-4/7", b"nte")]
    assert store.get_range("k", 2, 3) == b"nte"
    assert [r.headers["range"] for r in server.requests] == ["bytes=2-4"] * 5
    server.answers = [part("5-6/7", b"nt")]  # as far as the object goes
    assert store.get_range("k", 5, 3) == b"nt"
    server.answers = [xml("InvalidRange", 416)]
    assert store.get_range("k", 7, 3) == b""
    server.answers = [OK]  # of a server that knows no ranges
    assert store.get_range("k", 2, 3) == b"nte"
    server.answers = [xml("NoSuchKey", 404)]
    with pytest.raises(KeyError):
        store.get_range("k", 2, 3)


def test_identities(store, server) -> None:
    def first(tag: str | None, cut: int = 0) -> Answer:
        etag = {} if tag is None else {"ETag": f'"{tag}"'}
        return Answer(206, {"Content-Range": "bytes 0-0/7", **etag}, b"c", cut)

    server.answers = [first(None), first("e", cut=1), LOST, first("e")]
    assert store.identity("k") == (7, "e")
    assert [r.headers["range"] for r in server.requests] == ["bytes=0-0"] * 4
    server.answers = [Answer(200, {"ETag": '"e"'}, b"content")]  # that knows no ranges
    assert store.identity("k") == (7, "e")
    server.answers = [xml("InvalidRange", 416)]
    assert store.identity("k")[0] == 0
    server.answers = [xml("NoSuchKey", 404)]
    with pytest.raises(KeyError):
        store.identity("k")


def waits(monkeypatch, server, store, *answers: Answer) -> list[float]:
    """How long the store waits between these answers."""
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    server.answers = [*answers, OK]
    assert store.get("k") == b"content"
    return slept


def test_waits_grow_and_heed_the_server(store, server, monkeypatch) -> None:
    for name, value in (("START_S", 0.1), ("BUSY_S", 1.0), ("CAP_S", 15.0)):
        monkeypatch.setattr(s3_retry, name, value)
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda low, high: high)
    store.patience_s = 600.0
    error, busy = Answer(500), Answer(503)
    grown = waits(monkeypatch, server, store, *[error] * 10)
    assert grown == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]
    assert waits(monkeypatch, server, store, busy, busy, error) == [1.0, 2.0, 0.4]
    later = email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40)
    )
    for after, low, high in (("20", 20, 20), (later, 30, 40), ("9999", 60, 60), ("x", 1, 1)):
        (slept,) = waits(monkeypatch, server, store, Answer(503, {"Retry-After": after}))
        assert low <= slept <= high
    store.patience_s = 8.0  # and an attempt is made when it ends
    assert 7 < waits(monkeypatch, server, store, Answer(503, {"Retry-After": "20"}))[0] <= 8


# ---- patience -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_patience_ends(store, server, monkeypatch, capsys) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(s3_retry, "QUIET_S", 0.1)
    store.patience_s = 0.3
    calls = (
        (lambda: store.get("a"), "a can't be read"),
        (lambda: store.put("a", b""), "a can't be written"),
        (lambda: list(store.list("p")), "p can't be listed"),
    )
    for call, words in calls:
        started = time.monotonic()
        with pytest.raises(StageError) as caught:
            call()
        assert 0.25 < time.monotonic() - started < 3
        text = str(caught.value)
        assert text.startswith(f"store s3://bucket/runs: {words}, http://127.0.0.1:")
        assert "(Connection refused); what was stored before is kept, run the command" in text
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "store s3://bucket/runs does not answer (Connection refused); waiting up to 0.3 s for it"
    ]


def test_an_outage_is_told_once(capsys, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(s3_retry.time, "monotonic", lambda: now)
    outage = s3_retry.Outage()
    lines = 0
    for second, passes, more in (
        (0, False, 0),
        (1, True, 0),  # too short to mention
        (10, False, 0),
        (11, False, 0),
        (13, False, 1),
        (30, False, 0),
        (100, False, 0),
        (110, True, 1),
        (120, False, 0),
        (130, False, 1),
        (131, True, 1),
        (132, True, 0),
        (140, False, 0),
        (150, False, 0),  # too soon after the last one
    ):
        now = float(second)
        if passes:
            outage.passed("s3://b")
        else:
            outage.failed("s3://b", "timed out", 600.0)
        said = capsys.readouterr().err
        assert said.count("\n") == more, second
        lines += more
    assert lines == 4 and s3_retry.minutes(600.0) == "10 min"


def test_first_contact(store, server) -> None:
    server.answers = [listing("runs/a")]
    assert store.check() is None
    assert server.requests[0].path.startswith("/bucket?list-type=2&prefix=runs%2F&max-keys=1")
    assert len(server.requests) == 1


@pytest.mark.parametrize("case", ["refused", "unknown host", "silent", "lost"])
def test_no_first_contact(store, server, monkeypatch, case) -> None:
    monkeypatch.setattr(s3, "CHECK_PATIENCE_S", 0.2)
    # Making a client, which counts, takes half a second on a busy machine.
    monkeypatch.setattr(s3, "CHECK_S", 0.5 if case == "silent" else 10.0)
    server.answers = [Answer(wait_s=1.0)] if case == "silent" else [LOST] * 1000
    endpoint, words = {
        "refused": (f"http://127.0.0.1:{free_port()}", "Connection refused"),
        "unknown host": ("http://nowhere.invalid:9000", "the host name is not known|timed out"),
        "silent": (server.endpoint, "timed out"),
        "lost": (server.endpoint, "Connection reset by peer|connection lost"),
    }[case]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(
        InputError, match=rf"does not answer \(({words})\); check the server, and AWS_END"
    ) as caught:
        store.check()
    assert endpoint in str(caught.value)


# ---- put_if_absent ------------------------------------------------------------------------------

TAKEN = xml("PreconditionFailed", 412)


def test_conditional_writes(store, server) -> None:
    server.answers = [WRITTEN, TAKEN, xml("ConditionalRequestConflict", 409), WRITTEN]
    assert [store.put_if_absent("k", b"1") for _ in range(3)] == [True, False, True]
    assert {r.headers["if-none-match"] for r in server.requests} == {"*"}
    writers = [written_by(r)["x-amz-meta-write"] for r in server.requests]
    assert len(set(writers)) == 3 and writers[2] == writers[3]


@pytest.mark.parametrize("own", [True, False])
def test_a_write_whose_answer_was_lost(store, server, own) -> None:
    def there(_: Seen) -> Answer:
        kept = written_by(server.requests[0]) if own else {"x-amz-meta-write": "another"}
        return Answer(206, kept, b"1")

    server.answers = [LOST, TAKEN, there]
    assert store.put_if_absent("k", b"1") is own
    assert [r.method for r in server.requests] == ["PUT", "PUT", "GET"]
    server.requests.clear()
    server.answers = [LOST, TAKEN, Answer(416), there]  # an empty object
    assert store.put_if_absent("k", b"") is own
    assert [r.method for r in server.requests] == ["PUT", "PUT", "GET", "HEAD"]


@pytest.mark.parametrize(
    "lacking",
    [
        Answer(501),
        xml("NotImplemented", 501, "A header you provided implies functionality ..."),
        xml("InvalidArgument", 400, "If-None-Match is not supported"),
        xml("InvalidRequest", 400, more="<ArgumentName>If-None-Match</ArgumentName>"),
    ],
)
def test_servers_without_conditional_writes(store, server, lacking) -> None:
    server.answers = [lacking, Answer(404), xml("NoSuchKey", 404), WRITTEN]
    assert store.put_if_absent("k", b"1")
    assert [r.method for r in server.requests] == ["PUT", "HEAD", "GET", "PUT"]
    assert "if-none-match" not in server.requests[-1].headers
    server.answers = [Answer(), Answer(404), WRITTEN]  # which is remembered
    assert not store.child("c").put_if_absent("k", b"1")
    assert store.put_if_absent("k2", b"1")
    assert [r.method for r in server.requests[4:]] == ["HEAD", "HEAD", "PUT"]


# ---- refusals -----------------------------------------------------------------------------------


def skewed(minutes: float) -> Answer:
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    return xml("RequestTimeTooSkewed", 403, Date=email.utils.format_datetime(date))


ECHO = f"the key {KEY_ID} with {SECRET} and {TOKEN}"
REFUSED = {
    "bucket": (xml("NoSuchBucket", 404, ECHO), r"no bucket 'bucket' at http://127.* create it"),
    "key": (
        xml("InvalidAccessKeyId", 403, ECHO),
        "does not know the access key.*AWS_ACCESS_KEY_ID",
    ),
    "secret": (
        xml("SignatureDoesNotMatch", 403, ECHO, f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId>"),
        "secret key does not belong .*AWS_SECRET_ACCESS_KEY.*AWS_PROFILE",
    ),
    "token": (xml("InvalidToken", 400, ECHO), "session token is not valid"),
    "expired": (xml("ExpiredToken", 400, ECHO), "credentials have expired .*get new ones"),
    "clock behind": (
        lambda: skewed(17),
        r"clock is wrong .*, 1[67] min \d+ s behind the server's.*set the",
    ),
    "clock ahead": (lambda: skewed(-180), r"clock is wrong .*, 3 h 00 min ahead of the server's"),
    "name": (xml("InvalidBucketName", 400), "does not take 'bucket' as a bucket's name"),
    "no feature": (xml("NotImplemented", 501), "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    "other": (
        xml("KeyTooLongError", 400, f"too long: {ECHO}"),
        r"KeyTooLongError.*too long: the key \*\*\*",
    ),
}


def refused(server: Server, call: Callable[[], object], *answers: Any) -> str:
    """The sentence of a call that is refused with these answers, without another attempt."""
    server.answers, server.requests = list(answers), []
    with pytest.raises(InputError) as caught:
        call()
    assert len(server.requests) == len(answers)
    text = str(caught.value)
    assert "\n" not in text
    no_secret(text)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    no_secret(repr(caught.value))
    return text


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(store, server, case) -> None:
    answer, words = REFUSED[case]
    answer = answer() if callable(answer) else answer
    allowed = listing()  # asked once more, to tell whether the key may read
    for call, done, extra in (
        (lambda: store.get("k"), "k can't be read", ()),
        (lambda: store.put("k", b""), "k can't be written", (allowed,)),
        (lambda: list(store.list("p")), "p can't be listed", ()),
        (lambda: store.check(), "it can't be listed", ()),
    ):
        text = refused(server, call, answer, *extra)
        assert text.startswith(f"store s3://bucket/runs: {done}, as ")
        assert re.search(words, text), text


def test_missing_permissions(store, server) -> None:
    denied = xml("AccessDenied", 403, "User is not authorized")
    text = refused(server, lambda: store.put("k", b""), denied, listing())
    assert "the key in use may read but not write (AccessDenied); it needs s3:PutObject" in text
    text = refused(server, lambda: store.put("k", b""), denied, denied)
    assert "the key in use may not write (AccessDenied); it needs s3:PutObject" in text
    text = refused(server, lambda: store.delete("k"), denied, listing())
    assert "may read but not delete" in text and "s3:DeleteObject on bucket 'bucket'" in text
    text = refused(server, lambda: store.get("k"), denied)
    assert "may not read" in text and "s3:GetObject" in text and "s3:ListBucket" in text
    text = refused(server, lambda: store.folders(), denied)
    assert "may not list" in text and "s3:ListBucket on bucket 'bucket'" in text


@pytest.mark.parametrize("case", ["bucket", "key", "secret", "expired", "clock behind"])
def test_refusals_without_a_body(store, server, case) -> None:
    """HEAD is answered with a status only; the reason is found out."""
    answer, words = REFUSED[case]
    answer = answer() if callable(answer) else answer
    bare = [Answer(answer.status)]
    if answer.status == 400:
        bare *= 2  # boto3 also asks for the bucket's region
    text = refused(server, lambda: store.exists("k"), *bare, answer)
    assert re.search(words, text)
    server.answers = [Answer(403), xml("NoSuchKey", 404), Answer(403), OK]
    assert [store.exists("k"), store.exists("k")] == [False, True]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            xml("PermanentRedirect", 301, x_amz_bucket_region="eu-west-1"),
            "is not in region us-east-1 .*set AWS_REGION to eu-west-1$",
        ),
        (
            xml("AuthorizationHeaderMalformed", 400, more="<Region>eu-north-1</Region>"),
            "is not in region us-east-1 .*set AWS_REGION to eu-north-1$",
        ),
        (xml("PermanentRedirect", 301), "to the bucket's own region, or AWS_ENDPOINT_URL_S3"),
    ],
)
def test_another_region(store, server, answer, words) -> None:
    # boto3 follows such answers itself where it can, so how many requests it makes is its matter.
    server.answers = [answer] * 6
    with pytest.raises(InputError, match=words):
        store.get("k")


# ---- settings of this machine -------------------------------------------------------------------


def test_credentials_that_are_not_there(store, server, monkeypatch) -> None:
    for name in ("AWS_SESSION_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match="credentials are incomplete; set both AWS_ACC") as e:
        store.get("k")
    no_secret(str(e.value))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    for call in (lambda: store.get("k"), store.check, lambda: store.put("k", b"")):
        with pytest.raises(InputError, match="no S3 credentials are set; set AWS_ACCESS_KEY_ID"):
            call()
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(InputError, match=r"other.*could not be found; correct AWS_PROFILE"):
        store.get("k")
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL_S3", "localhost:9000", "settings can't be used.*AWS_ENDPOINT_URL_S3"),
        ("AWS_ENDPOINT_URL_S3", f"http://{KEY_ID}:{SECRET}@host", "URL holds a user name"),
        ("AWS_REGION", "no such region", "settings can't be used.*AWS_REGION"),
        ("AWS_CA_BUNDLE", "/none.pem", "AWS_CA_BUNDLE is '/none.pem', where there is no file"),
    ],
)
def test_settings_that_cannot_be_used(monkeypatch, name, value, words) -> None:
    monkeypatch.setenv(name, value)
    for call in (lambda s: s.get("k"), S3Store.check):
        with pytest.raises(InputError, match=words) as caught:
            call(S3Store("bucket"))
        no_secret(str(caught.value))


def test_a_profile_gives_everything(running, monkeypatch, tmp_path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nregion = eu-west-3\nendpoint_url = {running.endpoint}\n"
        "aws_access_key_id = labkey\naws_secret_access_key = labsecret\n"
        "s3 =\n  addressing_style = virtual\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    link = s3_client.connect(s3_client.Settings())
    assert link.settings == s3_client.Settings(running.endpoint, "eu-west-3")
    assert link.client.meta.config.s3 == {"addressing_style": "virtual"}
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert s3_client.connect(s3_client.Settings()).client.meta.region_name == "eu-west-1"


def test_untrusted_certificates(monkeypatch, tmp_path, server) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    secure = Server(context)
    store = S3Store("bucket", patience_s=5.0)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://localhost:{secure.port}")
        for call in (lambda: store.get("k"), store.check):
            with pytest.raises(InputError, match=r"TLS .*certificate verify failed.*AWS_CA_BUNDLE"):
                call()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(pem))
        secure.answers = [OK]
        assert store.get("k") == b"content"
    finally:
        secure.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint.replace("http", "https"))
    with pytest.raises(InputError, match=r"does not speak it there; is the URL one with http\?"):
        store.get("k")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "bucket '' is no valid name"),
        ("s3:///x", "bucket '' is no valid name"),
        ("s3:bucket", "bucket '' is no valid name"),
        ("s3://Bucket_1/x", "3 to 63 lower-case letters"),
        ("s3://a..b/x", "bucket 'a..b' is no valid name"),
        ("s3://bucket/a/../b", "prefix 'a/../b' is not a plain relative path"),
        ("s3://bucket//a", "prefix '/a' is not a plain relative path"),
        ("s3://bucket/a?versionId=1", "'s3://bucket/a' with a query"),
        ("s3://bucket/a#b", "with a query or fragment"),
        (f"s3://{KEY_ID}:{SECRET}@bucket/a", "with a user name; give s3://bucket/prefix"),
        (f"https://{KEY_ID}:{SECRET}@host/a", "allowed is a directory"),
    ],
)
def test_uris_that_are_none(uri, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_store(uri)
    no_secret(str(caught.value))


def test_uris() -> None:
    for given, kept in (("s3://bucket", ""), ("s3://bucket/", ""), ("S3://bucket/a/b ä/", "a/b ä")):
        store = open_store(given, 7.0)
        assert isinstance(store, S3Store)
        assert (store.bucket, store.prefix, store.patience_s) == ("bucket", kept, 7.0)
        assert store.uri == (f"s3://bucket/{kept}" if kept else "s3://bucket")
        assert open_store(store.uri).uri == store.uri
        assert store.child("x/y").patience_s == 7.0


# ---- what travels -------------------------------------------------------------------------------


def test_what_a_store_takes_along(store, server, monkeypatch) -> None:
    server.answers = [OK] * 3
    assert store.get("k") == b"content"  # the client is made
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    data = pickle.dumps(store)
    no_secret(data.decode("latin-1"))
    no_secret(repr(store) + repr(store.__dict__))
    assert server.endpoint.encode() in data and b"eu-west-1" in data and len(data) < 1000

    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    other = pickle.loads(data)
    assert other.patience_s == store.patience_s and other.get("k") == b"content"
    link = s3_client.connect(other.child("c")._settings)
    assert link.endpoint == server.endpoint and link.client.meta.region_name == "eu-west-1"
    assert pickle.loads(pickle.dumps(other)).get("k") == b"content"  # and on from there

    # What the process has itself comes first.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://own.invalid")
    monkeypatch.setenv("AWS_REGION", "eu-west-2")
    link = s3_client.connect(other._settings)
    assert link.endpoint == "http://own.invalid" and link.client.meta.region_name == "eu-west-2"


def test_one_client_in_a_process(store, server, monkeypatch) -> None:
    def client(of: S3Store) -> Any:
        return s3_client.connect(of._settings).client

    first = client(store)
    assert client(store.child("a")) is first is client(S3Store("other"))
    assert first.meta.config.max_pool_connections >= 32
    found: list[Any] = []
    s3_client._links.clear()
    threads = [threading.Thread(target=lambda: found.append(client(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "corrected")
    assert client(store) is not found[0]


def test_a_forked_child_makes_its_own_client(store, server) -> None:
    server.answers = [OK, OK]
    assert store.get("k") == b"content"
    before = s3_client.connect(store._settings).client
    s3_client._lock.acquire()  # as by another thread at the moment of the fork
    try:
        child = os.fork()
        if child == 0:
            good = s3_client.connect(store._settings).client is not before
            os._exit(0 if good and store.get("k") == b"content" else 1)
    finally:
        s3_client._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- listing ------------------------------------------------------------------------------------


def test_listing_by_pages(store, server) -> None:
    server.answers = [
        listing("runs/", "runs/a", "runs/b/", "runs/b/c", token="1"),
        listing(token="2"),
        listing("runs/d"),
    ]
    assert list(store.list()) == ["a", "b/c", "d"]  # without what stands for folders
    assert ["continuation-token=2" in r.path for r in server.requests] == [False, False, True]
    server.answers = [
        listing(folders=("runs/b/", "runs/a/"), token="1"),
        listing(folders=("runs/c/",)),
    ]
    assert store.folders() == ["a", "b", "c"]
    assert all("delimiter=%2F" in r.path for r in server.requests[-2:])


def test_listing_does_not_read_ahead(store, server) -> None:
    server.answers = [listing("runs/x/1", "runs/x/2", token="1"), listing("runs/x/3")]
    keys = store.list("x/")
    assert next(keys) == "x/1" and len(server.requests) == 1
    assert list(keys) == ["x/2", "x/3"]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("order", ["by bytes", "by folder"])
def test_listing_is_in_order(store, server, size, order) -> None:
    """Also of servers that list folder by folder."""
    keys = "a/b a/b-c/d a/b/c a-b a-b/c a.c a0 b/a b/a-b b/a/c b b-/x c/d/e/f c/d/e-f c/d-e".split()
    key = (lambda name: name.split("/")) if order == "by folder" else None
    names = [f"runs/{name}" for name in sorted(keys, key=key)]
    pages = [names[start : start + size] for start in range(0, len(names), size)]
    server.answers = [
        listing(*page, token="more" if number < len(pages) else "")
        for number, page in enumerate(pages, 1)
    ]
    assert list(store.list()) == sorted(keys)


# ---- large objects ------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 10)
    monkeypatch.setattr(s3, "PART_BYTES", 8)
    monkeypatch.setattr(s3, "PART_THREADS", 1)


BEGUN = Answer(
    body=b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"
)
COMPLETE = Answer(
    body=b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
)
PART = Answer(headers={"ETag": '"p"', "x-amz-checksum-crc32": "AAAAAA=="})
DATA = b"0123456789abcdefXYZ"


def test_objects_in_parts(store, server, small_parts) -> None:
    server.answers = [BEGUN, PART, LOST, PART, PART, Answer(500), COMPLETE]
    store.put("k", DATA)
    parts = [r for r in server.requests if "partNumber" in r.path]
    assert [r.body for r in parts] == [DATA[:8], DATA[8:16], DATA[8:16], DATA[16:]]
    assert b"<ChecksumCRC32>AAAAAA==</ChecksumCRC32>" in server.requests[-1].body
    assert written_by(server.requests[0])["x-amz-meta-sha256"]


def test_a_failure_in_parts_leaves_none(store, server, small_parts) -> None:
    server.answers = [BEGUN, PART, xml("NoSuchBucket", 404), listing(), Answer(204)]
    with pytest.raises(InputError, match="no bucket 'bucket'"):
        store.put("k", DATA)
    assert server.answers == [] and len(server.requests) == 5  # the last part was not sent
    assert server.requests[-1].method == "DELETE" and "uploadId=u1" in server.requests[-1].path


def test_parts_if_absent(store, server, small_parts) -> None:
    server.answers = [xml("NoSuchKey", 404)]
    with pytest.raises(KeyError):
        store.get("k")
    server.requests.clear()
    server.answers = [Answer(200)]
    assert not store.put_if_absent("k", DATA) and len(server.requests) == 1  # nothing was sent
    server.answers = [Answer(404), BEGUN, PART, PART, PART, TAKEN, Answer(204)]
    assert not store.put_if_absent("k", DATA)
    assert server.requests[-2].headers["if-none-match"] == "*"
    assert server.requests[-1].method == "DELETE"
    server.answers = [Answer(404), BEGUN, PART, PART, PART, COMPLETE]
    assert store.put_if_absent("k", DATA)


@pytest.mark.parametrize("again", ["taken", "gone"])
def test_a_completion_whose_answer_was_lost(store, server, small_parts, again) -> None:
    def there(_: Seen) -> Answer:
        return Answer(206, written_by(server.requests[1]), b"0")

    second = TAKEN if again == "taken" else xml("NoSuchUpload", 404)
    server.answers = [Answer(404), BEGUN, PART, PART, PART, LOST, second, there]
    s3_client.connect(store._settings).buckets.add("bucket")
    assert store.put_if_absent("k", DATA)


# ---- catalogs -----------------------------------------------------------------------------------


def test_a_catalog_in_a_bucket(server) -> None:
    content = b"a,b\n1,2\n3,4\n"
    size = {"Content-Range": f"bytes 0-0/{len(content)}", "ETag": '"e"'}
    whole = {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"}
    server.answers = [Answer(206, size, b"a"), Answer(206, whole, content)]
    catalog = open_catalog("s3://bucket/some folder/obs.csv", (2,))
    assert catalog.read(0, 2).x.tolist() == [[1, 2], [3, 4]] and catalog.name.startswith("obs-")
    assert server.requests[0].path == "/bucket/some%20folder/obs.csv"
    for uri, words in (
        ("s3://bucket/none.csv", "there is no such object"),
        ("s3://bucket/", "not a plain relative path"),
        ("s3://obs.csv", "bucket '' is no valid name"),
        ("s3://bucket//obs.csv", "prefix|plain relative path|no such object"),
    ):
        server.answers = [xml("NoSuchKey", 404)]
        with pytest.raises(InputError, match=rf"--observations {uri}: .*({words})"):
            open_catalog(uri, (2,))
