"""What a loader reads next, and when a blob's turn comes: bounded looks into the future.

Both classes are plan views of ``model/nextuse.py``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from forebay_server.model.tracks import Tracks
from forebay_server.model.uses import ONE_TRACK, ReadOrder, Window, windows
from forebay_wire.blocks import starts_of
from forebay_wire.errors import InvalidRequest, LimitExceeded

MAX_USES: Final = 1 << 17
"""Uses that one plan's look into the future holds: about 20 MB."""

PART_USES: Final = 256
"""Uses made into Python numbers at once: most callers want a few."""

MAX_EPOCHS: Final = 2
"""Epochs that it reaches ahead, however small they are."""

MAX_RANGES: Final = 1 << 18
"""Ranges that a foreign reader may tell ahead of its position."""


class OrderView:
    """The future of a loader that reads in an order. Not thread-safe.

    Positions are those of :meth:`ReadOrder.time`. What lies beyond the look is expected in the
    middle of the epoch after it.
    """

    def __init__(
        self,
        order: ReadOrder,
        blobs: Sequence[str],
        shard_rows: Sequence[int],
        start: int,
        tracks: Tracks = ONE_TRACK,
    ) -> None:
        """*blobs* and *shard_rows*: the version's shards; *start*: where reading stands. Of more
        *blobs* than rows the last ones are those of layers, which *tracks* are of."""
        self._order = order
        self._blobs = list(blobs)
        self._numbers = {blob: number for number, blob in enumerate(blobs)}
        starts = starts_of(shard_rows)
        epoch, position = divmod(start, max(1, order.num_samples))
        self._source: Iterator[Window] = windows(order, starts, epoch, position, tracks=tracks)
        self._windows: deque[Window] = deque()
        self._times: dict[int, deque[int]] = {}
        """Shard to its known uses."""
        self._num_uses = 0
        self._stop = start
        """All uses before this time are known."""
        self._is_whole = False
        """Whether there is nothing after that."""

    @property
    def seconds_per_position(self) -> float | None:
        return None

    @property
    def num_blobs(self) -> int:
        """Different blobs that the version has."""
        return len(self._numbers)

    def knows(self, blob: str) -> bool:
        """Whether *blob* is one of the version's."""
        return blob in self._numbers

    def rename(self, shard: str, blob: str) -> None:
        """What was known as *shard* is *blob* from now on; nothing if it is none of the version's.
        Before anybody asks about *blob*."""
        number = self._numbers.pop(shard, None)
        if number is not None:
            self._blobs[number] = blob
            self._numbers.setdefault(blob, number)

    def next_position(self, blob: str, start: int) -> float | None:
        """See ``PlanView``; exact inside the look."""
        number = self._numbers.get(blob)
        if number is None:
            return None
        found = self._known(number, start)
        while found is None and self._look_further(start):
            found = self._known(number, start)
        if found is not None or self._is_whole:
            return found
        return max(self._stop, start) + self._order.num_samples / 2

    def uses(self, start: int) -> Iterator[tuple[int, str]]:
        """See ``PlanView``; ends where the look does."""
        index = 0
        while index < len(self._windows) or self._look_further(start):
            window = self._windows[index]
            index += 1
            if window.stop <= start:
                continue
            first = int(np.searchsorted(window.times, start))
            for part in range(first, len(window.times), PART_USES):
                times = window.times[part : part + PART_USES].tolist()
                shards = window.shards[part : part + PART_USES].tolist()
                for time, shard in zip(times, shards, strict=True):
                    yield time, self._blobs[shard]

    def forget_before(self, position: int) -> None:
        """Nobody asks about uses before *position* any more."""
        while self._windows and self._windows[0].stop <= position:
            window = self._windows.popleft()
            self._num_uses -= len(window.times)
            for shard in window.shards.tolist():
                times = self._times[shard]
                times.popleft()
                if not times:
                    del self._times[shard]

    def _known(self, number: int, start: int) -> int | None:
        times = self._times.get(number)
        if not times or times[-1] < start:
            return None
        if times[0] >= start:
            return times[0]
        return times[bisect_left(times, start)]

    def _look_further(self, start: int) -> bool:
        """Make one more window known, if there is one and room for it."""
        reach = start + MAX_EPOCHS * self._order.num_samples
        if self._is_whole or self._num_uses >= MAX_USES or self._stop >= reach:
            return False
        window = next(self._source, None)
        if window is None:
            self._is_whole = True
            return False
        self._windows.append(window)
        self._num_uses += len(window.times)
        self._stop = window.stop
        for time, shard in zip(window.times.tolist(), window.shards.tolist(), strict=True):
            self._times.setdefault(shard, deque()).append(time)
        return True


