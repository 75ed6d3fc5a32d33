"""A catalog's file, here or in a bucket: read by ranges, and known again by its content."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import xxhash

from sbi_dist.errors import InputError, StageError
from sbi_dist.store import LocalStore, ObjectStore, open_store

__all__ = ["CatalogFile", "Readable", "open_file"]

_CHUNK = 8 * 1024**2
# Nothing is lost yet when a command gives up at its start, so it does not wait for long.
_FIRST_PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True)
class CatalogFile:
    """Where the bytes are, and what they were when the job began; travels to other processes.

    Attributes:
        path: as it was given.
        store, key: where it is.
        size: bytes.
        tag: changes when the file is replaced or changed.
    """

    path: str
    store: ObjectStore
    key: str
    size: int
    tag: str

    @property
    def remote(self) -> bool:
        """Whether every machine can read it."""
        return not isinstance(self.store, LocalStore)

    def read(self, start: int, length: int) -> bytes:
        """Bytes from ``start`` on; fewer where the file ends."""
        try:
            return self.store.get_range(self.key, start, length)
        except KeyError:
            raise self._changed() from None

    def check(self) -> None:
        """Be sure that what was read is of the file that the job began with.

        Raises:
            StageError: the file was replaced, changed or removed.
        """
        try:
            same = self.store.identity(self.key) == (self.size, self.tag)
        except KeyError:
            same = False
        if not same:
            raise self._changed()

    def _changed(self) -> StageError:
        return StageError(
            f"--observations {self.path} was changed or removed while it was read; nothing of its "
            "new content is among the results, run the command again to draw for what it is now"
        )

    def digest(self) -> str:
        """Eight hex digits of the content: by the server's own digest, or by reading it once."""
        hashed = xxhash.xxh3_128()
        if self.remote:
            hashed.update(f"{self.size}/{self.tag}".encode())
        else:
            for start in range(0, self.size, _CHUNK):
                hashed.update(self.read(start, _CHUNK))
            self.check()
        return hashed.hexdigest()[:8]


def open_file(path: str, patience_s: float = 600.0) -> CatalogFile:
    """The file at a path, or the object at ``s3://bucket/path``.

    Raises:
        InputError: there is none, or it can't be read.
    """
    if path.startswith("s3://"):
        folder, _, key = path.rpartition("/")
        try:
            size, tag = open_store(folder, _FIRST_PATIENCE_S).identity(key)
            return CatalogFile(path, open_store(folder, patience_s), key, size, tag)
        except KeyError:
            raise InputError(
                f"--observations {path}: there is no such object; give one that exists"
            ) from None
        except ValueError as error:  # also a name that is empty
            raise InputError(f"--observations {path}: {error}") from None
    try:
        place = Path(path).expanduser().resolve()
        with open(place, "rb"):
            store = LocalStore(place.parent)
            return CatalogFile(path, store, place.name, *store.identity(place.name))
    except (OSError, RuntimeError) as error:  # also a home that is not known
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--observations {path}: the file can't be read ({reason})") from error


class Readable(io.RawIOBase):
    """A catalog's file as a seekable Python file, for readers that want one."""

    def __init__(self, file: CatalogFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = origin + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        data = self._file.read(self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
