"""Documents end to end, cut into windows of so many tokens: which piece of which lies where.

The samples of an epoch are taken in groups of consecutive positions of their order; a group's
documents, one after the other (or as :func:`best_fit` puts them), are its *stream*, and windows
never reach beyond it. So a place in an epoch is a group and an offset, in tokens, into its stream;
what comes after it depends on nothing before it. Definition: ``docs/formats/packing.md``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from forebay_wire.errors import InvalidRequest
from forebay_wire.order import LastBatch, check_last_batch
from forebay_wire.permutation import Numbers

Fit = Literal["cut", "whole", "best"]
"""Where documents are cut: wherever a window ends, or only if longer than a window; "best" also
puts together those of a group that fill windows best."""

Tail = Literal["pad", "drop"]
"""What becomes of a group's last window if it is not full."""

OFFSET_BITS: Final = 32
"""A place is group · 2^32 + offset, as one number."""

MAX_GROUPS: Final = 1 << 30
MAX_WIDTH: Final = 1 << 24


NO_WINDOW: Final = -1
"""The place of an empty window: one that pads a batch."""


def place_of(group: int, offset: int) -> int:
    """A place as one number."""
    return group << OFFSET_BITS | offset


def group_of(place: int) -> tuple[int, int]:
    """(group, offset) of a place."""
    return place >> OFFSET_BITS, place & ((1 << OFFSET_BITS) - 1)


@dataclass(frozen=True)
class Packing:
    """How streams are cut into windows."""

    width: int
    """Tokens of a window."""
    fit: Fit = "cut"
    tail: Tail = "pad"

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MAX_WIDTH:
            raise InvalidRequest(f"windows of {self.width} tokens: 1 to {MAX_WIDTH}")
        if self.fit not in get_args(Fit):
            raise InvalidRequest(f'fit={self.fit!r}: "cut", "whole" or "best"')
        if self.tail not in get_args(Tail):
            raise InvalidRequest(f'tail={self.tail!r}: "pad" or "drop"')

    def stops(self, ends: Numbers, starts: Numbers, borders: Numbers | None = None) -> Numbers:
        """Where windows end that begin at *starts* of the stream of documents that end at *ends*.

        A window holds as much as fits; with "whole" no document's beginning, unless all of it is
        there, or it alone is longer than a window. With *borders* (those of :func:`best_fit`) it
        ends at the next of these.
        """
        if borders is not None:
            return borders[np.searchsorted(borders, starts, side="right")]
        full = np.minimum(starts + self.width, ends[-1] if len(ends) else 0)
        if self.fit == "cut" or not len(ends):
            return full
        last = np.searchsorted(ends, full, side="right") - 1
        whole = np.where(last >= 0, ends[np.maximum(last, 0)], 0)
        return np.where(whole > starts, whole, full)

    def windows(
        self, ends: Numbers, offset: int, borders: Numbers | None = None
    ) -> tuple[Numbers, Numbers]:
        """(starts, stops) of all windows from *offset* of the stream on."""
        if borders is not None:
            following = borders[borders > offset]
            before = np.array([offset][: len(following)], dtype=np.int64)
            return np.concatenate((before, following[:-1])), following
        total = int(ends[-1]) if len(ends) else 0
        if self.fit == "cut":
            starts = np.arange(offset, total, self.width, dtype=np.int64)
        else:
            starts = np.array(list(self._chain(ends.tolist(), offset)), dtype=np.int64)
        stops = self.stops(ends, starts)
        if self.tail == "drop" and len(starts) and stops[-1] - starts[-1] < self.width:
            starts, stops = starts[:-1], stops[:-1]
        return starts, stops

    def _chain(self, ends: list[int], start: int) -> Iterator[int]:
        total = ends[-1] if ends else 0
        while start < total:
            yield start
            last = bisect_right(ends, start + self.width) - 1
            fits = last >= 0 and ends[last] > start
            start = ends[last] if fits else start + self.width


@dataclass(frozen=True)
class Arranged:
    """A group's stream as :func:`best_fit` makes it, piece by piece."""

    documents: Numbers
    """Number of each piece's document in the group."""
    starts: Numbers
    """Its first token, counted from its document's start."""
    sizes: Numbers
    borders: Numbers
    """Where windows end in the stream."""


def best_fit(lengths: Numbers, width: int, tail: Tail) -> Arranged:
    """Documents of these *lengths*, put together so that windows of *width* tokens are full.

    One that is longer than a window is cut: into whole windows and what is left. What is no whole
    window is put in by best-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973):
    the longest first, of equal ones the earlier; each into the window with the least room that
    takes it, of equal ones the earlier made, or into a new one. Windows come in the order of the
    first of their pieces, pieces in that of the documents, so a shuffled order stays one. With
    *tail* "drop" the window with the fewest tokens is left out (of several the last), unless it is
    full.
    """
    whole, rest = lengths // width, lengths % width
    count = whole + (rest > 0)
    documents = np.repeat(np.arange(len(lengths), dtype=np.int64), count)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(count) - count, count)) * width
    sizes = np.minimum(lengths[documents] - starts, width)
    windows = _filled(sizes, width)
    fill = np.bincount(windows, weights=sizes, minlength=1)
    if tail == "drop" and len(sizes) and fill.min() < width:
        least = len(fill) - 1 - int(np.argmin(fill[::-1]))
        kept = windows != least
        documents, starts, sizes, windows = (
            part[kept] for part in (documents, starts, sizes, windows)
        )
    order = np.argsort(windows, kind="stable")
    ends = np.cumsum(sizes[order])
    last = np.flatnonzero(np.diff(windows[order], append=-1))
    return Arranged(documents[order], starts[order], sizes[order], ends[last])


