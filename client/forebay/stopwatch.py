"""Where the time of a thread goes while it reads a batch: each moment belongs to one cause."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import Final, Self

CAUSES: Final = (
    "origin",
    "throttle",
    "tier",
    "queue",
    "open",
    "network",
    "verify",
    "decode",
    "transform",
    "collate",
    "copy",
)
"""What a batch may wait for: the object tier or the origin; a bandwidth limit, or a store that is
busy; a local disk, or the catalog; other work in the daemon; what else it takes to open shards;
bytes over HTTP; digests; finding, parsing and gathering rows; transforms; making tensors; the way
to the device."""

WAIT_CAUSES: Final = ("origin", "throttle", "tier", "queue")
"""The ones that the daemon tells."""


class Stopwatch:
    """The time of one piece of work in one thread: started in it, and stopped there."""

    __slots__ = ("_before", "_since", "cause", "seconds")

    def __init__(self, cause: str) -> None:
        """Start, with *cause*; what ran before in this thread stands still meanwhile."""
        self.cause = cause
        self.seconds: dict[str, float] = {}
        """Seconds by cause, once stopped."""
        self._before = _here.watch
        _here.watch = self
        self._since = perf_counter()

    def switch(self, cause: str) -> str:
        """From now on *cause* takes the time; what took it until now."""
        now, before = perf_counter(), self.cause
        seconds = self.seconds
        seconds[before] = seconds.get(before, 0.0) + now - self._since
        self._since, self.cause = now, cause
        return before

    def stop(self) -> float:
        """The end, by ``time.perf_counter``."""
        self.switch(self.cause)
        _here.watch = self._before
        return self._since


class _Here(threading.local):
    watch: Stopwatch | None = None


_here: Final = _Here()


class timed:
    """A ``with`` block whose time goes to a cause, if a stopwatch runs in this thread; costs half
    a microsecond. Inside, another one takes its part away from this."""

    __slots__ = ("_before", "_cause", "_had", "_parts", "_watch")

    def __init__(self, cause: str) -> None:
        self._cause = cause
        self._parts: Mapping[str, float] | None = None

    def __enter__(self) -> Self:
        self._watch = watch = _here.watch
        if watch is not None:
            self._before = watch.switch(self._cause)
            self._had = watch.seconds.get(self._cause, 0.0)
        return self

    @property
    def counts(self) -> bool:
        """Whether a stopwatch runs in this thread."""
        return self._watch is not None

    def explain(self, parts: object) -> None:
        """The block waited for *parts*, cause to seconds, as the daemon says: no more of them than
        the block took; the rest stays where it is."""
        if isinstance(parts, Mapping):
            self._parts = parts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        watch = self._watch
        if watch is None:
            return
        watch.switch(self._before)
        if self._parts:
            _share_out(watch.seconds, self._cause, self._had, self._parts)


class Turn:
    """A lock for what takes long. Who waits for it books the time like whoever had it: to the same
    causes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        """Cause to seconds of the last one that had it, while it did."""

    def __enter__(self) -> None:
        watch = _here.watch
        if not self._lock.acquire(blocking=False):
            if watch is None:
                self._lock.acquire()
            else:
                before = watch.switch("open")
                had = watch.seconds.get("open", 0.0)
                self._lock.acquire()
                watch.switch(before)
                _share_out(watch.seconds, "open", had, self._took, CAUSES)
        if watch is not None:
            watch.switch(watch.cause)
            self._began = dict(watch.seconds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        watch = _here.watch
        if watch is not None:
            watch.switch(watch.cause)
            self._took = {
                cause: took - self._began.get(cause, 0.0) for cause, took in watch.seconds.items()
            }
        self._lock.release()


def _share_out(
    seconds: dict[str, float],
    cause: str,
    had: float,
    parts: Mapping[str, float],
    causes: Sequence[str] = WAIT_CAUSES,
) -> None:
    """Move what *cause* got since it *had* so much to those of *parts* that are *causes*: what they
    say, of the daemon's; else all of it, in their proportions."""
    known = {name: float(parts[name]) for name in causes if parts.get(name, 0.0) > 0.0}
    took, told = seconds[cause] - had, sum(known.values())
    if told <= 0.0 or took <= 0.0:
        return
    scale = took / told if causes is CAUSES else min(1.0, took / told)
    seconds[cause] = max(0.0, seconds[cause] - told * scale)  # no rounding below nothing
    for name, one in known.items():
        seconds[name] = seconds.get(name, 0.0) + one * scale
