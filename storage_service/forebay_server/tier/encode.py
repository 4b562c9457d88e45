"""Blob files at rest: read as if they were raw, written in the encoding that a tier wants.

Identity and digests stay those of the plain bytes; what decodes wrong is never given out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from forebay_server.model.encodings import (
    PIECES,
    RAW,
    RAW_WAY,
    Way,
    best_way,
    choose_ways,
    encoding_of,
    ways_to_try,
)
from forebay_server.model.extents import ObjectBlob
from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.codecs import CODEC_THREADS, encode_segment, shares
from forebay_server.tier.encoded import (
    ENTRY_DTYPE,
    EncodedIndex,
    encoded_bytes_for,
    read_index,
)
from forebay_server.tier.encoded_reader import EncodedReader
from forebay_server.tier.layers import LayeredReader
from forebay_server.tier.pieces import PiecesReader
from forebay_server.tier.store import Tier, TierReader, TierWriter
from forebay_server.tier.verify import copy_bytes, copy_verified, read_table, segment_groups
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.segments import SegmentTable, xxh3

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

NUM_SAMPLES: Final = 8
SAMPLE_BYTES: Final = 64 << 10
"""What is tried of a blob: so much of the middle of so many segments."""

NUM_AHEAD: Final = 4
"""Buffers of segments that one copy has in work at a time, where so many are free."""

BLOBS: Final = "blobs/"
"""Where extent lists lie in the object tier."""

Advance = Callable[[int], object]


@dataclass(frozen=True)
class StoredFile:
    """A blob file that was just published."""

    encoding: str
    num_bytes: int
    """Size of the file."""
    table: SegmentTable
    is_proven: bool = False
    """The tier has compared what it keeps with a checksum of bytes that matched their digests."""


def open_plain(
    tier: Tier,
    file: str,
    encoding: str,
    blob: str | None,
    *,
    stored_bytes: int | None = None,
    read: Callable[[str], TierReader] | None = None,
) -> TierReader:
    """A reader of the raw image (data, segment table, trailer) of blob file *file* of *tier*.

    Reading a range decodes the segments that it touches, and only those; each is checked by XXH3.
    With *stored_bytes* the file has to have that size; *read* opens it in place of ``tier.read``.
    :class:`NotFound`, :class:`IntegrityError`, :class:`StorageError` as :meth:`Tier.read`. Raw ones
    have descriptors where the tier has.
    """
    if encoding == PIECES:
        return _open_pieces(tier, file, blob, read or tier.read)
    inner = (read or tier.read)(tier.blob_name(file))
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


def read_list(tier: Tier, file: str, blob: str | None) -> ObjectBlob:
    """The extent list of a *blob* that lies in pieces in *tier*; *file* is its replica's first."""
    if tier.kind == "object":
        if blob is None:
            raise NotFound(f"file {file} of tier {tier.name} belongs to a blob that is not named")
        return ObjectBlob.decode(tier.get(BLOBS + blob), f"tier {tier.name}, {BLOBS}{blob}", blob)
    return ObjectBlob.decode(tier.get(file), f"tier {tier.name}, file {file}", blob)


def _open_pieces(
    tier: Tier, file: str, blob: str | None, read: Callable[[str], TierReader]
) -> TierReader:
    found = read_list(tier, file, blob)
    sizes = {one.file: (one.encoding, one.file_bytes) for one in found.extents}
    readers: dict[str, TierReader] = {}
    with ExitStack() as undo:
        for name, (encoding, file_bytes) in sizes.items():
            reader = open_plain(tier, name, encoding, None, stored_bytes=file_bytes, read=read)
            undo.callback(reader.close)
            readers[name] = reader
        undo.pop_all()
    made = LayeredReader if found.has_layers else PiecesReader
    return made(found, readers, f"tier {tier.name}, file {file}")


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
    ways = _choose(reader, table, setting)
    name = tier.blob_name(file)
    if not ways:
        with tier.create(name, copy_bytes(table)) as writer:
            copy_verified(reader, _Telling(writer, advance), blob)
            writer.publish()
        return StoredFile(RAW, copy_bytes(table), table, writer.is_proven)
    with tier.create(name, encoded_bytes_for(table.total_bytes, table.num_segments)) as writer:
        entries = Pipeline(reader, table, ways).write_all(writer, advance)
        index = EncodedIndex(table, np.array(entries, dtype=ENTRY_DTYPE))
        writer.write(index.encode(encoding_of(ways)))
        writer.publish()
    num_bytes = encoded_bytes_for(index.offsets[-1], table.num_segments)
    return StoredFile(encoding_of(ways), num_bytes, table)


def _choose(reader: TierReader, table: SegmentTable, setting: str) -> tuple[Way, ...]:
    """The ways that pay most for this blob, by trying all on samples of it; none: it stays raw."""
    ways = ways_to_try(setting)
    if not ways or not table.num_segments:
        return ()
    plain_bytes = 0
    encoded: list[dict[Way, int]] = []
    with SEGMENT_BUFFERS.borrow() as buffer:
        for _, start, stop in sample_ranges(table.offsets.tolist()):
            sample = buffer[: stop - start]
            reader.read_into(start, sample)
            plain_bytes += len(sample)
            encoded.append(tried(ways, sample))
    return choose_ways(plain_bytes, encoded)


