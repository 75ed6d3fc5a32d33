"""A store in a directory of this machine, or in one that several machines share."""

from __future__ import annotations

import builtins
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from sbi_dist.errors import InputError, StageError

__all__ = ["LocalStore"]


class LocalStore:
    """Objects as files below a directory.

    An object is written to a temporary file, flushed to the disk and then renamed (``put``) or
    hard-linked (``put_if_absent``) into place, so that a reader sees all of it or none, whatever
    process dies. One that is not flushed (``sync=False``) may be cut short when the machine loses
    its power within the next half minute or so.
    """

    _TEMPORARY = ".tmp-"

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)
        self.check()

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def check(self) -> None:
        """Nothing but that there is no file in the directory's place; it is made when needed."""
        try:
            is_file = self.root.exists() and not self.root.is_dir()
        except OSError as error:
            raise InputError(
                f"store {self.root} can't be reached ({error}); give a directory that you may read"
            ) from error
        if is_file:
            raise InputError(f"store {self.root} is a file; it must be a directory")

    def child(self, prefix: str) -> LocalStore:
        return LocalStore(self._path(prefix))

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if "\0" in key or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"key {key!r} is not a plain relative path")
        return self.root.joinpath(*parts)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise KeyError(key) from None
        except OSError as error:
            raise self._unreadable(key, error) from error

    def get_tail(self, key: str, length: int) -> bytes:
        def read(file: FileIO) -> bytes:
            size = os.fstat(file.fileno()).st_size
            return _read(file, size - max(0, length), size)

        return self._open(key, read)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._open(key, lambda file: _read(file, start, start + length))

    def _open(self, key: str, read: Callable[[FileIO], bytes]) -> bytes:
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                return read(file)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise KeyError(key) from None
        except OSError as error:
            raise self._unreadable(key, error) from error

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, replace=True, sync=True)

    def put_if_absent(self, key: str, data: bytes, sync: bool = True) -> bool:
        if self.exists(key):
            return False
        return self._write(key, data, replace=False, sync=sync)

    def _write(self, key: str, data: bytes, replace: bool, sync: bool) -> bool:
        path = self._path(key)
        temporary = path.with_name(f"{self._TEMPORARY}{path.name}-{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
                if replace:
                    os.replace(temporary, path)
                else:
                    os.link(temporary, path)
                if sync:
                    _sync_directory(path.parent)
                return True
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(f"{key} can't be written", error) from error

    def exists(self, key: str) -> bool:
        try:
            return self._path(key).is_file()
        except OSError as error:
            raise self._unreadable(key, error) from error

    def identity(self, key: str) -> tuple[int, str]:
        """By the time of the last change, as content that is never read costs nothing."""
        try:
            about = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(key) from None
        except OSError as error:
            raise self._unreadable(key, error) from error
        if not stat.S_ISREG(about.st_mode):
            raise KeyError(key)
        return about.st_size, str(about.st_mtime_ns)

    def list(self, prefix: str = "") -> Iterator[str]:
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for directory, _, names in os.walk(folder, onerror=self._unlistable):
            relative = Path(directory).relative_to(self.root)
            for name in names:
                key = (relative / name).as_posix()
                if key.startswith(prefix) and not name.startswith(self._TEMPORARY):
                    found.append(key)
        return iter(sorted(found))

    def folders(self, prefix: str = "") -> builtins.list[str]:
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"prefix {prefix!r} does not end with a slash")
        folder = self._path(prefix[:-1]) if prefix else self.root
        try:
            with os.scandir(folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            self._unlistable(error)
            return []

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except (IsADirectoryError, NotADirectoryError):
            return
        except OSError as error:
            raise self._unwritable(f"{key} can't be deleted", error) from error

    def _unreadable(self, key: str, error: OSError) -> StageError:
        return StageError(f"store {self.uri}: {key} can't be read ({error})")

    def _unlistable(self, error: OSError) -> None:
        """Refuse to take a folder that can't be read for an empty one."""
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise StageError(f"store {self.uri} can't be listed ({error})") from error

    def _unwritable(self, what: str, error: OSError) -> InputError | StageError:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return InputError(
                f"store {self.uri} can't be written ({error}); give a directory that you may write"
            )
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space or repair the disk" if full else "repair the disk"
        return StageError(
            f"store {self.uri}: {what} ({error.strerror or error}); what was stored before is "
            f"kept, {remedy} and run the command again"
        )


def _read(file: FileIO, start: int, stop: int) -> bytes:
    """The bytes from ``start`` to ``stop``, as far as the file has them."""
    start, stop = max(0, start), min(stop, os.fstat(file.fileno()).st_size)
    parts = []
    while start < stop:
        # One call gives at most 2 GiB, and fewer bytes than asked for on some file systems.
        part = os.pread(file.fileno(), stop - start, start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
