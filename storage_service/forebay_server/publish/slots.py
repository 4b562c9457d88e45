"""The memory of upload sessions: lent, held until its generation is final, kept warm or closed.

A client maps its slot writable for as long as it likes. So a slot goes to the owner's next session
only if its client has let it go: after its own abort, after a seal that it waited for, and after
the commit of the generation that its pack belongs to. Every other slot is closed: who still maps
it writes into memory that nobody else reads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Final, Protocol, TypeVar

from forebay_server.tier.memory import Slot
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import ResourceExhausted
from forebay_wire.limits import MAX_SEGMENT_BYTES
from forebay_wire.segments import SegmentTable

T = TypeVar("T")

SLOT_WAIT_SECONDS: Final = 20.0
"""How long a client waits for any memory that others have on loan before it is refused."""

TURN_WAIT_SECONDS: Final = 30.0
"""How long it waits behind others who wait. Both together are less than a call takes at most."""

SLOT_IDLE_SECONDS: Final = 900.0
"""How long an owner without sessions keeps its slots warm: more than most times between saves."""


class NoSlotNow(ResourceExhausted):
    """There is no memory for a slot, and others have some on loan that may come back."""


class Spare(Protocol):
    """What is held for a need that has not come yet."""

    def __len__(self) -> int: ...

    async def free_one(self) -> bool:
        """End one of it; whether there was any."""
        ...


class SlotKeeper:
    """Lends the slots of the ram tier to sessions. Belongs to the event loop."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._pool = tiers.slots
        self._held: dict[str, Slot] = {}  # by session, oldest first
        self._tables: dict[str, SegmentTable | None] = {}
        self._last_used: dict[str, float] = {}
        self.returned = asyncio.Event()
        """Set, and replaced, when a slot has come back."""
        self._spare: Spare | None = None
        self._turn = asyncio.Lock()
        """Whose turn it is to wait for one."""

    async def lend(self, owner: str, num_bytes: int, *, keeps_last: bool = False) -> Slot:
        """A slot of *num_bytes*, or of fewer where memory is short; see :meth:`SlotPool.acquire`.

        Rather than refuse, the owner's oldest held slot is closed: what landed from it is on disk.
        :class:`ResourceExhausted` with the numbers if that does not help, :class:`NoSlotNow` where
        waiting may.
        """
        while True:
            returned = self.returned
            try:
                acquire = partial(self._pool.acquire, keeps_last=keeps_last)
                return await self._tiers.run(
                    self._pool, acquire, owner, num_bytes, MAX_SEGMENT_BYTES
                )
            except ResourceExhausted as error:
                oldest = next(
                    (name for name, slot in self._held.items() if slot.owner == owner), ""
                )
                if oldest:
                    await self.close_held(oldest)
                elif returned.is_set() or self._pool.num_lent > len(self._held):
                    raise NoSlotNow(error.message) from error
                else:
                    raise

    def may_take_from(self, spare: Spare) -> None:
        """Have what *spare* holds end before anything that is needed is refused."""
        self._spare = spare

    async def begin_for_sure(
        self, owner: str, num_bytes: int, begin: Callable[[], Awaitable[T]]
    ) -> T:
        """What *begin* answers, which takes a slot of *num_bytes* and other room for *owner*; what
        nobody needs yet ends before that is refused, or less is given. For the rest as
        :meth:`wait_for_memory`."""
        while self._has_spare and not await self._tiers.run(
            self._pool, self._pool.has_room, owner, num_bytes
        ):
            await self._free_spare()

        async def begin_or_make_room() -> T:
            while True:
                try:
                    return await begin()
                except ResourceExhausted:
                    if not await self._free_spare():
                        raise

        return await self.wait_for_memory(begin_or_make_room)

    @property
    def _has_spare(self) -> bool:
        return self._spare is not None and len(self._spare) > 0

    async def _free_spare(self) -> bool:
        return self._spare is not None and await self._spare.free_one()

    async def wait_for_memory(self, begin: Callable[[], Awaitable[T]]) -> T:
        """What *begin* answers; while it raises :class:`NoSlotNow` it is begun again whenever a
        slot has come back. Who waits takes turns: first come, first served.

        :class:`ResourceExhausted` if no slot comes back for a while, or too many come before.
        """
        if not self._turn.locked():
            with contextlib.suppress(NoSlotNow):
                return await begin()
        deadline = asyncio.get_running_loop().time() + TURN_WAIT_SECONDS
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.acquire()
        except TimeoutError:
            raise ResourceExhausted(
                f"tier ram has no room, and others have waited for it for {TURN_WAIT_SECONDS:.0f} "
                "s: have fewer writers at a time, write smaller shards, or raise ram-bytes"
            ) from None
        try:
            return await self._begin_in_turn(begin)
        finally:
            self._turn.release()

    async def _begin_in_turn(self, begin: Callable[[], Awaitable[T]]) -> T:
        while True:
            returned = self.returned
            try:
                return await begin()
            except NoSlotNow as error:
                try:
                    async with asyncio.timeout(SLOT_WAIT_SECONDS):
                        await returned.wait()
                except TimeoutError:
                    raise ResourceExhausted(error.message) from error

    def num_in_use(self, owner: str) -> int:
        """Slots that *owner* fills, or whose bytes have not landed for good."""
        return self._pool.num_lent_to(owner)

    async def wait_for_one_of(self, owner: str, limit: int, seconds: float) -> None:
        """Return once *owner* has fewer than *limit* slots in use.

        :class:`ResourceExhausted` after *seconds*; nobody else's memory is waited for.
        """
        try:
            async with asyncio.timeout(seconds):
                while self.num_in_use(owner) >= limit:
                    await self.returned.wait()
        except TimeoutError:
            raise ResourceExhausted(
                f"{owner.partition(':')[2]}: {limit} earlier saves were still on their way to disk "
                f"after {seconds:.0f} s: save less often, or skip saves (when_busy='skip')"
            ) from None

    def keep_warm(self, slot: Slot, table: SegmentTable | None = None) -> None:
        """Take *slot* back for its owner's next session: its client has let it go. With *table*
        that blob, which is committed, is read from it until then."""
        if table is not None:
            self._tiers.sealed.keep(slot, table)
        self._pool.release(slot)
        self._last_used[slot.owner] = asyncio.get_running_loop().time()
        self._tell_returned()

    async def close(self, slot: Slot) -> None:
        """Take *slot* back for good: its client may still write to it."""
        await self._tiers.run(self._pool, self._pool.discard, slot)
        self._tell_returned()

    def _tell_returned(self) -> None:
        self.returned.set()
        self.returned = asyncio.Event()

    def hold(self, session: str, slot: Slot, table: SegmentTable | None) -> None:
        """Leave *slot* lent, though its session has landed, until one of the next two calls. With
        *table* it holds all of that blob."""
        self._held[session] = slot
        self._tables[session] = table

    def reuse_held(self, session: str) -> None:
        """Keep the slot warm that is held for *session*, if one is; its blob is read from there."""
        table = self._tables.pop(session, None)
        if (slot := self._held.pop(session, None)) is not None:
            self.keep_warm(slot, table)

    async def close_held(self, session: str) -> None:
        """Close the slot that is held for *session*, if one is."""
        self._tables.pop(session, None)
        if (slot := self._held.pop(session, None)) is not None:
            await self.close(slot)

    def drop_owner(self, owner: str) -> None:
        """Close what *owner* has warm, and what it has on loan as soon as that comes back."""
        self._last_used.pop(owner, None)
        self._pool.drop_owner(owner)

    def drop_idle(self, busy: Collection[str]) -> None:
        """Close what owners that are not *busy* have kept warm for too long."""
        now = asyncio.get_running_loop().time()
        for owner, used in list(self._last_used.items()):
            if owner not in busy and now - used > SLOT_IDLE_SECONDS:
                self.drop_owner(owner)
