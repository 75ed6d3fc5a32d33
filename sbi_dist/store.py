"""Where everything durable is kept: objects under keys, in a local directory.

The interface is that of an object store (whole objects, put-if-absent, listing by prefix), so that
the stages do not care what is behind it. Keys are relative paths with ``/``. An object is there in
full or not at all, whatever dies while it is written.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from sbi_dist.errors import InputError, StageError

__all__ = ["LocalStore", "ObjectStore", "open_store"]


class ObjectStore(Protocol):
    """Objects (bytes) under keys. Every method may raise ``StageError`` when the medium fails."""

    uri: str

    def get(self, key: str) -> bytes:
        """The object's bytes; ``KeyError`` where there is none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless the key is taken; whether this call wrote it."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with ``prefix``, in order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...

    def child(self, prefix: str) -> ObjectStore:
        """The store of the keys under ``prefix/``."""
        ...


def open_store(uri: str) -> ObjectStore:
    """The store at ``uri``: a directory, or a ``file://`` URL of one.

    Raises:
        InputError: another scheme, or a path that can't be a directory.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return LocalStore(Path(unquote(parsed.path)))
    if parsed.scheme and len(parsed.scheme) > 1:
        raise InputError(
            f"store is {uri!r}; allowed is a directory (or a file:// URL), on several machines one "
            "that they share"
        )
    return LocalStore(Path(uri).expanduser())


class LocalStore:
    """Objects as files below a directory.

    An object is written to a temporary file, flushed to the disk and then renamed (``put``) or
    hard-linked (``put_if_absent``) into place, so that a reader sees all of it or none.
    """

    _TEMPORARY = ".tmp-"

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"store {self.root} is a file; it must be a directory")

    def child(self, prefix: str) -> LocalStore:
        return LocalStore(self._path(prefix))

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not key or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"key {key!r} is not a plain relative path")
        return self.root.joinpath(*parts)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise KeyError(key) from None
        except OSError as error:
            raise StageError(f"store {self.uri}: {key} can't be read ({error})") from error

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, replace=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        return self._write(key, data, replace=False)

    def _write(self, key: str, data: bytes, replace: bool) -> bool:
        path = self._path(key)
        temporary = path.with_name(f"{self._TEMPORARY}{path.name}-{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if replace:
                    os.replace(temporary, path)
                else:
                    os.link(temporary, path)
                _sync_directory(path.parent)
                return True
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        except PermissionError as error:
            raise InputError(
                f"store {self.uri} can't be written ({error}); give a directory that you may write"
            ) from error
        except OSError as error:
            raise StageError(
                f"store {self.uri}: {key} can't be written ({error.strerror or error}); what was "
                "stored before is kept, free space or repair the disk and run the command again"
            ) from error

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[str]:
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for directory, _, names in os.walk(folder):
            relative = Path(directory).relative_to(self.root)
            for name in names:
                key = (relative / name).as_posix()
                if key.startswith(prefix) and not name.startswith(self._TEMPORARY):
                    found.append(key)
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
