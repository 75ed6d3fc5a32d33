"""Bytes of the Parquet format: levels and encodings of pages, their headers, Thrift structs.

Only what ``parquet.py`` writes: pages of version 1 with a checksum, not compressed, of columns
that are flat or lists of one length.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np

# Numbers of the format (parquet.thrift), as those of the fields of its structs below.
INT64, FLOAT, BYTE_ARRAY = 2, 4, 6
OPTIONAL, REPEATED = 1, 2
PLAIN, RLE, DELTA_BINARY_PACKED, RLE_DICTIONARY = 0, 3, 5, 8
UNCOMPRESSED = 0
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2

_DELTA_BLOCK = 128  # values; the least that the format allows
_MINIBLOCKS = 4


# Levels and dictionary indices: a hybrid of runs and packed bits.


def run(count: int, value: int) -> bytes:
    """``count`` times a value of at most 8 bits."""
    return varint(count << 1) + bytes((value,))


def bits(values: np.ndarray) -> bytes:
    """Values of one bit, eight a byte."""
    return _packed_bits(np.packbits(values, bitorder="little").tobytes())


def _packed_bits(packed: bytes) -> bytes:
    return varint(len(packed) << 1 | 1) + packed


def one_index(count: int) -> bytes:
    """``count`` times the first value of a dictionary."""
    return b"\x01" + run(count, 0)  # one bit wide, as other writers have it


def indices(values: np.ndarray, distinct: int) -> bytes:
    """Indices into a dictionary, of whole bytes: packing fewer bits takes longer than it saves."""
    if distinct == 1:
        return one_index(len(values))
    width = 1 if distinct <= 1 << 8 else 2 if distinct <= 1 << 16 else 4
    groups = -(-len(values) // 8)
    padded = np.zeros(8 * groups, dtype=f"<u{width}")
    padded[: len(values)] = values
    return bytes((8 * width,)) + varint(groups << 1 | 1) + padded.tobytes()


def byte_array(content: bytes) -> bytes:
    """A text as it stands in a dictionary."""
    return len(content).to_bytes(4, "little") + content


def sized(levels: bytes) -> bytes:
    """Levels as they stand in a page."""
    return len(levels).to_bytes(4, "little") + levels


# An entry takes at most a bit a value, so 1/32 of a page of 64 MiB: 16 MiB in all.
@lru_cache(maxsize=8)
def list_levels(rows: int, length: int) -> bytes:
    """Levels of a page of lists of one length without nulls.

    The repetition level is 0 where a row begins and 1 in the rest of it.
    """
    count = rows * length
    if length == 1:
        repetition = run(rows, 0)
    else:
        row = run(1, 0) + run(length - 1, 1)
        if len(row) * 8 < length:
            repetition = row * rows
        else:
            eight_rows = np.ones((8, length), dtype=np.uint8)
            eight_rows[:, 0] = 0
            period = np.packbits(eight_rows, bitorder="little").tobytes()  # of length bytes
            repetition = _packed_bits((period * -(-rows // 8))[: -(-count // 8)])
    return sized(repetition) + sized(run(count, 3))  # 3: row, list and element are there


def consecutive(first: int, count: int) -> bytes:
    """The integers from ``first`` on, as DELTA_BINARY_PACKED: all blocks are alike."""
    head = varint(_DELTA_BLOCK) + varint(_MINIBLOCKS) + varint(count) + i64(first)[1]
    block = i64(1)[1] + bytes(_MINIBLOCKS)  # the least difference, and 0 bits for what is above
    return head + block * -(-(count - 1) // _DELTA_BLOCK)


# Headers of pages.


def data_page(count: int, encoding: int, levels: bytes, values: bytes | memoryview) -> bytes:
    """Header of a page of ``count`` values."""
    crc = zlib.crc32(values, zlib.crc32(levels))
    about = {1: i32(count), 2: i32(encoding), 3: i32(RLE), 4: i32(RLE)}
    size = len(levels) + memoryview(values).nbytes
    return _page(_DATA_PAGE, size, crc, {5: struct(about)})


def dictionary_page(values: list[bytes]) -> bytes:
    """Header and content."""
    content = b"".join(values)
    about = {1: i32(len(values)), 2: i32(PLAIN)}
    return _page(_DICTIONARY_PAGE, len(content), zlib.crc32(content), {7: struct(about)}) + content


def _page(kind: int, size: int, crc: int, about: dict[int, Typed]) -> bytes:
    signed = crc - (crc >> 31 << 32)
    return struct({1: i32(kind), 2: i32(size), 3: i32(size), 4: i32(signed), **about})[1]


# Thrift's compact protocol: a value is its type's number and its bytes.
Typed = tuple[int, bytes]


@lru_cache(maxsize=4096)
def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


@lru_cache(maxsize=4096)
def i32(number: int) -> Typed:
    return 5, varint(number << 1 if number >= 0 else ~(number << 1))


def i64(number: int) -> Typed:
    return 6, i32(number)[1]


def text(content: str) -> Typed:
    encoded = content.encode()
    return 8, varint(len(encoded)) + encoded


def list_of(items: list[Typed]) -> Typed:
    kind = items[0][0] if items else 12
    head = bytes((len(items) << 4 | kind,)) if len(items) < 15 else bytes((240 | kind,))
    if len(items) >= 15:
        head += varint(len(items))
    return 9, head + b"".join([content for _, content in items])


def struct(fields: dict[int, Typed]) -> Typed:
    """Fields by number, in rising order and less than 16 apart."""
    out = bytearray()
    last = 0
    for number, (kind, content) in fields.items():
        out.append((number - last) << 4 | kind)
        out += content
        last = number
    out.append(0)
    return 12, bytes(out)
