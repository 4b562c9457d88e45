"""Segment tables and blob ids: the one checksum on the wire, on disk and in manifests.

A blob's id is the BLAKE3 digest, under a domain key, of its *segment table*: so the id vouches for
the table, and the table for every byte. Byte tables: ``docs/formats/segment-table.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from forebay_wire.errors import IntegrityError, InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.limits import MAX_SEGMENT_BYTES, MAX_SEGMENTS_PER_BLOB, check_limit

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

TABLE_MAGIC: Final = b"FBSEGTAB"
TABLE_VERSION: Final = 1
TABLE_HEADER: Final = struct.Struct("<8sIIQQ")
"""magic, version u32, flags u32 (0), count u64, total u64."""

ENTRY_DTYPE: Final = np.dtype([("length", "<u4"), ("blake3", "V32"), ("xxh3", "<u8")])
"""One segment: 44 bytes, packed."""

TRAILER_MAGIC: Final = b"FBBLOB01"
TRAILER: Final = struct.Struct("<8sQQQ")
"""magic, table_offset u64, table_length u64, XXH3-64 of the 24 bytes before it u64."""

BLOB_KEY: Final = blake3(b"forebay blob id, domain key, version 1").digest()
MANIFEST_KEY: Final = blake3(b"forebay manifest id, domain key, version 1").digest()


def table_bytes_for(num_segments: int) -> int:
    """Size in bytes of a segment table with *num_segments* entries."""
    return TABLE_HEADER.size + num_segments * ENTRY_DTYPE.itemsize


def file_bytes_for(data_bytes: int, num_segments: int) -> int:
    """Size in bytes of a one-extent replica file: data, table, trailer."""
    return data_bytes + table_bytes_for(num_segments) + TRAILER.size


def xxh3(data: Buffer) -> int:
    """XXH3-64 of *data*, the check on hot reads. Releases the GIL above 100 KB."""
    return xxhash.xxh3_64_intdigest(data)


def xxh3_running() -> xxhash.xxh3_64:
    """A running :func:`xxh3`: ``update(piece)`` for each piece, then ``intdigest()``."""
    return xxhash.xxh3_64()


@dataclass(frozen=True)
class SegmentTable:
    """The lengths and digests of a blob's segments, in order. No segments: the empty blob."""

    entries: NDArray[np.void]

    @lazy
    def offsets(self) -> NDArray[np.int64]:
        """Blob offset where each segment starts, and the blob's length last: ``count + 1``."""
        offsets = np.zeros(len(self.entries) + 1, dtype=np.int64)
        np.cumsum(self.entries["length"], out=offsets[1:])
        return offsets

    @property
    def num_segments(self) -> int:
        return len(self.entries)

    @property
    def total_bytes(self) -> int:
        return int(self.offsets[-1])

    @lazy
    def encoded(self) -> bytes:
        """The canonical bytes, as they lie on disk and are digested."""
        header = TABLE_HEADER.pack(
            TABLE_MAGIC, TABLE_VERSION, 0, self.num_segments, self.total_bytes
        )
        return header + self.entries.tobytes()

    @lazy
    def blob_id(self) -> str:
        """The blob's id in hex."""
        return blake3(self.encoded, key=BLOB_KEY).hexdigest()

    def covering(self, offset: int, length: int) -> range:
        """Indices of the segments that hold the bytes [offset, offset + length) of the blob."""
        if offset < 0 or length < 0 or offset + length > self.total_bytes:
            raise InvalidRequest(
                f"bytes [{offset}, {offset + length}) are outside a blob of {self.total_bytes}"
            )
        if length == 0:
            return range(0)
        first = int(np.searchsorted(self.offsets, offset, side="right")) - 1
        last = int(np.searchsorted(self.offsets, offset + length, side="left"))
        return range(first, last)

    def check(self, index: int, data: Buffer, where: str) -> None:
        """Raise :class:`IntegrityError` unless *data* is segment *index* (by XXH3)."""
        if xxh3(data) != int(self.entries["xxh3"][index]):
            raise IntegrityError(
                f"segment {index} of blob {self.blob_id} does not match its digest ({where}); "
                "the stored bytes are damaged: restore from another replica or generation"
            )

    def parts_of(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The segments that hold the bytes [start, stop) of the blob: number, and the first byte
        and the byte after the last one that are wanted of it."""
        if start >= stop:
            return
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        borders = self.offsets[first : last + 1].tolist()
        for index, (begin, end) in enumerate(pairwise(borders), first):
            yield index, max(start, begin) - begin, min(stop, end) - begin

    def check_identity(self, index: int, data: Buffer, where: str) -> None:
        """Like :meth:`check`, by BLAKE3: for bytes that enter or move."""
        if blake3(data).digest() != self.entries["blake3"][index].tobytes():
            raise IntegrityError(
                f"segment {index} of blob {self.blob_id} does not match its BLAKE3 ({where}); "
                "the stored bytes are damaged: restore from another replica or generation"
            )

    @classmethod
    def decode(cls, data: Buffer, where: str, blob_id: str | None = None) -> SegmentTable:
        """The table in *data*; with *blob_id*, also proven to be that blob's table."""
        view = memoryview(data).cast("B")
        if len(view) < TABLE_HEADER.size:
            raise IntegrityError(f"segment table is cut short ({where})")
        magic, version, flags, count, total = TABLE_HEADER.unpack_from(view)
        if magic != TABLE_MAGIC or version != TABLE_VERSION or flags != 0:
            raise IntegrityError(f"no segment table of version {TABLE_VERSION} ({where})")
        if count > MAX_SEGMENTS_PER_BLOB or len(view) != table_bytes_for(count):
            raise IntegrityError(f"segment table has the wrong length ({where})")
        entries = np.frombuffer(view, dtype=ENTRY_DTYPE, offset=TABLE_HEADER.size).copy()
        table = cls(entries)
        if table.total_bytes != total:
            raise IntegrityError(f"segment table's lengths do not add up ({where})")
        if blob_id is not None and table.blob_id != blob_id:
            raise IntegrityError(
                f"segment table does not belong to blob {blob_id} ({where}); it is damaged"
            )
        return table


SegmentDigests = tuple[int, bytes, int]
"""A segment's length, BLAKE3 and XXH3."""


def digest_segment(data: Buffer) -> SegmentDigests:
    """Digest one segment (1 byte to 4 MiB), without the GIL."""
    length = memoryview(data).nbytes
    if length == 0:
        raise InvalidRequest("a segment has at least one byte")
    check_limit("segment bytes", length, MAX_SEGMENT_BYTES, "cut it")
    return length, blake3(data).digest(), xxh3(data)


class SegmentTableBuilder:
    """Collects segments in blob order. Not thread-safe."""

    def __init__(self) -> None:
        self._rows: list[SegmentDigests] = []

    def add(self, data: Buffer) -> None:
        """Digest one segment (1 byte to 4 MiB) and append it."""
        self.append(digest_segment(data))

    def append(self, segment: SegmentDigests) -> None:
        """Append one that is digested already."""
        self._rows.append(segment)

    def build(self) -> SegmentTable:
        check_limit(
            "segments of a blob", len(self._rows), MAX_SEGMENTS_PER_BLOB, "use larger segments"
        )
        return SegmentTable(np.array(self._rows, dtype=ENTRY_DTYPE))


EMPTY_TABLE: Final = SegmentTable(np.empty(0, dtype=ENTRY_DTYPE))


def encode_trailer(table_offset: int, table_length: int) -> bytes:
    """The last 32 bytes of a one-extent replica file."""
    head = TRAILER.pack(TRAILER_MAGIC, table_offset, table_length, 0)[:24]
    return head + struct.pack("<Q", xxh3(head))


def decode_trailer(data: Buffer, where: str) -> tuple[int, int]:
    """``(table_offset, table_length)`` of a replica file from its last 32 bytes."""
    view = memoryview(data).cast("B")
    if len(view) != TRAILER.size:
        raise IntegrityError(f"blob file is cut short ({where})")
    magic, offset, length, check = TRAILER.unpack(view)
    if magic != TRAILER_MAGIC or check != xxh3(bytes(view[:24])):
        raise IntegrityError(f"blob file has no valid trailer ({where})")
    return offset, length


def check_cuts(cuts: Sequence[int], num_bytes: int) -> None:
    """Raise unless *cuts* (segment lengths in bytes, in order) cut exactly *num_bytes*."""
    if sum(cuts) != num_bytes:
        raise InvalidRequest(f"cuts add up to {sum(cuts)} bytes, the piece has {num_bytes}")
    for length in cuts:
        if not 1 <= length <= MAX_SEGMENT_BYTES:
            raise InvalidRequest(f"a segment of {length} bytes; allowed: 1 to {MAX_SEGMENT_BYTES}")


def even_cuts(num_bytes: int, size: int = MAX_SEGMENT_BYTES) -> list[int]:
    """Segment lengths that cut *num_bytes* into pieces of *size*, the last one shorter."""
    full, rest = divmod(num_bytes, size)
    return [size] * full + ([rest] if rest else [])


def table_of(pieces: Iterable[Buffer]) -> SegmentTable:
    """The table of the blob whose segments are *pieces*."""
    builder = SegmentTableBuilder()
    for piece in pieces:
        builder.add(piece)
    return builder.build()
