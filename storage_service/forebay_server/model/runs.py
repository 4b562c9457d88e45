"""In which order a disk with one head reads what plans are going to need.

In order of need alone the head jumps for every blob. So what is needed next is read in the order in
which it lies on the disk, as much at a time as can be there in time nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

RUN_SECONDS: Final = 4.0
"""A run takes no longer: what a new plan needs at once, or what changes otherwise, comes soon."""

PATIENCE_SECONDS: Final = 0.25
"""How much later than in order of need a blob may come that is late: a disk that cannot keep up
must not fall behind further by jumping."""

GAP_BYTES: Final = 256 << 10
"""The head passes over so much rather than to jump."""


@dataclass(frozen=True)
class Wanted:
    """A blob on the disk, and when it is needed."""

    blob: str
    seconds: float
    """From now; below 0 if it is late."""
    num_bytes: int
    place: int
    """Where it begins on the disk, in bytes, or any number that grows with that."""


@dataclass(frozen=True)
class Disk:
    """How fast it is."""

    bytes_per_second: float
    seek_seconds: float


def next_run(wanted: Sequence[Wanted], disk: Disk, head: int = 0) -> list[Wanted]:
    """What to read now, in this order: some of *wanted* that are needed first, from the *head* on
    upwards through the disk, then from its start.

    As many as can be read within :data:`RUN_SECONDS` such that each is there in time; one that is
    late anyway comes at most :data:`PATIENCE_SECONDS` after its turn in order of need. At least
    one, if there are any.
    """
    needed = sorted(wanted, key=lambda one: one.seconds)
    in_turn = dict(finish_seconds(needed, disk, head))
    for count in range(len(needed), 1, -1):
        run = sweep(needed[:count], head)
        finished = list(finish_seconds(run, disk, head))
        if finished[-1][1] <= RUN_SECONDS and all(
            at <= latest_seconds(one, in_turn[one]) for one, at in finished
        ):
            return run
    return needed[:1]


def latest_seconds(one: Wanted, in_turn: float) -> float:
    """How long *one* may take, which in order of need is there after *in_turn* seconds."""
    return one.seconds if in_turn <= one.seconds else in_turn + PATIENCE_SECONDS


def sweep(wanted: Sequence[Wanted], head: int) -> list[Wanted]:
    """*wanted* in the order in which the head passes them."""
    return sorted(wanted, key=lambda one: (one.place < head, one.place, one.seconds))


def finish_seconds(
    order: Sequence[Wanted], disk: Disk, head: int
) -> Iterator[tuple[Wanted, float]]:
    """When each of *order* has been read, in seconds from now."""
    at = 0.0
    for one in order:
        gap = one.place - head
        passing = gap / disk.bytes_per_second if 0 <= gap <= GAP_BYTES else disk.seek_seconds
        at += min(passing, disk.seek_seconds) + one.num_bytes / disk.bytes_per_second
        head = one.place + one.num_bytes
        yield one, at
