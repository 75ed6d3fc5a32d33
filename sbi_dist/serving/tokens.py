"""Bearer tokens: who may ask. They are read from a file, and never logged."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from pathlib import Path

from sbi_dist.errors import InputError

__all__ = ["Tokens"]

_LARGEST_FILE = 1024 * 1024


class Tokens:
    """The tokens of a file, one a line; empty lines and lines that begin with # are none.

    The file is looked at again when it is asked about a token and has changed, so that tokens are
    rotated without a restart: add the new one, wait until all use it, remove the old one. A file
    that can't be read any more leaves the tokens as they were.

    Raises:
        InputError: there is no such file, or no token in it.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._seen: tuple[int, int, int] | None = None
        self._digests: list[bytes] = []
        try:
            self._read()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"serve.tokens_file is {path!r}, which can't be read ({error}); give a text file "
                "with one token a line"
            ) from error
        if not self._digests:
            raise InputError(f"serve.tokens_file is {path!r}, which holds no token")

    def accept(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header has one of the tokens.

        Every token is compared, in a time that does not tell how much of one was right.
        """
        with contextlib.suppress(OSError, UnicodeDecodeError):
            self._read()
        scheme, _, token = (authorization or "").partition(" ")
        given, found = _digest(token.strip()), False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == "bearer"

    def _read(self) -> None:
        about = os.stat(self._path)
        seen = (about.st_mtime_ns, about.st_size, about.st_ino)
        if seen == self._seen:
            return
        if about.st_size > _LARGEST_FILE:  # cut short, it could hold a part of a token
            raise OSError(f"it has {about.st_size:,} bytes, and {_LARGEST_FILE:,} are the most")
        with open(self._path, encoding="utf-8") as file:
            lines = [line.strip() for line in file.read(_LARGEST_FILE).splitlines()]
        digests = [_digest(line) for line in lines if line and not line.startswith("#")]
        self._seen = seen
        if digests:
            self._digests = digests


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