@dataclass(frozen=True)
class _Range:
    """Positions [start, stop) of a foreign reader, at which it needs *shard*."""

    start: int
    stop: int
    shard: str


class RangesView:
    """The future of a foreign reader, told in pages. Positions count its samples, if it says how
    many a range is read for, else its ranges. Not thread-safe.

    A range is needed at each of its positions: also when the reader stands inside it.
    """

    def __init__(self, start: int = 0) -> None:
        """*start*: the position of the first range."""
        self._ranges: deque[_Range] = deque()
        self._of_shard: dict[str, deque[_Range]] = {}
        self._blobs: dict[str, str] = {}
        """Shards that are known by another name meanwhile."""
        self._shards: dict[str, str] = {}
        """And those names."""
        self._num_pages = 0
        self._stop = start

    @property
    def seconds_per_position(self) -> float | None:
        return None

    @property
    def num_blobs(self) -> int:
        """Different blobs that it knows to come."""
        return len(self._of_shard)

    @property
    def stop(self) -> int:
        """The position after the last range."""
        return self._stop

    def knows(self, blob: str) -> bool:
        """Whether *blob* is to come."""
        return any(shard in self._of_shard for shard in self._names(blob))

    def rename(self, shard: str, blob: str) -> None:
        """What was and will be told as *shard* is *blob* from now on."""
        self._blobs[shard] = blob
        self._shards.setdefault(blob, shard)

    def add_page(
        self, page: int, blobs: Sequence[str], num_samples: Sequence[int] | None = None
    ) -> None:
        """Append the blobs of a page's ranges, each read for so many samples (default: one); a
        page that came before changes nothing.

        :class:`InvalidRequest` if one in between is missing, :class:`LimitExceeded` if too much
        lies ahead of the reader.
        """
        counts = [1] * len(blobs) if num_samples is None else num_samples
        self.add_turns(page, [(n, [blob]) for n, blob in zip(counts, blobs, strict=True)])

    def add_turns(self, page: int, turns: Sequence[tuple[int, Sequence[str]]]) -> None:
        """As :meth:`add_page`, where several blobs are read for the same samples: how many these
        are, and the blobs."""
        if page < self._num_pages:
            return
        if page > self._num_pages:
            raise InvalidRequest(
                f"page {page} of the plan comes before page {self._num_pages}: send them in order"
            )
        if len(self._ranges) + sum(len(blobs) for _, blobs in turns) > MAX_RANGES:
            raise LimitExceeded(
                f"a plan holds at most {MAX_RANGES} ranges ahead of its position: send the next "
                "pages when reading has advanced"
            )
        for count, blobs in turns:
            stop = self._stop + count
            for shard in blobs:
                added = _Range(self._stop, stop, shard)
                self._of_shard.setdefault(shard, deque()).append(added)
                self._ranges.append(added)
            self._stop = stop
        self._num_pages += 1

    def next_position(self, blob: str, start: int) -> float | None:
        """See ``PlanView``."""
        found: list[int] = []
        for shard in self._names(blob):
            ranges = self._of_shard.get(shard)
            if ranges and ranges[-1].stop > start:
                index = 0  # where reading stands, mostly
                if ranges[0].stop <= start:
                    index = bisect_right(ranges, start, key=lambda one: one.stop)
                found.append(max(ranges[index].start, start))
        return min(found, default=None)

    def uses(self, start: int) -> Iterator[tuple[int, str]]:
        """See ``PlanView``."""
        for one in self._ranges:
            if one.stop > start:
                yield max(one.start, start), self._blobs.get(one.shard, one.shard)

    def forget_before(self, position: int) -> None:
        """Nobody asks about uses before *position* any more."""
        while self._ranges and self._ranges[0].stop <= position:
            gone = self._ranges.popleft()
            ranges = self._of_shard[gone.shard]
            ranges.popleft()
            if not ranges:
                del self._of_shard[gone.shard]

    def _names(self, blob: str) -> list[str]:
        """The shards that are *blob*."""
        own = [] if blob in self._blobs else [blob]
        return [*own, self._shards[blob]] if blob in self._shards else own
