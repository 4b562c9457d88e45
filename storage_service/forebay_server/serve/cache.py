"""Which fetched blobs are kept, where, and what goes for them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

from forebay_server.serve.foresight import Foresight
from forebay_server.serve.promote import Place
from forebay_server.tier.registry import Tiers
from forebay_server.tier.space import in_blocks
from forebay_server.tier.store import HEALTHY, Tier
from forebay_wire.errors import ForebayError

logger = logging.getLogger(__name__)

ASK_SECONDS: Final = 0.05
"""How often clients are asked for open blobs at most."""

ASK_SHARE: Final = 0.25
"""Of a tier is kept ready to go: neither needed soon nor open."""


READS_SECONDS: Final = 0.5
"""How often reads are looked at, where nobody waits for that."""

MAX_READS: Final = 4096
"""Reads until then that count; the oldest of more are as if they had not been."""

MAX_KINDS: Final = 1 << 16


async def none_of(blobs: Sequence[str]) -> set[str]:
    """Says that no blobs belong to checkpoints."""
    return set()


class Evictor(Protocol):
    """What is needed of :class:`forebay_server.move.evict.Evictor`."""

    def fill_room(self, tier: Tier, promised_bytes: int) -> int:
        """Bytes that the cache may still add before something goes, beside those promised."""
        ...

    def spare_room(self, tier: Tier, promised_bytes: int) -> int:
        """As far as nothing has to go for it later either."""
        ...

    def may_go(self, tier: str, blob: str) -> bool:
        """Whether a copy may go as far as clients are concerned."""
        ...

    async def evict(self, tier: Tier, blobs: list[str]) -> int:
        """Take copies away, those that may go; the bytes given back."""
        ...


class Cache:
    """Belongs to the event loop."""

    def __init__(
        self,
        tiers: Tiers,
        foresight: Foresight,
        evictor: Evictor,
        ask_back: Callable[[Sequence[str]], object] = lambda blobs: None,
        waited: Callable[[str, Mapping[str, float]], object] = lambda plan, seconds: None,
        of_checkpoints: Callable[[Sequence[str]], Awaitable[set[str]]] = none_of,
    ) -> None:
        """*ask_back* tells clients which blobs that they have open somebody else needs room of;
        *waited* is told how long readers of a plan waited, and why; *of_checkpoints* says which
        blobs are those of checkpoints, whose reads tell nothing about what is read again."""
        self._waited = waited
        self._tiers = tiers
        self._foresight = foresight
        self._evictor = evictor
        self._ask_back = ask_back
        self._ask_at = 0.0
        self._promised: Counter[tuple[str, str, int]] = Counter()
        """Tier, blob and its bytes, of fetches that have begun."""
        self._of_checkpoints = of_checkpoints
        self._reads: deque[tuple[str, int]] = deque(maxlen=MAX_READS)
        self._kinds: dict[str, bool] = {}
        """Blob to whether it belongs to a checkpoint."""

    def entered(self, place: Place) -> None:
        """A copy of a blob that another tier has, too, is in the landing tier of *place* now."""
        if any(tier.name == place.tier for tier in self._tiers.landing):
            self._foresight.stored(place.tier, place.blob, in_blocks(place.file_bytes))

    def asked(self, plan: str, blob: str) -> None:
        """A reader asks for *blob* now: what counts from here on is its next use after that."""
        self._foresight.served(plan, blob)

    def read(self, blob: str, num_bytes: int) -> None:
        """A reader opens *blob*. From any thread."""
        self._reads.append((blob, in_blocks(num_bytes)))

    async def run(self) -> None:
        """Look at what was read, until cancelled."""
        while True:
            await asyncio.sleep(READS_SECONDS)
            try:
                await self.note_reads()
            except ForebayError as error:
                logger.warning("what was read is not known: %s", error)

    async def note_reads(self) -> None:
        """Have what was read up to here count in what is kept."""
        await self._learn_kinds()
        while self._reads and self._reads[0][0] in self._kinds:
            blob, num_bytes = self._reads.popleft()
            if self._kinds.get(blob):
                self._foresight.touched(blob)
            else:
                self._foresight.asked(blob, num_bytes)

    async def _learn_kinds(self) -> None:
        unknown = {blob for blob, _ in tuple(self._reads)} - self._kinds.keys()
        if not unknown:
            return
        found = await self._of_checkpoints(sorted(unknown))
        if len(self._kinds) > MAX_KINDS:
            self._kinds.clear()
        self._kinds.update((blob, blob in found) for blob in unknown)

    def waited(self, plan: str, seconds: Mapping[str, float]) -> None:
        """A reader has waited for a blob: reason to seconds."""
        self._waited(plan, seconds)

    async def tiers_for(self, source: Place) -> list[Tier]:
        """The landing tiers that take a blob which somebody has just asked for, best first, with
        room made in the first; empty: it is not kept.

        A blob that a plan reads again takes the room of those that are needed later. Of those that
        no plan knows, what was read before decides which are worth room: else every scan would
        wash the cache out.
        """
        if not self._foresight.is_needed(source.blob):
            await self.note_reads()
        return [tier for tier in self._better(source) if await self.make_room(tier, source)]

    async def make_room(self, tier: Tier, source: Place) -> bool:
        """Whether *tier* has room for the blob at *source* now, or its room is worth others'."""
        needed = in_blocks(source.file_bytes)
        promised = self._promised_beside(tier, source.blob)
        room = self._evictor.fill_room(tier, promised)
        if needed <= room and (
            needed <= self._evictor.spare_room(tier, promised)
            or self._foresight.is_wanted(tier.name, source.blob, needed)
        ):
            return True
        verdict = self._foresight.should_admit(
            tier.name,
            source.blob,
            needed,
            room,
            lambda blob: self._evictor.may_go(tier.name, blob),
        )
        if not verdict.admit:
            return False
        await self._evictor.evict(tier, list(verdict.victims))
        return self.has_room(tier, source)

    def has_room(self, tier: Tier, source: Place) -> bool:
        """Whether *tier* has room for the blob at *source* without taking others'."""
        promised = self._promised_beside(tier, source.blob)
        return in_blocks(source.file_bytes) <= self._evictor.fill_room(tier, promised)

    @contextmanager
    def promise(self, tier: Tier, source: Place) -> Iterator[None]:
        """Inside, room for the blob at *source* is kept: fetches that begin together must not count
        on the same."""
        self.keep_room(tier, source)
        try:
            yield
        finally:
            self.let_room_go(tier, source)

    def keep_room(self, tier: Tier, source: Place) -> None:
        """Promise room until :meth:`let_room_go`; for one blob it counts once, however often."""
        self._promised[tier.name, source.blob, in_blocks(source.file_bytes)] += 1

    def let_room_go(self, tier: Tier, source: Place) -> None:
        """The copy counts by itself now, or will not come."""
        key = (tier.name, source.blob, in_blocks(source.file_bytes))
        self._promised[key] -= 1
        if not self._promised[key]:
            del self._promised[key]

    def _promised_beside(self, tier: Tier, blob: str) -> int:
        """Bytes promised to others than *blob*."""
        return sum(
            num_bytes
            for name, other, num_bytes in self._promised
            if name == tier.name and other != blob
        )

    def ask_ahead(self) -> None:
        """Where a tier is about to be full, ask clients for what they hold open and need last: so
        that it can go when its room is needed."""
        now = self._foresight.clock()
        if now < self._ask_at:
            return
        self._ask_at = now + ASK_SECONDS
        for tier in self._tiers.landing:
            if tier.health != HEALTHY:
                continue
            space = tier.space()
            share = int((space.used_bytes + space.reserved_bytes + space.free_bytes) * ASK_SHARE)
            if self._evictor.fill_room(tier, 0) < share:
                self._ask_back(self._foresight.victims(tier.name, share, lambda blob: True))

    def _better(self, source: Place) -> list[Tier]:
        """The landing tiers that are faster than the one where the blob lies."""
        names = [tier.name for tier in self._tiers.landing]
        stop = names.index(source.tier) if source.tier in names else len(names)
        return [tier for tier in self._tiers.landing[:stop] if tier.health == HEALTHY]