def _filled(sizes: Numbers, width: int) -> Numbers:
    """The window of each piece; windows are numbered by their first pieces."""
    made = np.empty(len(sizes), dtype=np.int64)
    rooms: list[tuple[int, int]] = []  # (room, window), in that order
    num_windows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        place = bisect_left(rooms, (size, 0))
        if place < len(rooms):
            room, window = rooms.pop(place)
        else:
            room, window = width, num_windows
            num_windows += 1
        made[piece] = window
        if room > size:
            insort(rooms, (room - size, window))
    _, first, number = np.unique(made, return_index=True, return_inverse=True)
    turn: Numbers = np.argsort(np.argsort(first))
    return turn[number]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, in the order of the windows and within them."""

    windows: Numbers
    """The window that each lies in, by its number among those asked for."""
    documents: Numbers
    """Number of its document in the group."""
    starts: Numbers
    """Its first token, counted from its document's start."""
    sizes: Numbers


def pieces(ends: Numbers, starts: Numbers, stops: Numbers) -> Pieces:
    """What the windows [start, stop) of the stream of documents that end at *ends* hold. No window
    is empty."""
    first = np.searchsorted(ends, starts, side="right")
    count = np.searchsorted(ends, stops, side="left") - first + 1
    windows = np.repeat(np.arange(len(starts), dtype=np.int64), count)
    begins = np.cumsum(count) - count
    documents = np.arange(len(windows), dtype=np.int64) - np.repeat(begins - first, count)
    document_starts = np.where(documents > 0, ends[documents - 1], 0)
    low = np.maximum(document_starts, starts[windows])
    high = np.minimum(ends[documents], stops[windows])
    return Pieces(windows, documents, low - document_starts, high - low)


@dataclass(frozen=True)
class WindowStep:
    """One global batch."""

    places: Numbers
    """Where its windows begin."""
    after: int
    """The place after them."""


class Groups(Protocol):
    """The groups of one epoch."""

    @property
    def num_groups(self) -> int: ...

    def ends(self, group: int) -> Numbers:
        """Where the documents of a group, or their pieces, end in its stream."""
        ...

    def borders(self, group: int) -> Numbers | None:
        """Where windows end in it, if :func:`best_fit` says that."""
        ...


@dataclass(frozen=True)
class WindowPiece:
    """What one rank reads of a step: some of its windows, then padding."""

    places: Numbers
    num_samples: int

    def positions(self, num_samples: int) -> Numbers:
        """The places, padding (:data:`NO_WINDOW`) included."""
        del num_samples
        return self.places

    def mask(self) -> NDArray[np.bool_]:
        """True for windows, False for padding."""
        return np.arange(len(self.places)) < self.num_samples


@dataclass(frozen=True)
class WindowCut:
    """The global batches of windows from a place on; the groups are asked one after the other."""

    groups: Groups
    packing: Packing
    global_batch_size: int
    last_batch: LastBatch = "keep"
    position: int = 0

    def __post_init__(self) -> None:
        check_last_batch(self.last_batch)
        if self.global_batch_size < 1:
            raise InvalidRequest(f"a global batch of {self.global_batch_size} windows: at least 1")

    def steps(self) -> Iterator[WindowStep]:
        """The steps, lazily."""
        size = self.global_batch_size
        places = afters = np.empty(0, dtype=np.int64)
        for starts, stops in self._windows():
            places, afters = np.concatenate((places, starts)), np.concatenate((afters, stops))
            whole = len(places) // size * size
            for first in range(0, whole, size):
                yield WindowStep(places[first : first + size], int(afters[first + size - 1]))
            places, afters = places[whole:], afters[whole:]
        if len(places) and self.last_batch != "drop":
            yield WindowStep(places, int(afters[-1]))

    def _windows(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Of each group the places where its windows begin, and those after them."""
        first, offset = group_of(self.position)
        for group in range(first, self.groups.num_groups):
            ends, borders = self.groups.ends(group), self.groups.borders(group)
            starts, stops = self.packing.windows(ends, offset, borders)
            offset = 0
            if len(starts):
                stops = place_of(group, 0) + stops
                stops[-1] = place_of(group + 1, 0)
                yield place_of(group, 0) + starts, stops

    @property
    def num_steps(self) -> int:
        """Steps to the end of the epoch, the same on all ranks. Asks all groups for it."""
        windows = sum(len(starts) for starts, _ in self._windows())
        full, short = divmod(windows, self.global_batch_size)
        return full if self.last_batch == "drop" else full + (short > 0)

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return next(iter(self.steps()), None) is None

    def bounds(self, step: WindowStep) -> tuple[int, int]:
        """The place of the first window of a step, and the one after the last."""
        return int(step.places[0]), step.after

    def part(self, step: WindowStep, rank: int, num_ranks: int) -> WindowPiece:
        """The windows of *rank*: contiguous, sizes differ by at most one, larger ones first."""
        size, larger = divmod(len(step.places), num_ranks)
        first = rank * size + min(rank, larger)
        own = step.places[first : first + size + (rank < larger)]
        if self.last_batch != "pad":
            return WindowPiece(own, len(own))
        padding = -(-self.global_batch_size // num_ranks) - len(own)
        empty = np.full(padding, NO_WINDOW, dtype=np.int64)
        return WindowPiece(np.concatenate((own, empty)), len(own))
