"""Copies a blob into the object tier: what is new of it, whole or as differences. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from forebay_server.catalog.queries_blobs import Replica
from forebay_server.model.deltas import Base, on_base
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.model.sharing import Division, merged
from forebay_server.publish.known import Shareable
from forebay_server.tier.deltas import BaseReader, DamagedBase, DeltaFile, encode_deltas
from forebay_server.tier.encode import StoredFile, encode_into, open_plain
from forebay_server.tier.pieces import segments_of
from forebay_server.tier.store import Tier, TierReader
from forebay_server.tier.verify import read_table
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MAX_PIECES_PER_BLOB
from forebay_wire.segments import SegmentTable


@dataclass(frozen=True)
class Place:
    """A replica of a blob, and the tier that it lies in."""

    blob: str
    tier: Tier
    replica: Replica

    def open(self) -> TierReader:
        """The blob's raw image."""
        first = self.replica.extents[0].file
        return open_plain(self.tier, first, self.replica.encoding, self.blob)


@dataclass(frozen=True)
class Made:
    """A blob that has been copied, up to its list."""

    found: ObjectBlob
    file: str
    stored: StoredFile | None
    """What was written into *file*; None: nothing was new."""
    deltas: DeltaFile | None = None
    """The same, if some of it are differences."""


def copy_blob(
    source: Place,
    tier: Tier,
    advance: Callable[[int], object],
    shareable: Shareable | None = None,
    near: Place | None = None,
) -> Made:
    """Copy what *tier* does not have yet of the blob at *source*, verified; *near* is where the
    pack that it may have differences from is read, which is faster there."""
    with source.open() as reader:
        table = read_table(reader, source.blob)
        known = shareable.segments if shareable is not None else {}
        copy = _Copy(reader, table, Division.of(table, known), tier, advance)
        if shareable is None:
            return copy.whole(source.blob)
        if near is not None and shareable.base is not None and copy.division.own:
            made = copy.with_deltas(shareable.base, near)
            if made is not None:
                return made
        if len(copy.division.own) < table.num_segments:
            return copy.what_is_new()
        return copy.whole(source.blob)


@dataclass(frozen=True)
class _Copy:
    """One copy of one blob."""

    reader: TierReader
    table: SegmentTable
    division: Division
    tier: Tier
    advance: Callable[[int], object]

    def whole(self, blob: str) -> Made:
        file = new_random_name()
        stored = encode_into(
            self.reader, self.tier, file, self.tier.encoding, blob, advance=self.advance
        )
        return Made(_whole(stored, file), file, stored)

    def what_is_new(self) -> Made:
        """Copy the segments that are new, as a blob file of their own."""
        file = new_random_name()
        stored: StoredFile | None = None
        if self.division.own:
            own = segments_of(self.reader, self.table, self.division.own)
            stored = encode_into(
                own, self.tier, file, self.tier.encoding, None, advance=self.advance
            )
        return self._made(self.division, file, stored)

    def with_deltas(self, base: Base, near: Place) -> Made | None:
        """The same, with those as differences from *base* for which that pays; None if that is
        none, or they would make too many pieces.

        :class:`~forebay_server.tier.deltas.DamagedBase` if what lies at *near* is no good.
        """
        file = new_random_name()
        own = segments_of(self.reader, self.table, self.division.own)
        with _open_base(near) as other:
            found = replace(other, numbers=self._numbers(base, other.table))
            made = encode_deltas(
                own, found, self.tier, file, self.tier.encoding, advance=self.advance
            )
        if made is None:
            return None
        if not any(made.is_delta) and len(self.division.own) == self.table.num_segments:
            return Made(_whole(made.stored, file), file, made.stored)
        placed = on_base(self.division, base, self.table, made.is_delta)
        whole = self._made(replace(self.division, placed=placed), file, made.stored)
        if len(whole.found.extents) > MAX_PIECES_PER_BLOB:
            self.tier.delete(self.tier.blob_name(file))
            return None
        return replace(whole, deltas=made)

    def _numbers(self, base: Base, other: SegmentTable) -> list[int | None]:
        """Of the segments of *base*, which has the table *other*, for each that is new."""
        offsets, lengths = self.table.offsets, self.table.entries["length"]
        found: list[int | None] = []
        for number in self.division.own:
            offset = int(offsets[number])
            has_place = base.place(offset, int(lengths[number])) is not None
            found.append(int(np.searchsorted(other.offsets, offset)) if has_place else None)
        return found

    def _made(self, division: Division, file: str, stored: StoredFile | None) -> Made:
        size, encoding = (stored.num_bytes, stored.encoding) if stored else (0, RAW)
        extents = tuple(merged(division.placed, file, size, encoding))
        return Made(ObjectBlob(self.table, extents, PIECES), file, stored)


@contextmanager
def _open_base(near: Place) -> Iterator[BaseReader]:
    try:
        reader = near.open()
    except (IntegrityError, NotFound) as error:
        raise DamagedBase(error.message) from error
    with reader:
        try:
            table = read_table(reader, near.blob)
        except IntegrityError as error:
            raise DamagedBase(error.message) from error
        yield BaseReader(reader, table, ())


def _whole(stored: StoredFile, file: str) -> ObjectBlob:
    size = stored.table.total_bytes
    extent = ObjectExtent(0, 0, size, stored.num_bytes, file, stored.encoding)
    return ObjectBlob(stored.table, (extent,), stored.encoding)
