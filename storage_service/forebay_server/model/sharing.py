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
    below: tuple[Placed, ...] = ()
    """What lies there is the segment XOR all of these, which lie as they are."""

    @property
    def layers(self) -> tuple[Placed, ...]:
        """All that the segment is the XOR of."""
        if not self.below:
            return (self,)
        lowest = Placed(self.file, self.offset, self.num_bytes, self.file_bytes, self.encoding)
        return (lowest, *self.below)

    @property
    def files(self) -> Iterator[str]:
        """Those of all layers."""
        yield self.file
        for one in self.below:
            yield one.file

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

    @property
    def files(self) -> frozenset[str]:
        """All that its replica names."""
        return frozenset(one.file for one in self.extents)

    def segments(self) -> Iterator[tuple[int, bytes, Placed]]:
        """Offset, BLAKE3 and place of each segment that lies in one piece, layer by layer."""
        digests = self.table.entries["blake3"]
        num_layers = max((one.layer for one in self.extents), default=0) + 1
        lowest, *above = [
            _Walk([one for one in self.extents if one.layer == number])
            for number in range(num_layers)
        ]
        for index, (start, stop) in enumerate(pairwise(self.table.offsets.tolist())):
            below: list[Placed] = []
            for walk in above:
                if (found := walk.place(start, stop)) is None:
                    break
                below.append(found)
            if (placed := lowest.place(start, stop, tuple(below))) is not None:
                yield start, digests[index].tobytes(), placed


class _Walk:
    """Finds places in the pieces of one layer, for one range after the other."""

    def __init__(self, pieces: Iterable[ObjectExtent]) -> None:
        self._pieces = iter(pieces)
        self._piece = next(self._pieces, None)

    def place(self, start: int, stop: int, below: tuple[Placed, ...] = ()) -> Placed | None:
        """Where [start, stop) of the blob lies, if in one piece; on those *below*."""
        one = self._piece
        while one is not None and one.blob_offset + one.num_bytes <= start:
            one = self._piece = next(self._pieces, None)
        if one is None or start < one.blob_offset or stop > one.blob_offset + one.num_bytes:
            return None
        offset = one.file_offset + start - one.blob_offset
        return Placed(one.file, offset, stop - start, one.file_bytes, one.encoding, below)


def known_segments(
    sources: Sequence[Source], num_sharers: Mapping[str, int], first: Collection[str] = ()
) -> dict[bytes, Placed]:
    """Digest to place of what a new blob may refer to: of equal segments that of the first source.

    *num_sharers*: file to the replicas that name it by now. If they are too many, the files *first*
    are those that count.
    """
    known: dict[bytes, Placed] = {}
    for source in sources:
        full = {
            file
            for file in (() if source.is_remote else source.files)
            if num_sharers.get(file, 0) >= MAX_SHARERS
        }
        for _, digest, placed in source.segments():
            if full.isdisjoint(placed.files):
                known.setdefault(digest, placed)
    return _of_few_files(known, first)


def _of_few_files(known: dict[bytes, Placed], first: Collection[str]) -> dict[bytes, Placed]:
    weights: Counter[str] = Counter()
    for placed in known.values():
        for file in placed.files:
            weights[file] += placed.num_bytes
    if len(weights) <= MAX_SOURCES:
        return known
    ordered = sorted(weights, key=lambda file: (file in first, weights[file]), reverse=True)
    kept = set(ordered[:MAX_SOURCES])
    return {digest: placed for digest, placed in known.items() if kept.issuperset(placed.files)}


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
    """The extents of a blob whose segments lie as *placed* says, layer by layer, each in blob
    order; *own_file* stands for the empty name."""
    own = Placed(own_file, 0, 0, own_file_bytes, own_encoding)
    chains = [one.layers for one in placed]
    for layer in range(max(map(len, chains), default=0)):
        yield from _merged_layer(chains, layer, own)


def _merged_layer(
    chains: Sequence[tuple[Placed, ...]], layer: int, own: Placed
) -> Iterator[ObjectExtent]:
    last: ObjectExtent | None = None
    num_bytes = offset = 0
    for chain in chains:
        start, offset = offset, offset + chain[0].num_bytes
        if len(chain) <= layer:
            continue
        one = chain[layer]
        lies = one if one.file else own
        if (
            last is not None
            and (last.file, last.blob_offset + num_bytes) == (lies.file, start)
            and last.file_offset + num_bytes == one.offset
        ):
            num_bytes += one.num_bytes
            continue
        if last is not None:
            yield replace(last, num_bytes=num_bytes)
        num_bytes = one.num_bytes
        last = ObjectExtent(
            start, one.offset, num_bytes, lies.file_bytes, lies.file, lies.encoding, layer
        )
    if last is not None:
        yield replace(last, num_bytes=num_bytes)


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