def tried(ways: Iterable[Way], sample: memoryview) -> dict[Way, int]:
    """What *sample* takes in each of *ways*, in bytes."""
    most = len(sample)
    return {way: min(len(encode_segment(way, sample)), most) + ENTRY_DTYPE.itemsize for way in ways}


def _way_of(ways: Sequence[Way], segment: memoryview) -> Way:
    """That of *ways* which is the best for the middle of *segment*."""
    if len(ways) == 1:
        return ways[0]
    return best_way(tried(ways, segment[middle_of(len(segment))]))


def middle_of(num_bytes: int) -> slice:
    """What is tried of a segment of *num_bytes*: from a multiple of 64, where elements begin."""
    start = max(0, num_bytes - SAMPLE_BYTES) // 2 // 64 * 64
    return slice(start, min(num_bytes, start + SAMPLE_BYTES))


def sample_ranges(offsets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Segments that are spread over the blob, with parts ``[start, stop)`` of it in them: a
    sixteenth of it, at most 512 KiB."""
    total = offsets[-1]
    wanted = min(max(total // (16 * SAMPLE_BYTES), 1), NUM_SAMPLES)
    # By bytes: small segments at the end would speak for a large one.
    picked = {bisect_right(offsets, total * (2 * one + 1) // (2 * wanted)) for one in range(wanted)}
    for index in sorted(one - 1 for one in picked):
        start = offsets[index]
        part = middle_of(offsets[index + 1] - start)
        yield index, start + part.start, start + part.stop


Entry = tuple[int, int, int, int, int]
Encoded = tuple[list[memoryview], list[Entry]]


def add_encoded(
    stored: list[memoryview], entries: list[Entry], way: Way, plain: memoryview
) -> None:
    """Add a segment in *way*, or as it is if that is no larger, with its entry."""
    encoded = encode_segment(way, plain)
    if len(encoded) >= len(plain):
        encoded, way = plain, RAW_WAY
    stored.append(encoded)
    entries.append((len(encoded), int(way.method), way.width, 0, xxh3(encoded)))


class Pipeline:
    """Encodes the segments of one blob on the codec threads, a few buffers ahead of the writer."""

    def __init__(self, reader: TierReader, table: SegmentTable, ways: Sequence[Way]) -> None:
        self._reader = reader
        self._table = table
        self._ways = ways
        self._offsets: list[int] = table.offsets.tolist()
        self._running: deque[tuple[memoryview, list[Future[Encoded]]]] = deque()

    def write_all(self, writer: TierWriter, advance: Advance) -> list[Entry]:
        """Write all segments in order; their entries in the index."""
        entries: list[Entry] = []
        try:
            for group in segment_groups(self._offsets, SEGMENT_BUFFERS.buffer_bytes):
                while (buffer := self._next_buffer()) is None:
                    self._write_first(writer, advance, entries)
                self._begin(buffer, group)
            while self._running:
                self._write_first(writer, advance, entries)
        finally:
            self._give_up()
        return entries

    def _next_buffer(self) -> memoryview | None:
        """Waits only where nothing is held."""
        if not self._running:
            return SEGMENT_BUFFERS.take()
        return SEGMENT_BUFFERS.take_if_free() if len(self._running) < NUM_AHEAD else None

    def _begin(self, buffer: memoryview, group: range) -> None:
        """Read a group of segments and have them encoded."""
        futures: list[Future[Encoded]] = []
        self._running.append((buffer, futures))
        start = self._offsets[group.start]
        piece = buffer[: self._offsets[group.stop] - start]
        encode = self._read(group, piece)
        futures.extend(
            CODEC_THREADS.submit(encode, part, piece, start) for part in shares(group, len(piece))
        )

    def _read(self, group: range, piece: memoryview) -> Callable[[range, memoryview, int], Encoded]:
        """Fill *piece* with a group of segments; what encodes some of them."""
        self._reader.read_into(self._offsets[group.start], piece)
        return self._encode

    def _encode(self, part: range, piece: memoryview, start: int) -> Encoded:
        """On a codec thread: check and encode the segments *part* of *piece*."""
        stored: list[memoryview] = []
        entries: list[Entry] = []
        for index in part:
            plain = piece[self._offsets[index] - start : self._offsets[index + 1] - start]
            self._table.check_identity(index, plain, self._reader.where)
            add_encoded(stored, entries, _way_of(self._ways, plain), plain)
        return stored, entries

    def _write_first(self, writer: TierWriter, advance: Advance, entries: list[Entry]) -> None:
        buffer, futures = self._running[0]
        for future in futures:
            stored, made = future.result()
            for piece in stored:
                writer.write(piece)
            first = len(entries)
            entries.extend(made)
            advance(int(self._offsets[len(entries)] - self._offsets[first]))
        self._running.popleft()
        self._give_back(buffer)

    def _give_up(self) -> None:
        """Nobody uses the buffers any more when they go back."""
        for buffer, futures in self._running:
            wait(futures)
            self._give_back(buffer)
        self._running.clear()

    def _give_back(self, buffer: memoryview) -> None:
        SEGMENT_BUFFERS.give_back(buffer)


def _num_bytes(buffer: ReadableBuffer) -> int:
    return memoryview(buffer).nbytes


class _Telling:
    """A writer that tells how much was written."""

    def __init__(self, writer: TierWriter, advance: Advance) -> None:
        self._writer = writer
        self._advance = advance

    def write(self, buffer: ReadableBuffer) -> None:
        self._writer.write(buffer)
        self._advance(_num_bytes(buffer))
