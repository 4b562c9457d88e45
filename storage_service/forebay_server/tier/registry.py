"""The tiers of this node, each with its own threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from forebay_server.tier.course import Reason, current_course, on_thread
from forebay_server.tier.memory import SlotPool
from forebay_server.tier.sealed import SealedBlobs
from forebay_server.tier.store import HEALTHY, Tier, TierKind
from forebay_wire.errors import InvalidRequest

P = ParamSpec("P")
T = TypeVar("T")

THREADS: Final[dict[TierKind, int]] = {"ram": 2, "ssd": 4, "hdd": 2, "object": 32}
"""Calls at a time: an SSD likes a queue, a disk head does not, an object store has latency."""

LANDING_THREADS: Final = 4
"""Blobs that land in one tier at a time. They have threads of their own: a landing takes seconds,
and what is short (a reservation, an open) must not wait for it."""

MOVING_THREADS: Final[dict[TierKind, int]] = {"ram": 1, "ssd": 3, "hdd": 2, "object": 6}
"""Background copies from, or checks in, one tier at a time. They have threads of their own as they
wait for their turn: no reader may stand behind them."""

ANSWER_SECONDS: Final = 5.0
"""A tier that takes longer to say whether it has a file does not count just now."""

_LANDING_ORDER: Final[dict[TierKind, int]] = {"ssd": 0, "hdd": 1}


class Tiers:
    """All tiers of a daemon. Belongs to the event loop, except where a method says otherwise.

    ``start`` opens them all; ``close`` waits for running calls.
    """

    def __init__(self, tiers: Sequence[Tier], slots: SlotPool, *, why_not_remote: str = "") -> None:
        """At most one of *tiers* is of kind ``object``, beside a foreign one; names are unique.
        *why_not_remote*: why nothing ever becomes remote although there is an object store."""
        self.why_not_remote = why_not_remote
        self.all = tuple(tiers)
        self.slots = slots
        self.sealed = SealedBlobs(slots)
        """What can be read from slots while it lands."""
        self.landing = tuple(
            sorted(
                (tier for tier in tiers if tier.kind in _LANDING_ORDER),
                key=lambda tier: _LANDING_ORDER[tier.kind],
            )
        )
        """The tiers that take new bytes, best first."""
        self.object = next((tier for tier in tiers if tier.kind == "object" and tier.keeps), None)
        """Where what is ``remote`` lies."""
        self.caches = tuple(tier for tier in tiers if tier.caches_only)
        """Where copies lie that count for nothing."""
        self.own = (*self.landing, *(one for one in (self.object,) if one), *self.caches)
        """Those whose files are this catalog's."""
        self.relieve: Callable[[Tier, int], Awaitable[int]] = _relieve_nothing
        """Gives back so many bytes of a landing tier by removing copies that other tiers have, as
        far as they may go; answers how many."""
        self._by_name = {tier.name: tier for tier in tiers}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._landing_threads: dict[str, ThreadPoolExecutor] = {}
        self._moving_threads: dict[str, ThreadPoolExecutor] = {}

    async def start(self) -> None:
        """Open all tiers, in parallel. The first error ends the others' use too."""
        for tier in self.all:
            self._threads[tier.name] = ThreadPoolExecutor(THREADS[tier.kind], f"tier-{tier.name}")
            name = f"moving-{tier.name}"
            self._moving_threads[tier.name] = ThreadPoolExecutor(MOVING_THREADS[tier.kind], name)
        for tier in self.landing:
            name = f"landing-{tier.name}"
            self._landing_threads[tier.name] = ThreadPoolExecutor(LANDING_THREADS, name)
        self._threads[self.slots.name] = ThreadPoolExecutor(THREADS["ram"], "tier-ram")
        try:
            async with asyncio.TaskGroup() as group:
                for tier in self.all:
                    group.create_task(self.run(tier, tier.open))
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None

    async def close(self) -> None:
        """Wait for running calls, then let go of everything. Idempotent."""
        for pools in (self._moving_threads, self._landing_threads, self._threads):
            for threads in pools.values():
                await asyncio.to_thread(threads.shutdown)
        self._moving_threads.clear()
        self._landing_threads.clear()
        self._threads.clear()
        for tier in self.all:
            tier.close()
        self.sealed.close()
        self.slots.close()

    def count(self) -> frozenset[str]:
        """The tiers in service whose copies another one may be given up for."""
        return frozenset(
            tier.name for tier in self.all if not tier.caches_only and tier.health == HEALTHY
        )

    async def answering(self) -> frozenset[str]:
        """Those of :meth:`count` that answer now: each is asked, unless it has just answered."""
        counting = self.count()
        asked = [tier for tier in self.all if tier.name in counting]
        told = await asyncio.gather(*(self._answers(tier) for tier in asked))
        return frozenset(tier.name for tier, answers in zip(asked, told, strict=True) if answers)

    async def _answers(self, tier: Tier) -> bool:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self.run(tier, tier.answers)
        except TimeoutError:
            return False

    def get(self, name: str) -> Tier:
        """The tier called *name*. Callable from any thread."""
        tier = self._by_name.get(name)
        if tier is None:
            raise InvalidRequest(
                f"there is no tier {name!r} on this node; it has {', '.join(self._by_name)}"
            )
        return tier

    async def run(
        self, tier: Tier | SlotPool, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """*call* on a thread of *tier*. A cancelled caller does not stop a call that runs."""
        threads, course = self._threads[tier.name], current_course()
        if course is None:
            return await asyncio.wrap_future(threads.submit(call, *args, **kwargs))

        def told() -> T:
            with on_thread(course, reason_of(tier)):
                return call(*args, **kwargs)

        return await asyncio.wrap_future(threads.submit(told))

    async def run_landing(
        self, tier: Tier, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like :meth:`run`, for a *call* that lands bytes in one of :attr:`landing`."""
        threads = self._landing_threads[tier.name]
        return await asyncio.wrap_future(threads.submit(call, *args, **kwargs))

    async def run_moving(
        self, tier: Tier, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like :meth:`run`, for a *call* that moves bytes in the background and may wait."""
        threads = self._moving_threads[tier.name]
        return await asyncio.wrap_future(threads.submit(call, *args, **kwargs))


def reason_of(tier: Tier | SlotPool) -> Reason:
    """Why somebody waits who waits for a call of *tier*."""
    return "origin" if tier.kind == "object" else "tier"


async def _relieve_nothing(tier: Tier, num_bytes: int) -> int:
    return 0
