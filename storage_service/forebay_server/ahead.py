"""Puts together what looks ahead: plans, prefetching, what is kept and what goes for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import ORIGIN_TIER
from forebay_server.catalog.queries_generation_blobs import blobs_of_generations
from forebay_server.model.watermarks import Watermarks
from forebay_server.move.evict import Evictor
from forebay_server.observe.metrics import Sample
from forebay_server.serve.cache import Cache
from forebay_server.serve.foresight import Foresight
from forebay_server.serve.open import Opener
from forebay_server.serve.origin_ahead import OriginAhead
from forebay_server.serve.plans import Plans
from forebay_server.serve.prefetch import Prefetcher
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_wire.errors import ForebayError


class Ahead:
    """Belongs to the event loop; :meth:`run` it in the background."""

    def __init__(
        self,
        tiers: Tiers,
        catalog: Catalog,
        opener: Opener,
        *,
        is_busy: Callable[[str], bool] = lambda tier: False,
        marks: Watermarks | None = None,
    ) -> None:
        """*is_busy* answers whether a reader waits for bytes of a tier."""
        self._opener = opener
        self.foresight = Foresight({tier.name: _usable_bytes(tier) for tier in tiers.landing})
        self.evictor = Evictor(
            catalog,
            tiers,
            self.foresight,
            is_open=opener.is_open,
            forget=opener.forget,
            marks=marks,
        )
        self.cache = Cache(
            tiers,
            self.foresight,
            self.evictor,
            opener.ask_back,
            lambda plan, seconds: self.plans.waited(plan, seconds),
            lambda blobs: catalog.read(lambda connection: blobs_of_generations(connection, blobs)),
        )
        self.prefetcher = Prefetcher(
            tiers, catalog, self.foresight, self.cache, opener.bring_ahead, is_busy=is_busy
        )
        self.plans = Plans(catalog, self.foresight, changed=self._changed)
        self.origins = OriginAhead(
            self.foresight,
            self.plans,
            opener.origins.read_ahead,
            is_busy=lambda: is_busy(ORIGIN_TIER),
        )
        opener.origins.listen(self.plans.learned)
        opener.follow(self.cache)
        tiers.relieve = self.evictor.make_room
        self.evictor.listen(self.prefetcher.forget)

    def _changed(self) -> None:
        self.prefetcher.wake()
        self.origins.wake()

    def left(self, tier: str, blob: str) -> None:
        """A job has taken the copy of *blob* out of *tier*."""
        self.foresight.removed(tier, blob)
        self.prefetcher.forget(blob)
        self.prefetcher.wake()

    def samples(self) -> Iterator[Sample]:
        """What it did since the start, as values of the gauges in ``observe.metrics``."""
        for result, number in self._opener.num_opens.items():
            yield Sample("forebay_cache_opens", (result,), number)
        for tier, num_bytes in self._opener.fetched_bytes().items():
            yield Sample("forebay_fetched_bytes", (tier,), num_bytes)
        yield Sample("forebay_prefetched_bytes", (), self.prefetcher.fetched_bytes)
        for tier, num_bytes in self.evictor.evicted_bytes.items():
            yield Sample("forebay_evicted_bytes", (tier,), num_bytes)
        yield Sample("forebay_plans", (), len(self.plans.all))
        totals = self.plans.totals
        yield Sample("forebay_loader_samples_total", (), totals.samples)
        yield Sample("forebay_loader_masked_samples_total", (), totals.masked_samples)
        for cause, seconds in totals.stalls.items():
            yield Sample("forebay_loader_wait_seconds_total", (cause,), seconds)
        for cause, seconds in totals.reading.items():
            yield Sample("forebay_loader_read_seconds_total", (cause,), seconds)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.evictor.run())
            group.create_task(self.cache.run())
            group.create_task(self.plans.run())
            group.create_task(self.prefetcher.run())
            group.create_task(self.origins.run())


def _usable_bytes(tier: Tier) -> int:
    """A first guess, until the evictor looks."""
    try:
        space = tier.space()
    except ForebayError:
        return 1
    return space.used_bytes + space.reserved_bytes + space.free_bytes
