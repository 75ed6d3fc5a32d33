"""Arrow IPC streams, decoded from bytes as they arrive.

pyarrow reads a stream only from where it can wait for the rest of it, which a coroutine must not.
Only the division into messages is done here; what is in them is pyarrow's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sbi_dist.serving.client.steps import Again

__all__ = ["ArrowStream", "NotArrow"]

_CONTINUES = 0xFFFFFFFF
_PREFIX_BYTES = 8
# Of a schema with a thousand parameters' names there are some ten thousand.
_MOST_METADATA = 64 * 1024**2
# Place of bodyLength in the table of a Message, see Arrow's format/Message.fbs: the fourth field.
_BODY_LENGTH = 4 + 2 * 3


class NotArrow(ValueError):
    """Bytes that are not of an Arrow IPC stream."""


class ArrowStream:
    """Takes the bytes of one stream in pieces of any size and gives its record batches.

    Attributes:
        schema: None until it arrived.
    """

    def __init__(self) -> None:
        self.schema: Any = None
        self._held = bytearray()
        self._ended = False

    def feed(self, data: bytes) -> Iterator[Any]:
        """The record batches that are complete with these bytes.

        Raises:
            NotArrow: they are not what can follow.
        """
        self._held += data
        while (message := self._next()) is not None:
            try:
                if self.schema is None:
                    self.schema = pa.ipc.read_schema(message)
                else:
                    batch = pa.ipc.read_record_batch(message, self.schema)
                    batch.validate(full=True)
                    yield batch
            except (pa.ArrowException, OSError, ValueError, TypeError) as error:
                raise NotArrow(str(error).splitlines()[0] if str(error) else "damaged") from error

    def end(self) -> None:
        """The bytes are over.

        Raises:
            Again: the stream is not.
        """
        if not self._ended:
            raise Again("the answer was broken off")

    def _next(self) -> Any:
        """The next message, None where it is not complete or there is none any more."""
        held = self._held
        if self._ended:
            if held:
                raise NotArrow("bytes follow the end of the stream")
            return None
        if len(held) < _PREFIX_BYTES:
            return None
        continues, length = struct.unpack_from("<Ii", held)
        if continues != _CONTINUES or not 0 <= length <= _MOST_METADATA:
            raise NotArrow("it does not begin like one")
        if not length:
            self._ended = True
            del held[:_PREFIX_BYTES]
            return self._next()
        start = _PREFIX_BYTES + length
        if len(held) < start:
            return None
        size = start + _body_length(bytes(held[_PREFIX_BYTES:start]))
        if len(held) < size:
            return None
        with memoryview(held) as view:
            data = bytes(view[:size])
        del held[:size]
        try:
            return pa.ipc.read_message(pa.py_buffer(data))
        except (pa.ArrowException, OSError, EOFError) as error:
            raise NotArrow(str(error).splitlines()[0]) from error


def _body_length(metadata: bytes) -> int:
    """How many bytes follow a message's metadata, a flatbuffer."""
    try:
        (table,) = struct.unpack_from("<I", metadata)
        fields = table - struct.unpack_from("<i", metadata, table)[0]
        (size,) = struct.unpack_from("<H", metadata, fields)
        offset = 0
        if size > _BODY_LENGTH:
            (offset,) = struct.unpack_from("<H", metadata, fields + _BODY_LENGTH)
        length = struct.unpack_from("<q", metadata, table + offset)[0] if offset else 0
    except struct.error as error:
        raise NotArrow("a message's metadata is damaged") from error
    if length < 0:
        raise NotArrow("a message has a negative length")
    return length
