"""The ends of an Arrow IPC file, read without Arrow: schema, record batches, their rows.

The layout is that of the Arrow columnar format, "IPC File Format" and its flatbuffers:
https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from forebay_wire.errors import InvalidRequest

HEAD_MAGIC: Final = b"ARROW1\0\0"
END: Final = struct.Struct("<i6s")
"""Length of the footer i32, magic."""
END_MAGIC: Final = b"ARROW1"
PREFIX: Final = struct.Struct("<Ii")
"""0xFFFFFFFF, length of the metadata i32: before each message."""
CONTINUATION: Final = 0xFFFFFFFF
BLOCK: Final = struct.Struct("<qi4xq")
"""Where a message lies: offset i64, metadata length i32, body length i64."""

TAIL_BYTES: Final = 64 << 10
"""Read first: the footer of most files."""
MAX_FOOTER_BYTES: Final = 64 << 20
GAP_BYTES: Final = 64 << 10
"""Messages that lie this close are read together."""

_FOOTER_DICTIONARIES, _FOOTER_BATCHES = 2, 3
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER = 1, 2
_BATCH_LENGTH: Final = 0
_RECORD_BATCH: Final = 3
"""Among the types of a message's header."""

Read = Callable[[int, int], bytes | bytearray]
"""``read(offset, length)`` of the file."""


@dataclass(frozen=True)
class ArrowFile:
    """What a file holds."""

    schema: bytes
    """The schema as an IPC message."""
    batch_rows: tuple[int, ...]
    has_dictionaries: bool


def inspect(read: Read, num_bytes: int, where: str) -> ArrowFile:
    """What the Arrow IPC file of *num_bytes* holds, read by small ranges.

    :class:`InvalidRequest` naming *where* if it is no such file.
    """
    try:
        return _inspect(read, num_bytes)
    except (struct.error, IndexError, ValueError) as error:
        raise InvalidRequest(
            f"{where} is no Arrow IPC file ({error}): write it with pyarrow.ipc.new_file, or "
            "import it (forebay dataset import)"
        ) from error


def _inspect(read: Read, num_bytes: int) -> ArrowFile:
    if num_bytes < len(HEAD_MAGIC) + PREFIX.size + END.size:
        raise ValueError(f"it has {num_bytes} bytes")
    tail = read(max(0, num_bytes - TAIL_BYTES), min(num_bytes, TAIL_BYTES))
    length, magic = END.unpack_from(tail, len(tail) - END.size)
    if magic != END_MAGIC or not 0 < length <= min(num_bytes - END.size, MAX_FOOTER_BYTES):
        raise ValueError("it does not end like one")
    if length + END.size > len(tail):
        tail = read(num_bytes - END.size - length, length + END.size)
    footer = bytes(tail[len(tail) - END.size - length : len(tail) - END.size])
    blocks = _blocks(footer, _FOOTER_BATCHES)
    for offset, head, body in blocks:
        if offset < 0 or head <= PREFIX.size or body < 0 or offset + head + body > num_bytes:
            raise ValueError("its footer names bytes outside of it")
    return ArrowFile(
        _schema(read, num_bytes),
        tuple(_rows(read, blocks)),
        bool(_blocks(footer, _FOOTER_DICTIONARIES)),
    )


def _schema(read: Read, num_bytes: int) -> bytes:
    start = len(HEAD_MAGIC)
    data = read(0, min(num_bytes, TAIL_BYTES))
    mark, length = PREFIX.unpack_from(data, start)
    if data[:start] != HEAD_MAGIC or mark != CONTINUATION:
        raise ValueError("it does not begin like one")
    if not 0 < length <= min(num_bytes, MAX_FOOTER_BYTES):
        raise ValueError(f"its schema has {length} bytes")
    if start + PREFIX.size + length > len(data):
        data = read(0, start + PREFIX.size + length)
    return bytes(data[start : start + PREFIX.size + length])


def _rows(read: Read, blocks: list[tuple[int, int, int]]) -> list[int]:
    """Rows of each record batch; heads that lie close are read at once."""
    rows: list[int] = []
    start, data = 0, b""
    for index, (offset, head, _) in enumerate(blocks):
        if not start <= offset <= offset + head <= start + len(data):
            stop = offset + head
            for later, length, _ in blocks[index + 1 :]:
                if not stop <= later <= stop + GAP_BYTES:
                    break
                stop = later + length
            start, data = offset, bytes(read(offset, stop - offset))
        rows.append(_batch_rows(data[offset - start : offset - start + head]))
    return rows


def _batch_rows(head: bytes) -> int:
    mark, _ = PREFIX.unpack_from(head)
    if mark != CONTINUATION:
        raise ValueError("a record batch does not begin like one")
    message = head[PREFIX.size :]
    table = _root(message)
    kind = _field(message, table, _MESSAGE_HEADER_TYPE)
    header = _field(message, table, _MESSAGE_HEADER)
    if kind is None or header is None or message[kind] != _RECORD_BATCH:
        raise ValueError("its footer names something that is no record batch")
    batch = header + int(struct.unpack_from("<I", message, header)[0])
    length = _field(message, batch, _BATCH_LENGTH)
    rows = 0 if length is None else int(struct.unpack_from("<q", message, length)[0])
    if not 0 <= rows < 1 << 31:
        raise ValueError(f"a record batch of {rows} rows")
    return rows


def _blocks(footer: bytes, field: int) -> list[tuple[int, int, int]]:
    found = _field(footer, _root(footer), field)
    if found is None:
        return []
    vector = found + int(struct.unpack_from("<I", footer, found)[0])
    count = int(struct.unpack_from("<I", footer, vector)[0])
    if count * BLOCK.size > len(footer):
        raise ValueError("its footer is damaged")
    start = vector + 4
    return [BLOCK.unpack_from(footer, start + number * BLOCK.size) for number in range(count)]


# What follows reads a flatbuffer.


def _root(data: bytes) -> int:
    return int(struct.unpack_from("<I", data, 0)[0])


def _field(data: bytes, table: int, index: int) -> int | None:
    """Where the field of a table lies; None: it is not there."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    if vtable < 0:
        raise ValueError("it points outside of itself")
    num_bytes = int(struct.unpack_from("<H", data, vtable)[0])
    slot = 4 + 2 * index
    if slot >= num_bytes:
        return None
    offset = int(struct.unpack_from("<H", data, vtable + slot)[0])
    return table + offset if offset else None
