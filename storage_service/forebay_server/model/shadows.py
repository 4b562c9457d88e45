"""Caches that hold names only: what one policy would keep, given everything that was read.

``model/admission.py`` lets several of them see all reads and follows the one that does best.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final, Protocol

MAX_GHOSTS: Final = 1 << 17
"""Blobs that a shadow remembers without holding them: some 20 MB."""

MAX_STALE: Final = 64
"""Outdated entries of a heap that one call clears away, so that no call has to do them all."""


class Shadow(Protocol):
    """One policy. Times are bytes read so far: no clock."""

    evicted: list[str]
    """What went since the caller last cleared it."""

    def access(self, blob: str, num_bytes: int, now: float) -> bool:
        """Somebody reads *blob*; True if it was held. Afterwards it may be held."""

    def forget(self, blob: str) -> None:
        """There is no such blob any more. Idempotent."""

    def resize(self, capacity_bytes: int) -> None:
        """Hold at most so much from now on."""

    def __contains__(self, blob: str) -> bool: ...


class LruShadow:
    """Gives up what was not used for the longest time."""

    def __init__(self, capacity_bytes: int) -> None:
        self.evicted: list[str] = []
        self._capacity = capacity_bytes
        self._held_bytes = 0
        self._held: OrderedDict[str, int] = OrderedDict()

    def access(self, blob: str, num_bytes: int, now: float) -> bool:
        """See :class:`Shadow`."""
        if blob in self._held:
            self._held.move_to_end(blob)
            return True
        if num_bytes <= self._capacity:
            self._held[blob] = num_bytes
            self._held_bytes += num_bytes
            self._shrink()
        return False

    def forget(self, blob: str) -> None:
        """See :class:`Shadow`."""
        self._held_bytes -= self._held.pop(blob, 0)

    def resize(self, capacity_bytes: int) -> None:
        """See :class:`Shadow`."""
        self._capacity = capacity_bytes
        self._shrink()

    def __contains__(self, blob: str) -> bool:
        return blob in self._held

    def _shrink(self) -> None:
        while self._held_bytes > self._capacity:
            gone, num_bytes = self._held.popitem(last=False)
            self._held_bytes -= num_bytes
            self.evicted.append(gone)


@dataclass(slots=True)
class _Queued:
    num_bytes: int
    uses: int = 0
    in_main: bool = False


class S3FifoShadow:
    """J. Yang, Y. Zhang, Z. Qiu, Y. Yue, R. Vinayak, "FIFO queues are all you need for cache
    eviction", SOSP 2023: most new blobs leave through a small queue, those that were used in it or
    came back soon live in the main one."""

    SMALL: Final = 0.1
    MAX_USES: Final = 3

    def __init__(self, capacity_bytes: int) -> None:
        self.evicted: list[str] = []
        self._capacity = capacity_bytes
        self._held: dict[str, _Queued] = {}
        # What was forgotten stays in them until it comes to the front.
        self._small: deque[tuple[str, _Queued]] = deque()
        self._main: deque[tuple[str, _Queued]] = deque()
        self._small_bytes = 0
        self._main_bytes = 0
        self._ghosts: OrderedDict[str, int] = OrderedDict()
        self._ghost_bytes = 0

    def access(self, blob: str, num_bytes: int, now: float) -> bool:
        """See :class:`Shadow`."""
        queued = self._held.get(blob)
        if queued is not None:
            queued.uses = min(self.MAX_USES, queued.uses + 1)
            return True
        if num_bytes > self._capacity:
            return False
        self._shrink(self._capacity - num_bytes)
        ghost = self._ghosts.pop(blob, None)
        self._ghost_bytes -= ghost or 0
        self._held[blob] = queued = _Queued(num_bytes)
        self._enqueue(blob, queued, to_main=ghost is not None)
        return False

    def forget(self, blob: str) -> None:
        """See :class:`Shadow`."""
        self._ghost_bytes -= self._ghosts.pop(blob, 0)
        queued = self._held.pop(blob, None)
        if queued is not None:
            self._leave(queued)

    def resize(self, capacity_bytes: int) -> None:
        """See :class:`Shadow`."""
        self._capacity = capacity_bytes
        self._shrink(capacity_bytes)

    def __contains__(self, blob: str) -> bool:
        return blob in self._held

    def _enqueue(self, blob: str, queued: _Queued, *, to_main: bool) -> None:
        queued.in_main = to_main
        if to_main:
            self._main.append((blob, queued))
            self._main_bytes += queued.num_bytes
        else:
            self._small.append((blob, queued))
            self._small_bytes += queued.num_bytes

    def _leave(self, queued: _Queued) -> None:
        if queued.in_main:
            self._main_bytes -= queued.num_bytes
        else:
            self._small_bytes -= queued.num_bytes

    def _shrink(self, target_bytes: int) -> None:
        while self._small_bytes + self._main_bytes > target_bytes:
            is_small_full = self._small_bytes >= self.SMALL * self._capacity
            from_small = self._small_bytes > 0 and (is_small_full or not self._main_bytes)
            blob, queued = (self._small if from_small else self._main).popleft()
            if self._held.get(blob) is not queued:
                continue  # forgotten
            self._leave(queued)
            if from_small:
                self._leave_small(blob, queued)
            else:
                self._leave_main(blob, queued)

    def _leave_small(self, blob: str, queued: _Queued) -> None:
        if queued.uses > 1:
            queued.uses = 0
            self._enqueue(blob, queued, to_main=True)
            return
        self._ghosts[blob] = queued.num_bytes
        self._ghost_bytes += queued.num_bytes
        most_bytes = (1 - self.SMALL) * self._capacity
        while self._ghost_bytes > most_bytes or len(self._ghosts) > MAX_GHOSTS:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]
        self._drop(blob)

    def _leave_main(self, blob: str, queued: _Queued) -> None:
        if queued.uses > 0:
            queued.uses -= 1
            self._enqueue(blob, queued, to_main=True)
            return
        self._drop(blob)

    def _drop(self, blob: str) -> None:
        del self._held[blob]
        self.evicted.append(blob)


@dataclass(slots=True)
class _Known:
    """A blob that was read before."""

    num_bytes: int
    last: float
    interval: float = 0.0
    """Between two reads, smoothed; 0: read once only."""


class KeepShadow:
    """Keeps what it has, and changes a blob for another only where that surely pays.

    Right for epochs, where every blob comes again after about as long as every other and whatever
    is evicted is missed later. Once full, a blob gets in only if it has been seen to come again,
    and only in place of one that comes again much less often or whose time to come again is over:
    what a slower job reads, what a job has left behind, what was read once.
    """

    SMOOTHING: Final = 0.15
    """Weight of a new interval."""
    OVERDUE: Final = 1.25
    """Idle for this many times the longest interval seen lately: it does not come again."""
    MEMORY: Final = 4.0
    """Half-life of the longest interval, in multiples of itself."""
    TYPICAL_WEIGHT: Final = 1 / 128
    """Weight of one interval in the mean of all."""
    BURST: Final = 1 / 16
    """Reads closer than this share of the capacity are one, by several readers."""

    def __init__(self, capacity_bytes: int, caution: float = 3.0) -> None:
        """*caution*: how many times longer an interval must be to say anything, reads coming at
        random times; and after how many of its intervals a blob counts as coming less often."""
        self.evicted: list[str] = []
        self._capacity = capacity_bytes
        self._caution = caution
        self._held_bytes = 0
        self._held: OrderedDict[str, _Known] = OrderedDict()  # by last use
        self._ghosts: OrderedDict[str, _Known] = OrderedDict()
        self._slowest: list[tuple[float, str]] = []
        self._typical = 0.0
        self._num_intervals = 0
        self._longest = 0.0
        self._longest_at = 0.0

    def access(self, blob: str, num_bytes: int, now: float) -> bool:
        """See :class:`Shadow`."""
        held = self._held.get(blob)
        if held is not None:
            self._learn(held, now)
            self._held.move_to_end(blob)
            self._note_interval(blob, held)
            return True
        known = self._ghosts.pop(blob, None)
        if known is None:
            known = _Known(num_bytes, now)
        else:
            self._learn(known, now)
        if self._held_bytes + num_bytes <= self._capacity or (
            known.interval and self._make_room(known, now)
        ):
            self._held[blob] = known
            self._held_bytes += num_bytes
            self._note_interval(blob, known)
        else:
            self._remember(blob, known)
        return False

    def forget(self, blob: str) -> None:
        """See :class:`Shadow`."""
        self._ghosts.pop(blob, None)
        known = self._held.pop(blob, None)
        if known is not None:
            self._held_bytes -= known.num_bytes

    def resize(self, capacity_bytes: int) -> None:
        """See :class:`Shadow`."""
        self._capacity = capacity_bytes
        while self._held_bytes > capacity_bytes:
            blob, known = self._held.popitem(last=False)
            self._evict(blob, known)

    def __contains__(self, blob: str) -> bool:
        return blob in self._held

    def longest_interval(self, now: float) -> float:
        """The longest time after which a blob was read again lately; 0: none was."""
        if not self._longest:
            return 0.0
        halvings = (now - self._longest_at) / (self.MEMORY * self._longest)
        return self._longest * math.exp2(-halvings)

    def _learn(self, known: _Known, now: float) -> None:
        interval, known.last = now - known.last, now
        if interval <= self.BURST * self._capacity:
            return
        if not self._num_intervals:
            interval = now  # nothing came again in all that time: a first guess, on the safe side
        if interval > self.longest_interval(now):
            self._longest, self._longest_at = interval, now
        self._num_intervals += 1
        weight = max(self.TYPICAL_WEIGHT, 1 / self._num_intervals)
        self._typical += weight * (interval - self._typical)
        before = known.interval or self._typical
        known.interval = before + self.SMOOTHING * (interval - before)

    def _note_interval(self, blob: str, known: _Known) -> None:
        if not known.interval:
            return
        heapq.heappush(self._slowest, (-known.interval, blob))
        if len(self._slowest) > 2 * len(self._held) + 64:
            self._slowest = [
                (-one.interval, name) for name, one in self._held.items() if one.interval
            ]
            heapq.heapify(self._slowest)

    def _make_room(self, known: _Known, now: float) -> bool:
        """Evict for *known*, if everything that must go is worth less."""
        going: list[tuple[str, _Known]] = []
        room = self._capacity - self._held_bytes
        while room < known.num_bytes:
            found = self._worst(now)
            if found is None or not self._is_worse(self._held[found], known, now):
                break
            going.append((found, self._held.pop(found)))
            room += going[-1][1].num_bytes
        if room < known.num_bytes:
            for blob, kept in reversed(going):
                self._held[blob] = kept
                self._held.move_to_end(blob, last=False)
                self._note_interval(blob, kept)
            return False
        for blob, gone in going:
            self._evict(blob, gone)
        return True

    def _worst(self, now: float) -> str | None:
        """What is idle for longest or comes again least often."""
        if not self._held:
            return None
        oldest = next(iter(self._held))
        for _ in range(min(MAX_STALE, len(self._slowest))):
            interval, blob = self._slowest[0]
            known = self._held.get(blob)
            if known is None or known.interval != -interval:
                heapq.heappop(self._slowest)
                continue
            if -interval > self._expected(self._held[oldest], now):
                return blob
            break
        return oldest

    def _expected(self, known: _Known, now: float) -> float:
        """The interval after which it comes again, by what is known at *now*."""
        return max(known.interval or self._typical, (now - known.last) / self._caution)

    def _is_worse(self, held: _Known, other: _Known, now: float) -> bool:
        if now - held.last > self.OVERDUE * self.longest_interval(now):
            return True
        return self._expected(held, now) > self._caution * other.interval

    def _evict(self, blob: str, known: _Known) -> None:
        self._held_bytes -= known.num_bytes
        self.evicted.append(blob)
        self._remember(blob, known)

    def _remember(self, blob: str, known: _Known) -> None:
        self._ghosts[blob] = known
        if len(self._ghosts) > MAX_GHOSTS:
            self._ghosts.popitem(last=False)


class WindowedKeepShadow:
    """A :class:`KeepShadow` beside a small window for what was read last: for blobs that several
    readers want shortly after each other, once an epoch."""

    WINDOW: Final = 1 / 16
    """Share of the capacity."""

    def __init__(self, capacity_bytes: int) -> None:
        self.evicted: list[str] = []
        window_bytes = int(self.WINDOW * capacity_bytes)
        self._window = LruShadow(window_bytes)
        self._keep = KeepShadow(capacity_bytes - window_bytes)

    def access(self, blob: str, num_bytes: int, now: float) -> bool:
        """See :class:`Shadow`."""
        was_in_window = blob in self._window
        hit = self._keep.access(blob, num_bytes, now) or was_in_window
        if blob not in self._keep:
            self._window.access(blob, num_bytes, now)
        elif was_in_window:
            self._window.forget(blob)
        self._report()
        return hit

    def forget(self, blob: str) -> None:
        """See :class:`Shadow`."""
        self._window.forget(blob)
        self._keep.forget(blob)

    def resize(self, capacity_bytes: int) -> None:
        """See :class:`Shadow`."""
        window_bytes = int(self.WINDOW * capacity_bytes)
        self._window.resize(window_bytes)
        self._keep.resize(capacity_bytes - window_bytes)
        self._report()

    def __contains__(self, blob: str) -> bool:
        return blob in self._keep or blob in self._window

    def _report(self) -> None:
        for part in (self._window, self._keep):
            self.evicted.extend(blob for blob in part.evicted if blob not in self)
            part.evicted.clear()
