"""Which segments of a new blob lie in the tier already, and may be referenced instead of written.

What a run has saved is looked through newest first. A blob refers to few files, so that it can be
handed over at once, and not to what many others refer to unless another tier has that, too: the
bytes are written anew then, and later blobs refer to those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from forebay_server.model.encodings import RAW
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_wire.segments import SegmentTable

MAX_SOURCES: Final = 15
"""Files of others that one blob refers to: with its own and its list it fits one answer many
times."""

MAX_SHARERS: Final = 8
"""Replicas that may name a file, unless what they share is in the object tier."""


@dataclass(frozen=True)
class Placed:
    """Where a segment lies. ``file`` is empty for the file that is being written."""

    file: str
    offset: int
    """Of the file's plain bytes."""
    num_bytes: int
    file_bytes: int
    encoding: str = RAW

    def follows(self, other: Placed) -> bool:
        """Whether this lies right behind *other*."""
        return self.file == other.file and self.offset == other.offset + other.num_bytes


@dataclass(frozen=True)
class Source:
    """A replica whose segments may be referenced."""

    table: SegmentTable
    extents: tuple[ObjectExtent, ...]
    is_remote: bool = False
    """Whether the object tier has all of it, too."""

    @classmethod
    def of(cls, found: ObjectBlob, *, is_remote: bool = False) -> Source:
        """What an extent list names."""
        return cls(found.table, found.extents, is_remote)

    def segments(self) -> Iterator[tuple[bytes, Placed]]:
        """BLAKE3 and place of each segment that lies in one piece."""
        pieces = iter(self.extents)
        piece = next(pieces, None)
        digests = self.table.entries["blake3"]
        offsets = self.table.offsets.tolist()
        for index, (start, stop) in enumerate(pairwise(offsets)):
            while piece is not None and piece.blob_offset + piece.num_bytes <= start:
                piece = next(pieces, None)
            if piece is None or stop > piece.blob_offset + piece.num_bytes:
                continue
            place = piece.file_offset + start - piece.blob_offset
            yield (
                digests[index].tobytes(),
                Placed(piece.file, place, stop - start, piece.file_bytes, piece.encoding),
            )


def known_segments(
    sources: Sequence[Source], num_sharers: Mapping[str, int]
) -> dict[bytes, Placed]:
    """Digest to place of what a new blob may refer to: of equal segments that of the first source.

    *num_sharers*: file to the replicas that name it by now.
    """
    known: dict[bytes, Placed] = {}
    for source in sources:
        for digest, placed in source.segments():
            if source.is_remote or num_sharers.get(placed.file, 0) < MAX_SHARERS:
                known.setdefault(digest, placed)
    return _of_few_files(known)


def _of_few_files(known: dict[bytes, Placed]) -> dict[bytes, Placed]:
    weights: Counter[str] = Counter()
    for placed in known.values():
        weights[placed.file] += placed.num_bytes
    if len(weights) <= MAX_SOURCES:
        return known
    kept = {file for file, _ in weights.most_common(MAX_SOURCES)}
    return {digest: placed for digest, placed in known.items() if placed.file in kept}


@dataclass(frozen=True)
class Division:
    """Which segments of a blob have to be written, and where all of them lie then."""

    placed: tuple[Placed, ...]
    own: tuple[int, ...]
    """Numbers of the segments that are new."""

    @classmethod
    def of(cls, table: SegmentTable, known: Mapping[bytes, Placed]) -> Division:
        """Of a blob with *table*, where *known* segments lie in its tier."""
        seen = dict(known)
        placed: list[Placed] = []
        own: list[int] = []
        own_bytes = 0
        for index, entry in enumerate(table.entries):
            length, digest = int(entry["length"]), entry["blake3"].tobytes()
            found = seen.get(digest)
            if found is None:
                found = seen[digest] = Placed("", own_bytes, length, 0)
                own.append(index)
                own_bytes += length
            placed.append(found)
        return cls(tuple(placed), tuple(own))


def merged(
    placed: Iterable[Placed], own_file: str, own_file_bytes: int, own_encoding: str = RAW
) -> Iterator[ObjectExtent]:
    """The extents of a blob whose segments lie as *placed* says, in blob order; *own_file* stands
    for the empty name."""
    last: ObjectExtent | None = None
    offset = 0
    own = own_file, own_file_bytes, own_encoding
    for one in placed:
        file, size, encoding = (one.file, one.file_bytes, one.encoding) if one.file else own
        if (
            last is not None
            and last.file == file
            and last.file_offset + last.num_bytes == one.offset
        ):
            last = replace(last, num_bytes=last.num_bytes + one.num_bytes)
        else:
            if last is not None:
                yield last
            last = ObjectExtent(offset, one.offset, one.num_bytes, size, file, encoding)
        offset += one.num_bytes
    if last is not None:
        yield last


@dataclass(frozen=True)
class Named:
    """Bytes of a file that a replica names."""

    file: str
    start: int
    stop: int
    is_live: bool


def unsafe(pieces: Iterable[ObjectExtent], named: Collection[Named]) -> list[ObjectExtent]:
    """Those of *pieces* that are not wholly named by replicas in service, or are by one that is
    not."""
    by_file: dict[str, list[Named]] = {}
    for one in sorted(named, key=lambda one: one.start):
        by_file.setdefault(one.file, []).append(one)
    return [piece for piece in pieces if not _is_safe(piece, by_file.get(piece.file, ()))]


def _is_safe(piece: ObjectExtent, named: Iterable[Named]) -> bool:
    reached, stop = piece.file_offset, piece.file_offset + piece.num_bytes
    for one in named:
        if one.stop <= piece.file_offset or one.start >= stop:
            continue
        if not one.is_live:
            return False
        if one.start <= reached:
            reached = max(reached, one.stop)
    return reached >= stop
