"""Content codings of bodies: gzip and deflate, with a bound on what a request may unpack to."""

from __future__ import annotations

import zlib

from sbi_dist.serving.refusal import Refusal

__all__ = ["CODINGS", "compress", "decompress", "wanted"]

CODINGS = ("gzip", "deflate")

_GZIP, _ZLIB, _RAW = 31, 15, -15
# Random mantissas hardly shrink, so what is won is won at once.
_LEVEL = 1


def decompress(body: bytes, coding: str | None, limit: int) -> bytes:
    """The body of a request without its ``Content-Encoding``, at most ``limit`` bytes.

    Raises:
        Refusal: 415 for another coding, 400 for a body that is not in it, 413 past the limit;
            never more than the limit is unpacked.
    """
    coding = (coding or "identity").strip().lower()
    if coding == "identity":
        return body
    if coding not in CODINGS:
        raise Refusal(
            415,
            "Unsupported content coding",
            f"Content-Encoding is {coding[:40]!r}; send gzip, deflate or none",
        )
    unpacked = zlib.decompressobj(_window(body, coding))
    try:
        content = unpacked.decompress(body, limit + 1)
    except zlib.error as error:
        raise _broken(coding, str(error)) from None
    if len(content) > limit:
        raise Refusal(
            413,
            "Too large",
            f"the request's body unpacks to more than {limit:,} bytes, the limit; "
            "send fewer observations at once",
        )
    if not unpacked.eof:
        raise _broken(coding, "it ends too early")
    if unpacked.unused_data:
        raise _broken(coding, f"{len(unpacked.unused_data):,} bytes follow its end")
    return content


def compress(body: bytes, coding: str) -> bytes:
    """The body of an answer in one of ``CODINGS``."""
    packed = zlib.compressobj(_LEVEL, wbits=_GZIP if coding == "gzip" else _ZLIB)
    return packed.compress(body) + packed.flush()


def wanted(accept_encoding: str | None) -> str | None:
    """The coding that an ``Accept-Encoding`` asks for, if it names no other.

    Most clients name all that they can unpack with every request; packing draws would cost them
    more time than it saves. One that names a single coding asks for it.
    """
    coding, _, quality = (accept_encoding or "").partition(";")
    coding = coding.strip().lower()
    refused = quality.replace(" ", "").rstrip("0") in ("q=", "q=0.", "q=.")
    return coding if coding in CODINGS and not refused else None


def _window(body: bytes, coding: str) -> int:
    """The window bits for zlib: deflate means zlib's format, and some clients leave that out."""
    if coding == "gzip":
        return _GZIP
    head = int.from_bytes(body[:2], "big")
    return _ZLIB if len(body) < 2 or ((head >> 8) & 15 == 8 and head % 31 == 0) else _RAW


def _broken(coding: str, why: str) -> Refusal:
    return Refusal(
        400, "Malformed body", f"Content-Encoding is {coding}, but the body is not: {why}"
    )
