"""Blob files at rest: read as if they were raw, written in the encoding that a tier wants.

Identity and digests stay those of the plain bytes; what decodes wrong is never given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from forebay_server.model.encodings import (
    RAW,
    RAW_WAY,
    Method,
    Way,
    choose_way,
    encoding_of,
    ways_to_try,
)
from forebay_server.tier.buffers import BufferPool
from forebay_server.tier.codecs import decode_segment, encode_segment
from forebay_server.tier.encoded import (
    ENTRY_DTYPE,
    EncodedIndex,
    encoded_bytes_for,
    read_index,
)
from forebay_server.tier.store import Tier, TierReader, TierWriter
from forebay_server.tier.verify import checked_segments, copy_bytes, copy_verified, read_table
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import SegmentTable, encode_trailer, file_bytes_for, xxh3

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

STORED_BUFFERS: Final = BufferPool(16)
"""For what was read and is not decoded yet. Taken by threads that may hold a segment buffer."""
PLAIN_BUFFERS: Final = BufferPool(16)
"""For segments of which only a part is wanted. Taken by threads that may hold both others."""

NUM_SAMPLES: Final = 8
SAMPLE_BYTES: Final = 64 << 10
"""What is tried of a blob: so much of the middle of so many segments."""

Advance = Callable[[int], object]


@dataclass(frozen=True)
class StoredFile:
    """A blob file that was just published."""

    encoding: str
    num_bytes: int
    """Size of the file."""
    table: SegmentTable


def open_plain(
    tier: Tier, file: str, encoding: str, blob: str | None, *, stored_bytes: int | None = None
) -> TierReader:
    """A reader of the raw image (data, segment table, trailer) of blob file *file* of *tier*.

    Reading a range decodes the segments that it touches, and only those; each is checked by XXH3.
    With *stored_bytes* the file has to have that size. :class:`NotFound`, :class:`IntegrityError`,
    :class:`StorageError` as :meth:`Tier.read`. Raw ones have descriptors where the tier has.
    """
    inner = tier.read(tier.blob_name(file))
    try:
        if stored_bytes is not None and inner.size_bytes != stored_bytes:
            raise IntegrityError(
                f"file of blob {blob} has {inner.size_bytes} bytes and not {stored_bytes} "
                f"({inner.where}); it is damaged"
            )
        if encoding == RAW:
            return inner
        return EncodedReader(inner, read_index(inner, encoding, blob))
    except BaseException:
        inner.close()
        raise


def encode_into(
    reader: TierReader,
    tier: Tier,
    file: str,
    setting: str,
    blob: str | None,
    *,
    advance: Advance = lambda num_bytes: None,
) -> StoredFile:
    """Copy the raw image of *blob* from *reader* into the new blob file *file* of *tier*.

    Every segment is checked by BLAKE3 on its way. *setting* is an encoding, or ``auto``; a blob for
    which it does not pay is stored raw. *advance* is told plain bytes as they are written; it may
    raise to end it. Durable on return; nothing is left of a copy that failed.
    """
    table = read_table(reader, blob)
    way = _choose(reader, table, setting)
    name = tier.blob_name(file)
    if way == RAW_WAY:
        with tier.create(name, copy_bytes(table)) as writer:
            copy_verified(reader, _Telling(writer, advance), blob)
            writer.publish()
        return StoredFile(RAW, copy_bytes(table), table)
    with tier.create(name, encoded_bytes_for(table.total_bytes, table.num_segments)) as writer:
        entries = _write_segments(reader, table, way, writer, advance)
        index = EncodedIndex(table, np.array(entries, dtype=ENTRY_DTYPE))
        writer.write(index.encode(encoding_of(way)))
        writer.publish()
    num_bytes = encoded_bytes_for(index.offsets[-1], table.num_segments)
    return StoredFile(encoding_of(way), num_bytes, table)


def _choose(reader: TierReader, table: SegmentTable, setting: str) -> Way:
    """The way that pays most for this blob, by trying all on samples of it."""
    ways = ways_to_try(setting)
    if not ways or not table.num_segments:
        return RAW_WAY
    plain_bytes = 0
    encoded = dict.fromkeys(ways, 0)
    for start, stop in _sample_ranges(table.offsets.tolist()):
        sample = memoryview(bytearray(stop - start))
        reader.read_into(start, sample)
        plain_bytes += len(sample)
        for way in ways:
            encoded[way] += min(_num_bytes(encode_segment(way, sample)), len(sample))
    return choose_way(plain_bytes, encoded)


def _sample_ranges(offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Parts of segments that are spread over the blob."""
    count = len(offsets) - 1
    picked = sorted({count * (2 * one + 1) // (2 * NUM_SAMPLES) for one in range(NUM_SAMPLES)})
    for index in picked:
        start, stop = offsets[index], offsets[index + 1]
        # From a multiple of 64: elements are aligned to the segment.
        start += max(0, stop - start - SAMPLE_BYTES) // 2 // 64 * 64
        yield start, min(stop, start + SAMPLE_BYTES)


def _write_segments(
    reader: TierReader, table: SegmentTable, way: Way, writer: TierWriter, advance: Advance
) -> list[tuple[int, int, int, int, int]]:
    """Write all segments of a blob; their entries in the index."""
    entries: list[tuple[int, int, int, int, int]] = []
    for piece in checked_segments(reader, table):
        stored = encode_segment(way, piece)
        used = way
        if _num_bytes(stored) >= len(piece):
            stored, used = piece, RAW_WAY
        writer.write(stored)
        entries.append((_num_bytes(stored), int(used.method), used.width, 0, xxh3(stored)))
        advance(len(piece))
    return entries


def _num_bytes(buffer: ReadableBuffer) -> int:
    return memoryview(buffer).nbytes


class EncodedReader(TierReader):
    """An encoded blob file as its raw image. Thread-safe, except for ``close``."""

    def __init__(self, inner: TierReader, index: EncodedIndex) -> None:
        """Takes *inner* over."""
        table = index.table
        self.size_bytes = file_bytes_for(table.total_bytes, table.num_segments)
        self.where = inner.where
        self._inner = inner
        self._index = index
        self._table = table
        self._starts: list[int] = table.offsets.tolist()

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        stop = offset + len(view)
        if stop > self.size_bytes:
            raise IntegrityError(
                f"file is cut short: it ends before byte {stop} ({self.where}); another replica or "
                "generation has to serve"
            )
        total = self._table.total_bytes
        data_bytes = max(0, min(stop, total) - offset)
        if data_bytes:
            self._read_data(offset, view[:data_bytes])
        if data_bytes < len(view):
            end = self._table.encoded + encode_trailer(total, len(self._table.encoded))
            start = max(0, offset - total)
            view[data_bytes:] = end[start : stop - total]

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        self._inner.close()

    def _read_data(self, offset: int, view: memoryview) -> None:
        """Fill *view*, which lies inside the data, with what starts at *offset*."""
        wanted = self._table.covering(offset, len(view))
        with STORED_BUFFERS.borrow() as buffer:
            for group in self._groups(wanted, len(buffer)):
                start = self._index.offsets[group.start]
                stored = buffer[: self._index.offsets[group.stop] - start]
                self._inner.read_into(start, stored)
                for index in group:
                    first, last = self._index.offsets[index] - start, self._index.offsets[index + 1]
                    self._decode(index, stored[first : last - start], offset, view)

    def _groups(self, wanted: range, limit: int) -> Iterator[range]:
        """Consecutive segments that are read in one call."""
        offsets = self._index.offsets
        first = wanted.start
        for index in wanted:
            if offsets[index + 1] - offsets[first] > limit:
                yield range(first, index)
                first = index
        yield range(first, wanted.stop)

    def _decode(self, index: int, stored: memoryview, offset: int, view: memoryview) -> None:
        """Put the part of segment *index* that *view* wants, from blob offset *offset*, there."""
        start, stop = self._starts[index], self._starts[index + 1]
        if offset <= start and stop <= offset + len(view):
            self._decode_whole(index, stored, view[start - offset : stop - offset])
            return
        first, last = max(start, offset), min(stop, offset + len(view))
        with PLAIN_BUFFERS.borrow() as buffer:
            plain = buffer[: stop - start]
            self._decode_whole(index, stored, plain)
            target = np.frombuffer(view[first - offset : last - offset], np.uint8)
            np.copyto(target, np.frombuffer(plain[first - start : last - start], np.uint8))

    def _decode_whole(self, index: int, stored: memoryview, target: memoryview) -> None:
        way = self._index.way(index)
        if way.method is not Method.RAW and xxh3(stored) != int(self._index.entries["xxh3"][index]):
            raise IntegrityError(
                f"stored segment {index} of blob {self._table.blob_id} does not match its digest "
                f"({self.where}); another replica or generation has to serve"
            )
        try:
            decode_segment(way, stored, target)
        except IntegrityError as error:
            raise IntegrityError(f"segment {index}: {error.message} ({self.where})") from error
        self._table.check(index, target, self.where)


class _Telling:
    """A writer that tells how much was written."""

    def __init__(self, writer: TierWriter, advance: Advance) -> None:
        self._writer = writer
        self._advance = advance

    def write(self, buffer: ReadableBuffer) -> None:
        self._writer.write(buffer)
        self._advance(_num_bytes(buffer))
