"""Where everything durable is kept: objects under keys, in a directory or in an S3 bucket.

The interface is that of an object store (whole objects, put-if-absent, listing by prefix), so that
the stages do not care what is behind it. Keys are relative paths with ``/``. An object is there in
full or not at all, whatever dies while it is written. What the objects hold is not known here.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from sbi_dist.errors import InputError
from sbi_dist.store.local import LocalStore
from sbi_dist.store.s3 import S3Store

__all__ = ["LocalStore", "ObjectStore", "S3Store", "open_store"]


class ObjectStore(Protocol):
    """Objects (bytes) under keys; travels to other processes by pickle.

    Every method may raise ``StageError`` when the medium fails, ``InputError`` when it refuses,
    and ``ValueError`` for a key that is not a plain relative path.
    """

    uri: str

    def get(self, key: str) -> bytes:
        """The object's bytes; ``KeyError`` where there is none."""
        ...

    def get_tail(self, key: str, length: int) -> bytes:
        """The last ``length`` bytes, or all where it has fewer; ``KeyError`` where there is none.

        Only their number is checked, not their content.
        """
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from ``start`` on; fewer, or none, where the object ends before that.

        ``KeyError`` where there is no object. Only the number of bytes is checked, not their
        content.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        ...

    def put_if_absent(self, key: str, data: bytes, sync: bool = True) -> bool:
        """Write an object unless the key is taken; whether this call wrote it.

        ``sync=False`` is for what carries its own checksum and can be made again: it need not have
        reached the disk when the call returns.
        """
        ...

    def exists(self, key: str) -> bool: ...

    def identity(self, key: str) -> tuple[int, str]:
        """Bytes of the object, and a tag that is another one when it was replaced or changed.

        ``KeyError`` where there is no object.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with ``prefix``, in order, of all levels."""
        ...

    def folders(self, prefix: str = "") -> builtins.list[str]:
        """Names of the folders directly under ``prefix`` (empty, or ends with ``/``), in order.

        A folder whose objects were all deleted may still be named.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...

    def child(self, prefix: str) -> ObjectStore:
        """The store of the keys under ``prefix/``."""
        ...

    def check(self) -> None:
        """Make first contact, which takes 15 s at most; writes nothing.

        Raises:
            InputError: this store can't be used at all.
        """
        ...


def open_store(uri: str, patience_s: float = 600.0) -> ObjectStore:
    """The store at ``uri``: a directory, a ``file://`` URL of one, or ``s3://bucket/prefix``.

    Nothing is read or written yet, see ``check``.

    Args:
        uri: where the store is.
        patience_s: how long an operation waits for a server that does not answer.

    Raises:
        InputError: another scheme, no valid bucket or prefix, or a path that can't be a directory.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        return S3Store.from_uri(uri, patience_s)
    if parsed.scheme == "file":
        return LocalStore(Path(unquote(parsed.path)))
    if parsed.scheme and len(parsed.scheme) > 1:
        # Only the scheme is shown: a URL may hold a password.
        raise InputError(
            f"store is a {parsed.scheme}: URI; allowed is a directory (or a file:// URL), on "
            "several machines one that they share, or s3://bucket/prefix"
        )
    return LocalStore(Path(uri).expanduser())
