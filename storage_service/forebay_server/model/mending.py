"""What a damaged file has to be written anew for, and where the pieces of those lie then.

A file belongs to one blob as a whole, or to several in pieces, or both. What any of them needs of
it is put, in the order of the old file, into a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectExtent
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import SegmentTable, SegmentTableBuilder


@dataclass(frozen=True)
class Segment:
    """A segment of a blob, and where its replica has it."""

    number: int
    file: str
    offset: int
    """Of the file's plain bytes."""
    num_bytes: int
    digest: bytes
    """BLAKE3."""


@dataclass(frozen=True)
class HolderRow:
    """A replica that names a file."""

    replica_id: str
    blob: str
    encoding: str
    is_live: bool
    list_file: str
    """Empty: it is a whole file."""
    list_bytes: int
    extents: tuple[ObjectExtent, ...]
    """Without the list."""

    @property
    def files(self) -> list[str]:
        """Those of its bytes, in the order in which they come."""
        return list(dict.fromkeys(one.file for one in self.extents))


@dataclass(frozen=True)
class Holder(HolderRow):
    """A replica that names a file, with what is to lie there."""

    table: SegmentTable

    @property
    def is_whole(self) -> bool:
        """Whether its one file is all of it, with its table at the end."""
        return self.encoding != PIECES

    @property
    def segments(self) -> Iterator[Segment]:
        """All of it, in order; not kept, as many may share a file. :class:`IntegrityError` if its
        pieces cut a segment."""
        offsets = self.table.offsets.tolist()
        entries = self.table.entries
        for one in self.extents:
            covered = self.table.covering(one.blob_offset, one.num_bytes)
            stop = one.blob_offset + one.num_bytes
            if covered and (offsets[covered.start], offsets[covered.stop]) != (
                one.blob_offset,
                stop,
            ):
                raise IntegrityError(
                    f"blob {self.blob} has pieces that are no whole segments: its replica "
                    f"{self.replica_id} cannot be mended"
                )
            for number in covered:
                yield Segment(
                    number,
                    one.file,
                    one.file_offset + offsets[number] - one.blob_offset,
                    offsets[number + 1] - offsets[number],
                    entries["blake3"][number].tobytes(),
                )

    def lost(self, found: Collection[bytes], file: str | None = None) -> list[Segment]:
        """Its segments, of one *file* if given, that are not among the digests *found*."""
        return [
            one for one in self.segments if file in (None, one.file) and one.digest not in found
        ]


@dataclass(frozen=True)
class NewFile:
    """What takes the place of a damaged file."""

    table: SegmentTable
    starts: dict[int, int]
    """Offset of a segment in the old file to that in the new one."""

    @classmethod
    def of(cls, holders: Sequence[Holder], file: str) -> NewFile:
        """With all that *holders* need of *file*, once, in its order."""
        needed: dict[int, tuple[Holder, int]] = {}
        for holder in holders:
            for one in holder.segments:
                if one.file == file:
                    needed.setdefault(one.offset, (holder, one.number))
        builder = SegmentTableBuilder()
        starts: dict[int, int] = {}
        position = 0
        for offset in sorted(needed):
            holder, number = needed[offset]
            entry = holder.table.entries[number]
            length = int(entry["length"])
            builder.append((length, entry["blake3"].tobytes(), int(entry["xxh3"])))
            starts[offset] = position
            position += length
        return cls(builder.build(), starts)

    def pieces(
        self, holder: Holder, old: str, new: str, new_bytes: int
    ) -> tuple[ObjectExtent, ...]:
        """Where *holder* lies once *new* has taken the place of *old*."""
        return tuple(
            one
            if one.file != old
            else replace(
                one, file=new, file_offset=self.starts[one.file_offset], file_bytes=new_bytes
            )
            for one in holder.extents
        )


def numbers_in_words(segments: Sequence[Segment], most: int = 8) -> str:
    """The numbers of *segments* for people: ``3, 4, 17 and 5 more``."""
    numbers = [str(one.number) for one in segments]
    rest = len(numbers) - most
    return ", ".join(numbers[:most]) + (f" and {rest} more" if rest > 0 else "")
