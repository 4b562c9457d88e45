"""What an open gives to a client, and what it says of whoever asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from forebay_server.model.landing import reading_order
from forebay_server.serve.promote import Place
from forebay_server.serve.stream import Stream
from forebay_server.tier.course import Course, add_seconds, begin_course, doing
from forebay_server.tier.registry import Tiers
from forebay_server.tier.sealed import OpenedSlot
from forebay_wire.errors import ForebayError, IntegrityError, StorageError
from forebay_wire.segments import table_bytes_for


@dataclass(frozen=True)
class OpenedBlob:
    """A blob that was opened for a client; whoever gets it calls ``close``.

    It counts as open until it is released, whatever becomes of the descriptors.
    """

    blob: str
    length: int
    """Bytes of data."""
    tier: str
    fd: int
    """Read-only; data, and the segment table unless that has a file of its own. -1: none, the bytes
    come by HTTP."""
    table_offset: int
    table_length: int
    table_fd: int = -1
    """Read-only; the file that holds the segment table if it is another one."""
    more_fds: tuple[int, ...] = ()
    """Read-only; the other files of a blob that lies in pieces."""
    pieces: tuple[tuple[int, int, int, int], ...] = ()
    """Of such a blob: what :attr:`extents` answers."""
    let_go: Callable[[], None] | None = None
    """What ends the open, beside its count."""

    stream: Stream | None = None
    """Where its bytes come from, segment by segment, instead of a descriptor."""
    plan: str = ""
    """That its reader reads by, where it waits for bytes of the stream."""

    @property
    def extents(self) -> tuple[tuple[int, int, int, int], ...]:
        """``(blob offset, number of the descriptor, file offset, length)`` of each piece."""
        if self.pieces:
            return self.pieces
        return ((0, 0, 0, self.length),) if self.length else ()

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """``(descriptor, file offset, length)`` of the pieces that hold the bytes [start, stop)."""
        descriptors = self.descriptors
        for blob_offset, number, file_offset, length in self.extents:
            first, last = max(start, blob_offset), min(stop, blob_offset + length)
            if first < last:
                yield descriptors[number], file_offset + first - blob_offset, last - first

    @property
    def descriptors(self) -> tuple[int, ...]:
        """``fd``, ``more_fds`` and, last, ``table_fd``, those that there are."""
        return tuple(one for one in (self.fd, *self.more_fds, self.table_fd) if one >= 0)

    def close(self) -> None:
        """Close the descriptors. Once."""
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


@dataclass
class Reading:
    """For whom blobs are opened, and what that waits for."""

    plan: str = ""
    """Name of the reader's plan, if it has one."""
    can_stream: bool = False
    """Whether it takes a :class:`~forebay_server.serve.stream.Stream`; else it is told to come back
    by HTTP."""
    looks: dict[str, float] = field(default_factory=dict)
    """Reason to seconds, before its blobs are waited for: together, so that the slowest counts."""
    slowest: dict[str, float] = field(default_factory=dict)
    """The same, of that blob."""

    @property
    def waits(self) -> Mapping[str, float]:
        """Reason to seconds: they add up to the whole wait."""
        total = dict(self.looks)
        add_seconds(total, self.slowest)
        return total

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, this task looks where the blobs are."""
        course = begin_course(Course())
        with doing("tier"):
            yield
        self.looks.update(course.so_far())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this task opens one of the blobs."""
        course = begin_course(Course())
        try:
            yield
        finally:
            seconds = course.so_far()
            if sum(seconds.values()) > sum(self.slowest.values()):
                self.slowest.update(seconds)


NOBODY: Final = Reading()

reading: Final[ContextVar[Reading]] = ContextVar("forebay_reading", default=NOBODY)
"""For whom the current task opens blobs."""


def opened_at(place: Place, tier: str, descriptor: int) -> OpenedBlob:
    """The blob at *place*, read in *tier*, by *descriptor* if it has one."""
    return OpenedBlob(
        blob=place.blob,
        length=place.num_bytes,
        tier=tier,
        fd=descriptor,
        table_offset=place.num_bytes,
        table_length=table_bytes_for(place.num_segments),
    )


def opened_sealed(blob: str, found: OpenedSlot, tier: str) -> OpenedBlob:
    """A blob that is read in *tier* from the slot that it was sealed in."""
    return OpenedBlob(
        blob,
        found.num_bytes,
        tier,
        found.data,
        0,
        found.table_bytes,
        found.table,
        let_go=found.release,
    )


def reachable(tiers: Tiers, places: Sequence[Place], problems: list[ForebayError]) -> list[Place]:
    """Those of *places* whose tier this node has, the fastest first; *problems* gets the others."""
    names = {tier.name for tier in tiers.all}
    here = [place for place in places if place.tier in names]
    problems.extend(
        StorageError(
            f"blob {place.blob} has a replica in tier {place.tier}, which this daemon was "
            "started without: give it the tier again"
        )
        for place in places
        if place.tier not in names
    )
    kinds = [tiers.get(place.tier).kind for place in here]
    return [here[index] for index in reading_order(kinds)]


def no_copy(blob: str, problems: Sequence[ForebayError]) -> ForebayError:
    """What to tell whoever asks for *blob*, of which *problems* left no copy that serves."""
    if problems and all(isinstance(problem, StorageError) for problem in problems):
        return problems[0]
    reasons = "; ".join(problem.message for problem in problems) or "all are quarantined"
    return IntegrityError(
        f"blob {blob} has no undamaged replica on this node ({reasons}): restore it from the "
        "object tier (forebay recover), or use another version or generation"
    )
