"""Segments of a blob wherever good ones lie: looked for, each read and checked, and put together.

XXH3 or a file's name say nothing here: what counts as the segment is what has its BLAKE3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from blake3 import blake3

from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.model.mending import Holder, Segment
from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.encode import open_plain, read_list
from forebay_server.tier.image import ImageReader
from forebay_server.tier.store import Tier, TierReader
from forebay_server.tier.verify import read_table
from forebay_wire.errors import IntegrityError, NotFound, StorageError
from forebay_wire.segments import SegmentTable

MAX_OPEN: Final = 64
"""Files that one reader has open at a time."""

_NOT_THERE: Final = (IntegrityError, NotFound)


@dataclass(frozen=True)
class Spot:
    """Where a good segment lies."""

    tier: Tier
    file: str
    encoding: str
    offset: int
    """Of the file's plain bytes."""
    blob: str | None = None
    """Whose pieces or differences *file* leads to; None: it has the bytes itself."""


Advance = Callable[[str, int], object]
"""Told a tier and how many bytes were read there; may wait, or raise to end it."""


class SegmentFinder:
    """Looks for segments by their BLAKE3. One thread at a time; its methods block."""

    def __init__(self, wanted: Mapping[bytes, int], advance: Advance) -> None:
        """*wanted*: BLAKE3 to length."""
        self.missing = dict(wanted)
        """What was not found yet."""
        self.found: dict[bytes, Spot] = {}
        self.num_copies = 0
        """That were looked at."""
        self.unread = ""
        """Why a tier could not be asked; empty: all answered."""
        self._advance = advance
        self._tried: set[tuple[str, str, int]] = set()

    def survey(
        self, tier: Tier, file: str, encoding: str, segments: Iterable[Segment]
    ) -> frozenset[int]:
        """Read all *segments*, which are to lie in *file* of *tier*, as its medium has them; the
        offsets of those that are bad. What is missing after that may be looked for there again."""
        places = {one.offset: one for one in segments}
        bad = set(places)
        try:
            with open_plain(tier, file, encoding, None, read=tier.read_medium) as reader:
                for offset, one in sorted(places.items()):
                    if self._is_good(reader, one, tier):
                        bad.discard(offset)
                        self._take(one, Spot(tier, file, encoding, offset))
        except _NOT_THERE:
            pass
        return frozenset(bad)

    def look_in_file(
        self,
        tier: Tier,
        file: str,
        encoding: str,
        segments: Iterable[Segment],
        *,
        blob: str | None = None,
    ) -> None:
        """Read those of *segments*, which are to lie in *file* of *tier*, that are missing. *blob*:
        whose raw image it is."""
        wanted = [one for one in segments if one.digest in self.missing]
        if not wanted:
            return
        try:
            with open_plain(tier, file, encoding, blob) as reader:
                for one in wanted:
                    place = (tier.name, file, one.offset)
                    if one.digest not in self.missing or place in self._tried:
                        continue
                    self._tried.add(place)
                    if self._is_good(reader, one, tier):
                        self._take(one, Spot(tier, file, encoding, one.offset, blob))
        except _NOT_THERE:
            pass
        except StorageError as error:
            self.unread = self.unread or error.message

    def look_in_copy(
        self, tier: Tier, file: str, encoding: str, blob: str, table: SegmentTable | None = None
    ) -> None:
        """The same with a copy of *blob* in *tier*, whose segments are *table* if that is known."""
        self.num_copies += 1
        try:
            found = _read_layout(tier, file, encoding, blob, table)
        except _NOT_THERE:
            return
        except StorageError as error:
            self.unread = self.unread or error.message
            return
        if found.has_layers:  # differences: what lies in one file alone is none of its segments
            whole = (ObjectExtent(0, 0, found.table.total_bytes, 0, file),)
            segments = Holder("", blob, encoding, True, "", 0, whole, found.table).segments
            self.look_in_file(tier, file, encoding, segments, blob=blob)
            return
        self._look_in_pieces(tier, found, blob)

    def _look_in_pieces(self, tier: Tier, found: ObjectBlob, blob: str) -> None:
        holder = Holder("", blob, found.encoding, True, "", 0, found.extents, found.table)
        by_file: dict[str, list[Segment]] = {}
        for one in holder.segments:
            if one.digest in self.missing:
                by_file.setdefault(one.file, []).append(one)
        encodings = {one.file: one.encoding for one in found.extents}
        for name, segments in by_file.items():
            self.look_in_file(tier, name, encodings[name], segments)

    def _is_good(self, reader: TierReader, one: Segment, tier: Tier) -> bool:
        self._advance(tier.name, one.num_bytes)
        try:
            return is_at(reader, one, one.offset)
        except _NOT_THERE:
            return False

    def _take(self, one: Segment, spot: Spot) -> None:
        self.found.setdefault(one.digest, spot)
        self.missing.pop(one.digest, None)


def is_at(reader: TierReader, segment: Segment, offset: int) -> bool:
    """Whether *segment* lies at *offset*. :class:`IntegrityError` if that cannot be read."""
    with SEGMENT_BUFFERS.borrow() as buffer:
        view = buffer[: segment.num_bytes]
        reader.read_into(offset, view)
        return blake3(view).digest() == segment.digest


def _read_layout(
    tier: Tier, file: str, encoding: str, blob: str, table: SegmentTable | None
) -> ObjectBlob:
    """What a copy says of its segments and where they lie; of a whole file *table* will do."""
    if encoding == PIECES or tier.kind == "object":
        return read_list(tier, file, blob)
    if table is None:
        with open_plain(tier, file, encoding, blob) as reader:
            table = read_table(reader, blob)
    return ObjectBlob(table, (ObjectExtent(0, 0, table.total_bytes, 0, file, encoding),), encoding)


class MendedReader(ImageReader):
    """The raw image of a blob put together from segments that lie anywhere. One thread at a time.

    Whoever copies it checks each segment by BLAKE3, as with any other.
    """

    def __init__(self, table: SegmentTable, spots: Mapping[bytes, Spot], where: str) -> None:
        super().__init__(table, where)
        self._spots = spots
        self._starts: list[int] = table.offsets.tolist()
        self._readers: dict[tuple[str, str], TierReader] = {}

    def close(self) -> None:
        while self._readers:
            self._readers.popitem()[1].close()

    def _read_data(self, offset: int, view: memoryview) -> None:
        for spot, start, stop in self._runs(offset, offset + len(view)):
            self._reader(spot).read_into(spot.offset, view[start - offset : stop - offset])

    def _runs(self, start: int, stop: int) -> Iterator[tuple[Spot, int, int]]:
        """Place of the first byte, begin and end of parts of [start, stop) that lie together."""
        run: tuple[Spot, int, int] | None = None
        for number, first, last in self._table.parts_of(start, stop):
            begin = self._starts[number]
            found = self._spots[self._table.entries["blake3"][number].tobytes()]
            spot = replace(found, offset=found.offset + first)
            if run is not None and spot == replace(run[0], offset=run[0].offset + run[2] - run[1]):
                run = run[0], run[1], begin + last
                continue
            if run is not None:
                yield run
            run = spot, begin + first, begin + last
        if run is not None:
            yield run

    def _reader(self, spot: Spot) -> TierReader:
        name = spot.tier.name, spot.file
        if name not in self._readers:
            if len(self._readers) == MAX_OPEN:
                self.close()
            self._readers[name] = open_plain(spot.tier, spot.file, spot.encoding, spot.blob)
        return self._readers[name]
