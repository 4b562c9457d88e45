"""The copy job: a blob comes into a tier, and stays where it was."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from forebay_server.catalog.engine import Connection
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.jobs import Progress
from forebay_wire.errors import InvalidRequest

ENCODING: Final = "encoding"
"""Key of the journal: how the copy is to lie there, where a policy says so."""
MAKES_ROOM: Final = "makes room"
"""Key of the journal: what nothing pins or promises goes for the copy if it does not fit."""

EnsureRoom = Callable[[str, int], Awaitable[None]]
"""Has so many bytes of a tier free; :class:`ResourceExhausted` if not so much may go."""


class Bringer(Protocol):
    """What is needed of :class:`forebay_server.serve.bring.Bringer`."""

    async def has(self, blob: str, tier: str) -> bool:
        """Whether *tier* has a live copy of *blob*."""
        ...

    async def bring(
        self,
        blob: str,
        tier: str,
        progress: Callable[[str, int], object],
        guard: Callable[[Connection], object],
        encoding: str = "",
    ) -> bool:
        """Have a live, durable and verified copy of *blob* in *tier*; whether one was made."""
        ...

    async def check(self, blob: str, tier: str) -> bool:
        """Whether *tier* has a copy of *blob* whose every byte is good."""
        ...


class Copier:
    """Handles jobs of the kind ``copy``; the target is ``BLOB TIER``. Idempotent."""

    def __init__(
        self,
        bringer: Bringer,
        budget: Budget,
        locks: NamedLocks,
        ensure_room: EnsureRoom | None = None,
    ) -> None:
        """*locks* are shared with whoever collects and flushes blobs."""
        self._ensure_room = ensure_room
        self._bringer = bringer
        self._budget = budget
        self._locks = locks

    async def __call__(self, progress: Progress) -> None:
        blob, tier = parse_target(progress.target, 2)
        await self.copy(blob, tier, progress)

    async def copy(self, blob: str, tier: str, progress: Progress) -> bool:
        """Bring *blob* into *tier* within the budget, as part of the job *progress*; whether it had
        to be."""
        async with self._locks.hold(blob):  # what is being copied is not collected meanwhile
            return await self.copy_locked(blob, tier, progress)

    async def copy_locked(self, blob: str, tier: str, progress: Progress) -> bool:
        """:meth:`copy` for a caller who holds the blob's lock."""

        def moved(source: str, num_bytes: int) -> None:
            for one in (source, tier):
                self._budget.take(one, num_bytes, lambda: progress.advance(0))
            progress.advance(num_bytes)

        if progress.journal.get(MAKES_ROOM) and self._ensure_room is not None:
            if await self._bringer.has(blob, tier):
                return False
            await self._ensure_room(tier, progress.total_bytes)
        encoding = str(progress.journal.get(ENCODING, ""))
        return await self._bringer.bring(blob, tier, moved, progress.guard, encoding)


def copy_target(blob: str, tier: str) -> str:
    """The target of the job that brings *blob* into *tier*."""
    return f"{blob} {tier}"


def parse_target(target: str, num_words: int) -> tuple[str, ...]:
    """The words of a job's target."""
    words = tuple(target.split(" "))
    if len(words) != num_words:
        raise InvalidRequest(f"job target {target!r} does not have {num_words} words")
    return words
