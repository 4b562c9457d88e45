"""Gives room back in the landing tiers: copies that another tier has, the least needed first.

A copy goes in the order of promise 3: nothing is added here, as another tier has the blob already;
the row goes in a transaction that checks exactly that, and then the file. What is dirty, pinned or
open stays.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Final, Protocol

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import FileRef, batches
from forebay_server.catalog.queries_evict import PAGE_ROWS, Spare, spare_replicas
from forebay_server.catalog.queries_moves import give_up_replica
from forebay_server.catalog.queries_policies import Claim
from forebay_server.model.watermarks import START, Watermarks, step
from forebay_server.tier.registry import Tiers
from forebay_server.tier.space import in_blocks
from forebay_server.tier.store import HEALTHY, Tier, TierSpace
from forebay_wire.errors import Conflict, ForebayError
from forebay_wire.failpoints import failpoint

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
"""How often the fill levels are looked at."""

RELOAD_SHARE: Final = 0.1
"""Of the time goes at most into looking through the catalog for copies that may go by now."""


class Order(Protocol):
    """What is needed of :class:`forebay_server.serve.foresight.Foresight`."""

    def stored(self, tier: str, blob: str, num_bytes: int) -> None: ...

    def removed(self, tier: str, blob: str) -> None: ...

    def resize(self, tier: str, num_bytes: int) -> None: ...

    def victims(self, tier: str, num_bytes: int, may_go: Callable[[str], bool]) -> list[str]: ...


class Evictor:
    """Belongs to the event loop; :meth:`run` it in the background."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        order: Order,
        *,
        is_open: Callable[[str], bool],
        forget: Callable[[str], object],
        marks: Watermarks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*order* says what goes first; *is_open* whether a client has a blob in hand; *forget* is
        told of a blob whose copy goes, before it does."""
        self._catalog = catalog
        self._tiers = tiers
        self._order = order
        self._is_open = is_open
        self._forget = forget
        self._marks = marks or Watermarks()
        self._clock = clock
        self.claim: Callable[[str], Claim | None] = lambda kind: None
        """The policies that keep copies in a kind of tier."""
        self._counting = tiers.count()
        self._states = {tier.name: START for tier in tiers.landing}
        self._going: set[tuple[str, str]] = set()
        self._left: list[tuple[Tier, str, FileRef]] = []
        """Files without a row that a client got hold of in the last moment."""
        self._reload_at = 0.0
        self._is_stale = False
        self._listeners: list[Callable[[str], object]] = []
        self.evicted_bytes: dict[str, int] = {tier.name: 0 for tier in tiers.landing}
        """Tier to bytes given back since the start."""

    async def run(self) -> None:
        """Keep the tiers between their watermarks, until cancelled."""
        self._is_stale = True
        while True:
            if self._counting != self._tiers.count():  # a tier went or came back
                self._is_stale = True
            if self._is_stale and self._clock() >= self._reload_at:
                try:
                    await self.reload()
                except ForebayError as error:
                    self._is_stale = True
                    self._reload_at = self._clock() + LOOK_SECONDS
                    logger.warning("which copies may go is not known: %s", error)
            for tier in self._tiers.landing:
                if tier.health != HEALTHY:  # it has no room for the time being, not too many files
                    continue
                try:
                    await self.keep_marks(tier)
                except ForebayError as error:
                    logger.warning("tier %s is not relieved: %s", tier.name, error)
            await asyncio.sleep(LOOK_SECONDS)

    def listen(self, listener: Callable[[str], object]) -> None:
        """Have *listener* told of each blob whose copy has gone."""
        self._listeners.append(listener)

    def expect_more(self) -> None:
        """Copies that had to stay may go by now: blobs reached the object tier, a pin ended."""
        self._is_stale = True

    async def reload(self) -> None:
        """Look through the catalog for the copies that may go."""
        self._is_stale = False
        self._counting = self._tiers.count()
        started = self._clock()
        for tier in self._tiers.landing:
            async for spare in self._spares(tier):
                if (tier.name, spare.blob) not in self._going:
                    self._order.stored(tier.name, spare.blob, in_blocks(spare.num_bytes))
        took = self._clock() - started
        self._reload_at = self._clock() + max(took / RELOAD_SHARE, LOOK_SECONDS)

    async def _spares(self, tier: Tier) -> AsyncIterator[Spare]:
        look = functools.partial(
            spare_replicas, tier=tier.name, among=self._counting, claim=self.claim(tier.kind)
        )
        page = await self._catalog.read(look)
        while page:
            for spare in page:
                yield spare
            last = page[-1].blob
            if len(page) < PAGE_ROWS:
                return
            page = await self._catalog.read(functools.partial(look, after=last))

    async def keep_marks(self, tier: Tier) -> int:
        """One look at the fill levels of *tier*; the bytes given back."""
        space = tier.space()
        self._order.resize(tier.name, self._kept_bytes(space))
        verdict = step(
            self._marks,
            self._states[tier.name],
            used_bytes=space.used_bytes,
            reserved_bytes=space.reserved_bytes,
            open_bytes=0,
            usable_bytes=_usable_bytes(space),
        )
        self._states[tier.name] = verdict.state
        await self._unlink()
        if not verdict.evict_bytes:
            return 0
        return await self.make_room(tier, verdict.evict_bytes)

    def spare_room(self, tier: Tier, promised_bytes: int = 0) -> int:
        """As :meth:`fill_room`, as far as nothing will have to go for it later either."""
        space = tier.space()
        taken = space.used_bytes + max(space.reserved_bytes, promised_bytes)
        return min(self._kept_bytes(space) - taken, self.fill_room(tier, promised_bytes))

    def _kept_bytes(self, space: TierSpace) -> int:
        """What a tier holds after each eviction."""
        return int(self._marks.low * _usable_bytes(space))

    def fill_room(self, tier: Tier, promised_bytes: int = 0) -> int:
        """Bytes that the cache may still add in *tier* before something goes. Fetches that have
        begun count with *promised_bytes*, or with what they have reserved by now."""
        space = tier.space()
        beside = max(0, promised_bytes - space.reserved_bytes)
        verdict = step(
            self._marks,
            START,
            used_bytes=space.used_bytes,
            reserved_bytes=space.reserved_bytes + beside,
            open_bytes=0,
            usable_bytes=_usable_bytes(space),
        )
        return min(verdict.fill_room_bytes, space.free_bytes - beside)

    def may_go(self, tier: str, blob: str) -> bool:
        """Whether the copy of *blob* in *tier* may go as far as clients are concerned."""
        return not self._is_open(blob) and (tier, blob) not in self._going

    async def make_room(self, tier: Tier, num_bytes: int) -> int:
        """Give back at least *num_bytes* of *tier*, if so much may go; the bytes given back."""
        freed = 0
        while freed < num_bytes:
            victims = self._order.victims(
                tier.name, num_bytes - freed, lambda blob: self.may_go(tier.name, blob)
            )
            if not victims:
                if self._clock() < self._reload_at:
                    break
                await self.reload()
                if not self._order.victims(tier.name, 1, lambda blob: self.may_go(tier.name, blob)):
                    break
                continue
            freed += await self.evict(tier, victims)
        return freed

    async def make_room_or_leave(self, tier: Tier, num_bytes: int) -> bool:
        """Give back at least *num_bytes* of *tier*, or, if not so much may go, nothing; whether it
        did."""
        while True:
            victims = self._order.victims(
                tier.name, num_bytes, lambda blob: self.may_go(tier.name, blob)
            )
            spare = await self._spare_among(tier, victims)
            if sum(spare.values()) >= num_bytes:
                return await self.evict(tier, list(spare)) >= num_bytes
            stale = [blob for blob in victims if blob not in spare]
            for blob in stale:
                self._order.removed(tier.name, blob)
            if not stale:
                if self._clock() < self._reload_at:
                    return False
                await self.reload()

    async def _spare_among(self, tier: Tier, blobs: Sequence[str]) -> dict[str, int]:
        """Those of *blobs* whose copy in *tier* may go by the catalog, with its bytes."""
        found: dict[str, int] = {}
        for part in batches(blobs):
            spares = await self._catalog.read(
                functools.partial(
                    spare_replicas,
                    tier=tier.name,
                    among=self._tiers.count(),
                    claim=self.claim(tier.kind),
                    only=part,
                )
            )
            found.update((one.blob, in_blocks(one.num_bytes)) for one in spares)
        return found

    async def evict(self, tier: Tier, blobs: list[str]) -> int:
        """Take the copies of *blobs* out of *tier*, those that may go; the bytes given back."""
        before = tier.space().used_bytes
        # In one that was not asked for long a copy may be as good as gone.
        among = await self._tiers.answering()
        await asyncio.gather(*(self._evict(tier, blob, among) for blob in blobs))
        freed = max(0, before - tier.space().used_bytes)
        self.evicted_bytes[tier.name] += freed
        return freed

    async def _evict(self, tier: Tier, blob: str, among: Collection[str]) -> None:
        key = (tier.name, blob)
        if not self.may_go(tier.name, blob):
            return
        self._going.add(key)
        try:
            # From here on an open asks the catalog, which waits for, or comes before, the removal.
            self._forget(blob)
            failpoint("evict.before_row")
            try:
                gone = await self._catalog.write(
                    lambda connection: give_up_replica(
                        connection,
                        blob,
                        tier.name,
                        "evicted",
                        "needed last",
                        among=among,
                        claim=self.claim(tier.kind),
                    )
                )
            except Conflict as error:
                logger.debug("not evicted: %s", error)
                self._order.removed(tier.name, blob)
                return
            failpoint("evict.after_row")
            self._forget(blob)
            self._order.removed(tier.name, blob)
            for listener in self._listeners:
                listener(blob)
            self._left.extend((tier, blob, ref) for ref in gone)
            await self._unlink()
            failpoint("evict.after_file")
        finally:
            self._going.discard(key)

    async def _unlink(self) -> None:
        """Delete the files of rows that are gone. One that is open stays, and counts, until it is
        released: an unlinked file would hold its room unseen."""
        waiting, self._left = self._left, []
        for entry in waiting:
            tier, blob, ref = entry
            if self._is_open(blob):
                self._left.append(entry)
            else:
                await self._tiers.run(tier, tier.delete, tier.blob_name(ref.file))


def _usable_bytes(space: TierSpace) -> int:
    """What a tier may hold: its limit, or what its file system gives it."""
    return space.used_bytes + space.reserved_bytes + space.free_bytes
