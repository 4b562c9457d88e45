"""The format of an encoded blob file: stored segments, their index, a trailer.

Byte tables: ``docs/formats/encoding.md``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from forebay_server.model.encodings import CODES, Method, Way
from forebay_server.tier.store import TierReader
from forebay_wire.errors import IntegrityError
from forebay_wire.lazy import lazy
from forebay_wire.limits import MAX_SEGMENT_BYTES, MAX_SEGMENTS_PER_BLOB
from forebay_wire.segments import SegmentTable, table_bytes_for, xxh3

ENTRY_DTYPE: Final = np.dtype(
    [("stored_length", "<u4"), ("method", "u1"), ("width", "u1"), ("zero", "<u2"), ("xxh3", "<u8")]
)
"""One stored segment: 16 bytes, packed."""

TRAILER_MAGIC: Final = b"FBENCODE"
TRAILER_VERSION: Final = 1
TRAILER: Final = struct.Struct("<8sIIQQQQ")
"""magic, version u32, encoding u32, index_offset u64, index_length u64, XXH3-64 of the index u64,
XXH3-64 of the 40 bytes before it u64."""
_CHECKED_BYTES: Final = TRAILER.size - 8

LAST_READ_BYTES: Final = 64 << 10
"""The end of a file is read in one call of this size: trailer and index of up to 1,000 segments."""

_WIDTHS: Final = frozenset({1, 2, 4, 8})
_METHODS: Final = frozenset(int(one) for one in Method)


@dataclass(frozen=True)
class EncodedIndex:
    """What the end of an encoded file says: the blob's segments, and where each is stored."""

    table: SegmentTable
    entries: NDArray[np.void]

    @lazy
    def offsets(self) -> list[int]:
        """File offset of each stored segment, and of the index last."""
        offsets = np.zeros(len(self.entries) + 1, dtype=np.int64)
        np.cumsum(self.entries["stored_length"], out=offsets[1:])
        listed: list[int] = offsets.tolist()
        return listed

    def way(self, index: int) -> Way:
        """What was done to segment *index*."""
        entry = self.entries[index]
        return Way(Method(int(entry["method"])), int(entry["width"]))

    def encode(self, encoding: str) -> bytes:
        """What follows the stored segments of a file in *encoding*."""
        body = self.table.encoded + self.entries.tobytes()
        head = TRAILER.pack(
            TRAILER_MAGIC,
            TRAILER_VERSION,
            CODES[encoding],
            self.offsets[-1],
            len(body),
            xxh3(body),
            0,
        )[:_CHECKED_BYTES]
        return body + head + struct.pack("<Q", xxh3(head))


def encoded_bytes_for(stored_bytes: int, num_segments: int) -> int:
    """Size in bytes of an encoded file."""
    index_bytes = table_bytes_for(num_segments) + num_segments * ENTRY_DTYPE.itemsize
    return stored_bytes + index_bytes + TRAILER.size


def read_index(reader: TierReader, encoding: str, blob: str | None) -> EncodedIndex:
    """The index of an encoded file; with *blob* proven to be that blob's.

    Also checks that segments, index and trailer make up the whole file. :class:`IntegrityError`
    names the file. No more memory is taken than the file is long.
    """
    where, size = reader.where, reader.size_bytes
    if size < TRAILER.size:
        raise IntegrityError(f"encoded file is cut short: {size} bytes ({where})")
    end = bytearray(min(size, LAST_READ_BYTES))
    reader.read_into(size - len(end), end)
    offset, length, digest = _read_trailer(memoryview(end)[-TRAILER.size :], encoding, where)
    if offset + length + TRAILER.size != size or length > _MAX_INDEX_BYTES:
        raise IntegrityError(
            f"encoded file has {size} bytes, its trailer speaks of "
            f"{offset + length + TRAILER.size} ({where}); it is damaged"
        )
    if length + TRAILER.size <= len(end):
        body = memoryview(end)[-TRAILER.size - length : -TRAILER.size]
    else:
        body = memoryview(bytearray(length))
        reader.read_into(offset, body)
    if xxh3(body) != digest:
        raise IntegrityError(f"index of an encoded file does not match its digest ({where})")
    return _decode_body(body, offset, where, blob)


_MAX_INDEX_BYTES: Final = (
    table_bytes_for(MAX_SEGMENTS_PER_BLOB) + MAX_SEGMENTS_PER_BLOB * ENTRY_DTYPE.itemsize
)


def _read_trailer(trailer: memoryview, encoding: str, where: str) -> tuple[int, int, int]:
    """``(index_offset, index_length, digest of the index)``."""
    magic, version, code, offset, length, digest, check = TRAILER.unpack(trailer)
    if magic != TRAILER_MAGIC or check != xxh3(bytes(trailer[:_CHECKED_BYTES])):
        raise IntegrityError(f"encoded file has no valid trailer ({where})")
    if version != TRAILER_VERSION:
        raise IntegrityError(
            f"encoded file has version {version}, this Forebay reads {TRAILER_VERSION} ({where})"
        )
    if code != CODES[encoding]:
        raise IntegrityError(
            f"encoded file has encoding number {code} and not that of {encoding} ({where})"
        )
    return offset, length, digest


def _decode_body(body: memoryview, stored_bytes: int, where: str, blob: str | None) -> EncodedIndex:
    header_bytes = table_bytes_for(0)
    per_segment = table_bytes_for(1) - header_bytes + ENTRY_DTYPE.itemsize
    count, rest = divmod(len(body) - header_bytes, per_segment)
    if count < 0 or rest:
        raise IntegrityError(f"index of an encoded file has the wrong length ({where})")
    table = SegmentTable.decode(body[: table_bytes_for(count)], where, blob)
    entries = np.frombuffer(body, dtype=ENTRY_DTYPE, offset=table_bytes_for(count)).copy()
    index = EncodedIndex(table, entries)
    lengths = table.entries["length"]
    is_sound = (
        index.offsets[-1] == stored_bytes
        and bool(np.all((lengths >= 1) & (lengths <= MAX_SEGMENT_BYTES)))
        and bool(np.all((entries["stored_length"] >= 1) & (entries["stored_length"] <= lengths)))
        and _METHODS.issuperset(np.unique(entries["method"]).tolist())
        and _WIDTHS.issuperset(np.unique(entries["width"]).tolist())
        and not entries["zero"].any()
    )
    if not is_sound:
        raise IntegrityError(
            f"index of an encoded file contradicts its segments ({where}); it is damaged, or "
            "written by a newer Forebay"
        )
    return index
