"""Writes a blob file of segments some of which are differences from those of another blob.

The file is like any other: its table has what lies in it, differences among it. An extent list says
which pieces of other files belong to those, see ``docs/formats/blob-extents.md``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from forebay_server.model.deltas import pays
from forebay_server.model.encodings import Way, best_way, encoding_of, ways_to_try
from forebay_server.tier.buffers import SEGMENT_BUFFERS, BufferPool
from forebay_server.tier.encode import (
    Advance,
    Encoded,
    Entry,
    Pipeline,
    StoredFile,
    add_encoded,
    middle_of,
    sample_ranges,
    tried,
)
from forebay_server.tier.encoded import ENTRY_DTYPE, EncodedIndex, encoded_bytes_for
from forebay_server.tier.layers import xor_into
from forebay_server.tier.store import Tier, TierReader
from forebay_server.tier.verify import read_table
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.segments import SegmentDigests, SegmentTable, SegmentTableBuilder, digest_segment

BASE_BUFFERS: Final = BufferPool(8)
"""For what segments are compared with. Taken by threads that hold one segment buffer."""


class DamagedBase(Exception):
    """What segments would be differences from is no good where it is read: they are stored
    whole."""


@dataclass(frozen=True)
class BaseReader:
    """Segments of another blob, for each segment of one that is written."""

    reader: TierReader
    table: SegmentTable
    numbers: Sequence[int | None]
    """Of the segment, as long as that one, which it may be a difference from."""

    def read(self, number: int, target: memoryview, skip: int = 0) -> None:
        """Fill *target* with segment *number*, from its byte *skip* on; not checked."""
        try:
            self.reader.read_into(int(self.table.offsets[number]) + skip, target)
        except (IntegrityError, NotFound) as error:
            raise DamagedBase(error.message) from error

    def check(self, number: int, found: memoryview) -> None:
        """:class:`DamagedBase` unless *found* is segment *number*."""
        try:
            self.table.check(number, found, self.reader.where)
        except IntegrityError as error:
            raise DamagedBase(error.message) from error


@dataclass(frozen=True)
class DeltaFile:
    """A file that was just published, and which of its segments are differences."""

    stored: StoredFile
    is_delta: tuple[bool, ...]
    plain_bytes: int
    """Of the segments that are differences."""
    delta_bytes: int
    """What these take."""


def encode_deltas(
    reader: TierReader,
    base: BaseReader,
    tier: Tier,
    file: str,
    setting: str,
    *,
    advance: Advance = lambda num_bytes: None,
) -> DeltaFile | None:
    """Like :func:`~forebay_server.tier.encode.encode_into`, with those segments as differences
    from *base* for which samples say that it pays; None, and nothing written, if that is none.

    Every segment is checked by BLAKE3 on its way, and what it is compared with by XXH3:
    :class:`DamagedBase` if that is wrong.
    """
    table = read_table(reader, None)
    ways = _choose(reader, table, base, setting)
    if not ways:
        return None
    pipeline = _DeltaPipeline(reader, table, ways, base)
    with tier.create(
        tier.blob_name(file), encoded_bytes_for(table.total_bytes, table.num_segments)
    ) as writer:
        entries = np.array(pipeline.write_all(writer, advance), dtype=ENTRY_DTYPE)
        index = EncodedIndex(pipeline.table(), entries)
        writer.write(index.encode(encoding_of(ways)))
        writer.publish()
    size = encoded_bytes_for(index.offsets[-1], table.num_segments)
    is_delta = np.array(pipeline.is_delta, dtype=bool)
    return DeltaFile(
        StoredFile(encoding_of(ways), size, index.table),
        tuple(pipeline.is_delta),
        int(table.entries["length"][is_delta].sum()),
        int(entries["stored_length"][is_delta].sum()),
    )


def _choose(
    reader: TierReader, table: SegmentTable, base: BaseReader, setting: str
) -> tuple[Way, ...]:
    """The ways that are the best for samples of the blob; none if no difference pays."""
    ways = ways_to_try(setting)
    found: list[Way] = []
    is_worth_it = False
    if not ways or not table.num_segments:
        return ()
    with SEGMENT_BUFFERS.borrow() as buffer:
        for index, start, stop in sample_ranges(table.offsets.tolist()):
            sample = buffer[: stop - start]
            reader.read_into(start, sample)
            whole = tried(ways, sample)
            best = best_way(whole)
            if (number := base.numbers[index]) is not None:
                other = memoryview(bytearray(len(sample)))
                base.read(number, other, start - int(table.offsets[index]))
                xor_into(other, sample)
                delta = tried(ways, other)
                if pays(delta[best_way(delta)], whole[best]):
                    best, is_worth_it = best_way(delta), True
            found.append(best)
    return tuple(dict.fromkeys(found)) if is_worth_it else ()


class _DeltaPipeline(Pipeline):
    """Encodes each segment, or its difference from another, whichever its middle speaks for."""

    def __init__(
        self, reader: TierReader, table: SegmentTable, ways: Sequence[Way], base: BaseReader
    ) -> None:
        super().__init__(reader, table, ways)
        self._base = base
        self._buffers: deque[memoryview] = deque()
        self._digests: list[SegmentDigests | None] = [None] * table.num_segments
        self.is_delta = [False] * table.num_segments

    def table(self) -> SegmentTable:
        """Of what was written."""
        builder = SegmentTableBuilder()
        for index, digests in enumerate(self._digests):
            entry = self._table.entries[index]
            own = int(entry["length"]), entry["blake3"].tobytes(), int(entry["xxh3"])
            builder.append(own if digests is None else digests)
        return builder.build()

    def _next_buffer(self) -> memoryview | None:
        if (buffer := super()._next_buffer()) is None:
            return None
        # Whoever holds one of these holds all that it needs to go on.
        other = BASE_BUFFERS.take_if_free() if self._running else BASE_BUFFERS.take()
        if other is None:
            SEGMENT_BUFFERS.give_back(buffer)
            return None
        self._buffers.append(other)
        return buffer

    def _give_back(self, buffer: memoryview) -> None:
        super()._give_back(buffer)
        BASE_BUFFERS.give_back(self._buffers.popleft())

    def _read(self, group: range, piece: memoryview) -> Callable[[range, memoryview, int], Encoded]:
        self._reader.read_into(self._offsets[group.start], piece)
        other = self._buffers[-1]
        position = 0
        for index in group:
            length = self._offsets[index + 1] - self._offsets[index]
            if (number := self._base.numbers[index]) is not None:
                self._base.read(number, other[position : position + length])
            position += length
        return partial(self._encode_deltas, other)

    def _encode_deltas(
        self, other: memoryview, part: range, piece: memoryview, start: int
    ) -> Encoded:
        """On a codec thread: check and encode the segments *part* of *piece*; *other* has what they
        are compared with."""
        stored: list[memoryview] = []
        entries: list[Entry] = []
        for index in part:
            first, last = self._offsets[index] - start, self._offsets[index + 1] - start
            plain, below = piece[first:last], other[first:last]
            self._table.check_identity(index, plain, self._reader.where)
            way, written = self._pick(index, plain, below)
            if written is below:
                self._digests[index] = digest_segment(written)
                self.is_delta[index] = True
            add_encoded(stored, entries, way, written)
        return stored, entries

    def _pick(self, index: int, plain: memoryview, below: memoryview) -> tuple[Way, memoryview]:
        """What is written of segment *index*, and the way for it: *plain*, or *below* with the
        difference of both put into it."""
        middle = middle_of(len(plain))
        whole = tried(self._ways, plain[middle])
        best = best_way(whole)
        if (number := self._base.numbers[index]) is None:
            return best, plain
        sample = memoryview(bytearray(below[middle]))
        xor_into(sample, plain[middle])
        delta = tried(self._ways, sample)
        way = best_way(delta)
        if not pays(delta[way], whole[best]):
            return best, plain
        self._base.check(number, below)
        xor_into(below, plain)
        return way, below
