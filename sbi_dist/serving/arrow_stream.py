"""What an Arrow stream says of itself, looked at before anything of it is unpacked."""

from __future__ import annotations

import struct

import pyarrow as pa

__all__ = ["require_plain_buffers"]

# Of the format's flatbuffers: kinds of messages and numbers of fields (Message.fbs).
_DICTIONARY, _RECORDS = 2, 3
_KIND, _HEADER, _DATA, _COMPRESSION = 1, 2, 1, 3


def require_plain_buffers(stream: bytes) -> None:
    """Check that no buffer is compressed: one of a few bytes may stand for gigabytes.

    Raises:
        ValueError: there are such buffers, or what describes them makes no sense.
    """
    reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(stream))
    try:
        for message in reader:
            metadata = message.metadata.to_pybytes()
            if _is_compressed(metadata):
                raise ValueError(
                    "its buffers are compressed; send them plain, or compress the whole body and "
                    "name that in Content-Encoding"
                )
    except (struct.error, IndexError):
        raise ValueError("its metadata is damaged") from None


def _is_compressed(metadata: bytes) -> bool:
    root = _unsigned(metadata, 0)
    kind, header = _field(metadata, root, _KIND), _field(metadata, root, _HEADER)
    if kind is None or header is None or metadata[kind] not in (_DICTIONARY, _RECORDS):
        return False
    table = header + _unsigned(metadata, header)
    if metadata[kind] == _DICTIONARY:
        data = _field(metadata, table, _DATA)
        if data is None:
            return False
        table = data + _unsigned(metadata, data)
    return _field(metadata, table, _COMPRESSION) is not None


def _field(metadata: bytes, table: int, number: int) -> int | None:
    """Where a table's field is; None where it has none."""
    layout = table - struct.unpack_from("<i", metadata, table)[0]
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", metadata, layout)[0]:
        return None
    offset = struct.unpack_from("<H", metadata, layout + place)[0]
    return table + offset if offset else None


def _unsigned(metadata: bytes, place: int) -> int:
    return int(struct.unpack_from("<I", metadata, place)[0])
