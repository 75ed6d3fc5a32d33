"""A store in a bucket of S3, or of a server with its interface.

What is asked of the server for each operation is here; the client is made in
:mod:`sbi_dist.store.s3_client`, how long to try is in :mod:`sbi_dist.store.s3_retry`, and what is
said of refusals in :mod:`sbi_dist.store.s3_errors`.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sbi_dist.errors import InputError, StageError
from sbi_dist.store.s3_client import Link, Settings, connect
from sbi_dist.store.s3_errors import Request, refusal
from sbi_dist.store.s3_retry import Impatient, Pause, Transient, minutes, persist, transient

__all__ = ["S3Store"]

T = TypeVar("T")

# Larger objects are sent in parts, so many at once.
MULTIPART_BYTES = 64 * 2**20
PART_BYTES = 16 * 2**20
PART_THREADS = 4
MAX_PARTS = 10_000

# How long the first contact may take in all, and how long it is tried.
CHECK_S = 14.0
CHECK_PATIENCE_S = 6.0

# An object that arrives with wrong content this often is damaged where it is stored.
DAMAGED_TRIES = 5

# An error without a code is asked about this often: its answer may have been cut off.
NAMELESS_TRIES = 5

# Kept with each object: a digest for readers, and who wrote it, for a writer whose answer was lost.
_DIGEST, _WRITER = "sha256", "write"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_NO_KEY = {"NoSuchKey", "404", "NotFound"}
_NO_RANGE = {"InvalidRange", "416"}


class S3Store:
    """Objects in a bucket, under a prefix.

    Credentials, region and endpoint come from the standard ``AWS_*`` variables and profiles of
    each process. A pickled store takes along the endpoint and the region that were set, for a
    process that has none of its own, and never credentials.

    An operation that fails for a reason that may pass (no answer, a cut or wrong body, an
    overloaded server) is tried again, with growing waits, for ``patience_s``.

    Args:
        bucket: its name.
        prefix: what all keys are under; empty, or a plain relative path.
        patience_s: how long an operation waits for a server that does not answer.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        patience_s: float = 600.0,
        settings: Settings | None = None,
    ) -> None:
        self.bucket, self.prefix, self.patience_s = bucket, prefix, patience_s
        self._settings = settings or Settings()
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"

    @classmethod
    def from_uri(cls, uri: str, patience_s: float = 600.0) -> S3Store:
        """The store at ``s3://bucket/prefix``.

        Raises:
            InputError: no valid bucket or prefix.
        """
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        if "@" in bucket:
            raise InputError(
                "store is an s3:// URI with a user name; give s3://bucket/prefix, and the key in "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if "?" in uri or "#" in uri:
            raise InputError(
                f"store is {uri.partition('?')[0]!r} with a query or fragment; give only "
                "s3://bucket/prefix, and the server in AWS_ENDPOINT_URL_S3"
            )
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise InputError(
                f"store is {uri!r}, whose bucket {bucket!r} is no valid name (3 to 63 lower-case "
                "letters, digits, dots and hyphens); give s3://bucket/prefix"
            )
        prefix = prefix.removesuffix("/")
        if prefix and not _plain(prefix):
            raise InputError(
                f"store is {uri!r}, whose prefix {prefix!r} is not a plain relative path; give "
                "s3://bucket/prefix"
            )
        return cls(bucket, prefix, patience_s)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settings": connect(self._settings).settings}

    def child(self, prefix: str) -> S3Store:
        name = self._name(prefix)
        return S3Store(self.bucket, name, self.patience_s, self._settings)

    def check(self) -> None:
        link = connect(self._settings)
        request = Request(self.uri, self.bucket, "list")
        outcome: list[BaseException | None] = []

        def contact() -> None:
            try:
                first = functools.partial(self._page, link, self._name("", folder=True), 1)
                persist(_with_code(first), CHECK_PATIENCE_S)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        # In a thread, as neither the search for a host's name nor the attempts to connect to each
        # of its addresses can be given a limit together.
        thread = threading.Thread(target=contact, name="s3-check", daemon=True)
        thread.start()
        thread.join(CHECK_S)
        error = outcome[0] if outcome else Impatient("timed out")
        if isinstance(error, Impatient):
            raise InputError(
                f"store {self.uri}: {link.endpoint} does not answer ({error.reason}); check the "
                "server, and AWS_ENDPOINT_URL_S3 or the profile's endpoint_url"
            )
        if error is not None:
            self._refuse(error, request, link)

    # ---- reading --------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        name, wrong = self._name(key), 0

        def attempt(link: Link) -> bytes:
            nonlocal wrong
            answer = link.client.get_object(Bucket=self.bucket, Key=name)
            try:
                return _whole(answer)
            except _WrongContent:
                wrong += 1
                if wrong == DAMAGED_TRIES:
                    raise StageError(
                        f"store {self.uri}: {key} is damaged, its content is not what was written; "
                        "delete it, and run the command again to make it anew"
                    ) from None
                raise

        return self._ask("read", key, attempt)

    def get_tail(self, key: str, length: int) -> bytes:
        name = self._name(key)
        if length <= 0:
            if not self.exists(key):
                raise KeyError(key)
            return b""

        def wanted(size: int) -> range:
            return range(max(0, size - length), size)

        return self._part(key, name, f"bytes=-{length}", wanted)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        name, start, stop = self._name(key), max(0, start), max(0, start + length)
        if start >= stop:
            if not self.exists(key):
                raise KeyError(key)
            return b""

        def wanted(size: int) -> range:
            return range(min(start, size), min(stop, size))

        return self._part(key, name, f"bytes={start}-{stop - 1}", wanted)

    def _part(self, key: str, name: str, header: str, wanted: Callable[[int], range]) -> bytes:
        """The bytes of an object that ``wanted`` tells by its size, asked for with ``header``."""

        def attempt(link: Link) -> bytes:
            try:
                answer = link.client.get_object(Bucket=self.bucket, Key=name, Range=header)
            except _client_error() as error:
                if _code(error) in _NO_RANGE:  # the object is empty, or ends before the range
                    return b""
                raise
            data = _body(answer)
            got = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange") or "")
            if got is None:  # a server that knows no ranges gives the whole object
                here = wanted(len(data))
                return data[here.start : here.stop]
            first, last, size = map(int, got.groups())
            if range(first, last + 1) != wanted(size) or len(data) != last + 1 - first:
                raise Transient("answer with another range")
            return data

        return self._ask("read", key, attempt)

    def exists(self, key: str) -> bool:
        name = self._name(key)

        def attempt(link: Link) -> bool:
            return self._head(link, name) is not None

        return self._ask("read", key, attempt)

    def identity(self, key: str) -> tuple[int, str]:
        """By the server's ETag."""
        name = self._name(key)

        def attempt(link: Link) -> tuple[int, str]:
            # A byte is asked for, see _is_by.
            try:
                answer = link.client.get_object(Bucket=self.bucket, Key=name, Range="bytes=0-0")
            except _client_error() as error:
                if _code(error) in _NO_RANGE:
                    return 0, "empty"
                raise
            data = _body(answer)
            got = re.fullmatch(r"bytes 0-0/(\d+)", answer.get("ContentRange") or "")
            if not answer.get("ETag"):
                raise Transient("answer cut off")
            return len(data) if got is None else int(got[1]), answer["ETag"].strip('"')

        return self._ask("read", key, attempt)

    def _head(self, link: Link, name: str) -> dict[str, str] | None:
        """An object's metadata, or None where there is no such object."""
        try:
            return link.client.head_object(Bucket=self.bucket, Key=name).get("Metadata", {})
        except _client_error() as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 404 and self.bucket in link.buckets:
                return None
            if status not in (301, 307, 400, 401, 403, 404):
                raise
        # The answer to HEAD has no body that could tell a missing object from a missing bucket, or
        # a wrong key from one without permission; that to GET has.
        try:
            answer = link.client.get_object(Bucket=self.bucket, Key=name)
            answer["Body"].close()
            return answer.get("Metadata", {})
        except _client_error() as error:
            if _code(error) in _NO_KEY:
                return None
            raise

    # ---- listing --------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[str]:
        start = self._name("", folder=True)
        full = start + prefix
        level = full.rpartition("/")[0]
        level = f"{level}/" if level else ""
        waiting: list[str] = []
        for page in self._pages(prefix, full, {}):
            names = [item["Key"] for item in page.get("Contents", ())]
            # What ends in a slash are the folders that some programs make, no objects of a store.
            waiting += [name for name in names if not name.endswith("/")]
            waiting.sort()
            if not names:
                continue
            # S3 lists in the order of the bytes, other servers folder by folder, with a/b before
            # a-b. So what is in a folder waits until the listing has left that folder and all
            # names that sort before its slash; what is in none may go.
            ready = 0
            for name in waiting:
                folder, inside, _ = name[len(level) :].partition("/")
                if inside and names[-1] < f"{level}{folder}0":  # "0" follows "/"
                    break
                ready += 1
            yield from (name[len(start) :] for name in waiting[:ready])
            del waiting[:ready]
        yield from (name[len(start) :] for name in waiting)

    def folders(self, prefix: str = "") -> builtins.list[str]:
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"prefix {prefix!r} does not end with a slash")
        full = f"{self._name(prefix[:-1])}/" if prefix else self._name("", folder=True)
        found = {
            item["Prefix"][len(full) : -1]
            for page in self._pages(prefix, full, {"Delimiter": "/"})
            for item in page.get("CommonPrefixes", ())
        }
        return sorted(found - {""})

    def _pages(self, shown: str, full: str, more: dict[str, str]) -> Iterator[dict[str, Any]]:
        token = None
        while True:
            here = {**more, "ContinuationToken": token} if token else more
            page = self._ask("list", shown, functools.partial(self._page, full=full, more=here))
            yield page
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not token:
                return

    def _page(
        self, link: Link, full: str, limit: int = 1000, more: dict[str, str] | None = None
    ) -> dict[str, Any]:
        page = link.client.list_objects_v2(
            Bucket=self.bucket, Prefix=full, MaxKeys=limit, **(more or {})
        )
        if not {"Name", "KeyCount", "IsTruncated"} & set(page):
            raise Transient("answer cut off")  # boto3 takes an empty body for an empty listing
        return page

    # ---- writing --------------------------------------------------------------------------------

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, absent=False)

    def put_if_absent(self, key: str, data: bytes, sync: bool = True) -> bool:
        return self._write(key, data, absent=True)

    def delete(self, key: str) -> None:
        name = self._name(key)

        def attempt(link: Link) -> None:
            link.client.delete_object(Bucket=self.bucket, Key=name)

        self._ask("delete", key, attempt)

    def _write(self, key: str, data: bytes, absent: bool) -> bool:
        name, writer = self._name(key), secrets.token_hex(16)
        about = {_DIGEST: hashlib.sha256(data).hexdigest(), _WRITER: writer}
        if len(data) <= MULTIPART_BYTES:

            def send(link: Link, conditions: dict[str, str]) -> None:
                link.client.put_object(
                    Bucket=self.bucket, Key=name, Body=data, Metadata=about, **conditions
                )

            return self._finish(key, name, writer, absent, send)
        if absent and self.exists(key):
            return False  # found out before much is sent, rather than at the end
        return self._write_parts(key, name, data, absent, about)

    def _write_parts(
        self, key: str, name: str, data: bytes, absent: bool, about: dict[str, str]
    ) -> bool:
        where = {"Bucket": self.bucket, "Key": name}

        def begin(link: Link) -> str:
            answer = link.client.create_multipart_upload(**where, Metadata=about)
            if "UploadId" not in answer:
                raise Transient("answer cut off")
            return answer["UploadId"]

        upload = self._ask("write", key, begin)
        size = max(PART_BYTES, -(-len(data) // MAX_PARTS))
        failures: list[BaseException] = []

        def part(number: int) -> dict[str, Any]:
            body = data[(number - 1) * size : number * size]

            def attempt(link: Link) -> dict[str, Any]:
                if failures:
                    raise _Abandoned
                answer = link.client.upload_part(
                    **where, UploadId=upload, PartNumber=number, Body=body
                )
                if not answer.get("ETag") or answer["ETag"].count('"') == 1:
                    raise Transient("answer cut off")
                # The server asks for the checksums of the parts where it was given them.
                sums = {k: v for k, v in answer.items() if re.fullmatch("Checksum[A-Z0-9]+", k)}
                return {"PartNumber": number, "ETag": answer["ETag"], **sums}

            try:
                return self._ask("write", key, attempt)
            except BaseException as error:
                failures.append(error)
                raise

        try:
            with ThreadPoolExecutor(PART_THREADS, thread_name_prefix="s3-part") as pool:
                try:
                    parts = list(pool.map(part, range(1, -(-len(data) // size) + 1)))
                except BaseException as error:
                    failures.append(error)  # also where it is an interrupt, that the rest may end
                    raise failures[0] from None

            def complete(link: Link, conditions: dict[str, str]) -> None:
                answer = link.client.complete_multipart_upload(
                    **where, UploadId=upload, MultipartUpload={"Parts": parts}, **conditions
                )
                if "ETag" not in answer:
                    raise Transient("answer cut off")

            written = self._finish(key, name, about[_WRITER], absent, complete)
        except BaseException:
            self._abort(where, upload)
            raise
        if not written:
            self._abort(where, upload)
        return written

    def _abort(self, where: dict[str, str], upload: str) -> None:
        from botocore.exceptions import BotoCoreError

        try:
            connect(self._settings).client.abort_multipart_upload(**where, UploadId=upload)
        except (BotoCoreError, _client_error()):
            return  # the failure that led here is the one to tell

    def _finish(
        self,
        key: str,
        name: str,
        writer: str,
        absent: bool,
        send: Callable[[Link, dict[str, str]], None],
    ) -> bool:
        """Make the request with which an object is there; whether it is the one of ``writer``."""
        tries = 0

        def attempt(link: Link) -> bool:
            nonlocal tries
            tries += 1
            if absent and not link.conditional and self._head(link, name) is not None:
                return tries > 1 and self._is_by(link, name, writer)
            conditions = {"IfNoneMatch": "*"} if absent and link.conditional else {}
            try:
                send(link, conditions)
            except _client_error() as error:
                code = _code(error)
                if code in ("PreconditionFailed", "412") and conditions:
                    # Taken, perhaps by an attempt of this very call whose answer was lost.
                    return tries > 1 and self._is_by(link, name, writer)
                if code == "NoSuchUpload" and tries > 1 and self._is_by(link, name, writer):
                    return True
                if conditions and _unconditional(error):
                    link.conditional = False
                    raise Transient("the server lacks If-None-Match") from None
                raise
            return True

        return self._ask("write", key, attempt)

    def _is_by(self, link: Link, name: str, writer: str) -> bool:
        """Whether the object is there and its writer is this one."""
        # The answer to HEAD may be cut off among its headers, which Python takes for their end. So
        # it is a byte that is asked for: with it, all headers have come.
        try:
            answer = link.client.get_object(Bucket=self.bucket, Key=name, Range="bytes=0-0")
            _body(answer)
            return answer.get("Metadata", {}).get(_WRITER) == writer
        except _client_error() as error:
            if _code(error) in _NO_KEY:
                return False
            if _code(error) not in _NO_RANGE:
                raise
        return (self._head(link, name) or {}).get(_WRITER) == writer

    # ---- one request ----------------------------------------------------------------------------

    def _name(self, key: str, folder: bool = False) -> str:
        """The object's full name; with ``folder`` the start of all names."""
        if folder:
            return f"{self.prefix}/" if self.prefix else ""
        if not _plain(key):
            raise ValueError(f"key {key!r} is not a plain relative path")
        return f"{self.prefix}/{key}" if self.prefix else key

    def _ask(self, act: str, key: str, attempt: Callable[[Link], T]) -> T:
        """The result of an operation, tried again while the failure may pass."""
        from botocore.exceptions import BotoCoreError

        link = connect(self._settings)

        def failed(pause: Pause) -> None:
            link.outage.failed(self.uri, pause.reason, self.patience_s)

        request = Request(self.uri, self.bucket, act, key)
        try:
            once = _with_code(functools.partial(attempt, link))
            result = persist(once, self.patience_s, failed)
        except Impatient as last:
            raise StageError(
                f"store {self.uri}: {request.failure}, {link.endpoint} does not answer for "
                f"{minutes(self.patience_s)} ({last.reason}); what was stored before is kept, run "
                "the command again when it does"
            ) from None
        except (BotoCoreError, _client_error()) as error:
            link.outage.passed(self.uri)
            if act != "read" or _code(error) not in _NO_KEY:
                self._refuse(error, request, link)
            link.buckets.add(self.bucket)
            raise KeyError(key) from None
        link.outage.passed(self.uri)
        link.buckets.add(self.bucket)
        return result

    def _refuse(self, error: BaseException, request: Request, link: Link) -> Any:
        from botocore.exceptions import BotoCoreError

        if not isinstance(error, (BotoCoreError, _client_error())):
            raise error
        readable = False
        if request.act in ("write", "delete"):
            try:
                self._page(link, self._name("", folder=True), 1)
                readable = True
            except (BotoCoreError, _client_error(), Transient):
                pass
        # The cause is left out, as its answer may repeat the key.
        raise refusal(error, request, link, readable) from None


class _Abandoned(Exception):
    """Another part of the same object has failed."""


class _WrongContent(Transient):
    """A body that arrived in full but is not what was written."""


def _body(answer: dict[str, Any]) -> bytes:
    from botocore.exceptions import FlexibleChecksumError

    try:
        data = answer["Body"].read()
    except FlexibleChecksumError:
        raise _WrongContent("wrong checksum") from None
    except BaseException:
        answer["Body"].close()  # or the rest of this answer would be read as the next one's
        raise
    # Without a length, the answer was cut off among its headers, unless it came in chunks.
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    if answer.get("ContentLength", len(data) if chunked else -1) != len(data):
        raise Transient("answer cut off")
    return data


def _whole(answer: dict[str, Any]) -> bytes:
    """The body, which is compared with the digest that its writer left, if any."""
    data = _body(answer)
    expected = answer.get("Metadata", {}).get(_DIGEST)
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise _WrongContent("wrong content")
    return data


def _plain(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/")) and "\0" not in path


def _client_error() -> Any:
    # Not at the top of the module: boto3 loads only where a store is in a bucket.
    from botocore.exceptions import ClientError

    return ClientError


def _code(error: Any) -> str:
    # A failed connection has a response too, which is None.
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))


def _with_code(attempt: Callable[[], T]) -> Callable[[], T]:
    """An attempt of which an error without a code, which boto3 gives its status, is transient."""
    nameless = 0

    def once() -> T:
        nonlocal nameless
        try:
            return attempt()
        except _client_error() as error:
            if _code(error).isdigit() and transient(error) is None:
                nameless += 1
                if nameless < NAMELESS_TRIES:
                    raise Transient(f"HTTP status {_code(error)}") from None
            raise

    return once


def _unconditional(error: Any) -> bool:
    """Whether a server refuses If-None-Match as such."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status == 501 or _code(error) == "NotImplemented":
        return True
    words = str(error.response.get("Error", {})).lower().replace("-", "").replace("_", "")
    return status == 400 and "ifnonematch" in words
