"""Fetches what plans are going to read before they do, the most urgent first."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.serve.cache import Cache
from forebay_server.serve.disk_runs import DiskRuns, Needed
from forebay_server.serve.foresight import Foresight
from forebay_server.serve.promote import Place, places_of
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_wire.errors import ForebayError, NotFound, ResourceExhausted
from forebay_wire.limits import MIB

logger = logging.getLogger(__name__)

STREAMS: Final = {"object": 24, "hdd": 1}
"""Fetches at a time by the kind of tier where they come from: fewer than the tier has threads, so
that there is one for whoever waits. A disk reads one file after the other, in runs."""

FIRST_STREAMS: Final = 4
"""Fetches that begin together after a pause; each that ends lets one more begin. All at once would
share the link, and what is needed first would come last."""

MAX_BYTES: Final = 96 * MIB
"""On their way at a time: large blobs need fewer streams to fill a link."""

LOOK: Final = 64
"""Needed blobs that one search finds, so many that it runs rarely."""

MARGIN: Final = 1.25
"""Room of others is taken for what is needed within this many times the duration of a fetch: later
more is known about what can go."""

SOONEST_SECONDS: Final = 0.1

YIELD_SECONDS: Final = 0.02
"""After so long it looks again whether readers still wait."""

RETRY_SECONDS: Final = 5.0
"""A blob that could not be fetched is left to its readers for this long."""

MAX_KNOWN: Final = 1 << 16

Bring = Callable[[Place, Tier], Awaitable[None]]
"""Copies a blob into a tier, once however many want it."""


@dataclass(frozen=True)
class _Known:
    """What the catalog said about a blob: where to fetch it from, None if there is no need."""

    source: Place | None


class Prefetcher:
    """Belongs to the event loop; :meth:`run` it in the background."""

    def __init__(
        self,
        tiers: Tiers,
        catalog: Catalog,
        foresight: Foresight,
        cache: Cache,
        bring: Bring,
        *,
        is_busy: Callable[[str], bool] = lambda tier: False,
    ) -> None:
        """*is_busy* answers whether a reader waits for bytes of a tier: then no fetch from there is
        begun."""
        self._tiers = tiers
        self._catalog = catalog
        self._foresight = foresight
        self._cache = cache
        self._bring = bring
        self._is_busy = is_busy
        self._woken = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._known: dict[str, _Known] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._runs = DiskRuns(tiers)
        self._num_running = dict.fromkeys(STREAMS, 0)
        self._bytes_running = 0
        self._num_streams = FIRST_STREAMS
        self._failed: dict[str, float] = {}
        self._fetch_seconds = SOONEST_SECONDS
        self.num_fetched = 0
        self.fetched_bytes = 0

    def wake(self) -> None:
        """Something else may be needed, or fit, now."""
        self._woken.set()

    def _wake_in(self, seconds: float) -> None:
        """:meth:`wake` then, or before."""
        loop = asyncio.get_running_loop()
        alarm, moment = self._alarm, loop.time() + seconds
        if alarm is not None and loop.time() < alarm.when() <= moment:
            return
        if alarm is not None:
            alarm.cancel()
        self._alarm = loop.call_at(moment, self.wake)

    def forget(self, blob: str) -> None:
        """The blob's copies changed."""
        self._known.pop(blob, None)

    async def run(self) -> None:
        """Fetch ahead, until cancelled; running fetches are cancelled, too."""
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                try:
                    await self._start_some()
                except ForebayError as error:
                    logger.warning("nothing is prefetched now: %s", error)
                    await asyncio.sleep(1.0)
                    self.wake()
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------- choosing

    async def _start_some(self) -> None:
        """Begin fetches until all streams are busy, or nothing more is worth it now."""
        if not self._foresight.has_plans or all(
            self._num_running[kind] >= limit for kind, limit in STREAMS.items()
        ):
            return
        self._cache.ask_ahead()
        sources = await self._needed()
        is_held_up = False
        for seconds, source in sources:
            kind = self._tiers.get(source.tier).kind
            if self._num_running[kind] >= STREAMS[kind] or source.blob in self._running:
                continue
            if self._is_busy(source.tier):
                is_held_up = True
                continue
            if self._is_enough(source):
                break
            if not await self._begin_some(source, seconds, sources):
                break
        if is_held_up:
            self._wake_in(YIELD_SECONDS)
        now = time.monotonic()
        self._failed = {blob: at for blob, at in self._failed.items() if at > now}
        if self._failed:
            self._wake_in(min(self._failed.values()) - now)

    async def _needed(self) -> list[Needed]:
        """What is needed next and lies in slower tiers only, in order of need."""
        uses = self._foresight.upcoming(LOOK, self._may_be_missing)
        await self._locate([use.blob for use in uses])
        now = self._foresight.clock()
        sources = []
        for use in uses:
            known = self._known.get(use.blob)
            if known is not None and known.source is not None:
                sources.append((use.time - now, known.source))
        await self._runs.learn([source for _, source in sources if self._is_on_disk(source)])
        return sources

    def _is_on_disk(self, source: Place) -> bool:
        return self._tiers.get(source.tier).kind == "hdd"

    def _is_enough(self, source: Place) -> bool:
        """Whether so much is on its way that the blob at *source* has to wait."""
        if len(self._running) >= self._num_streams:
            return True
        return bool(self._running) and self._bytes_running + source.num_bytes > MAX_BYTES

    def _may_be_missing(self, blob: str) -> bool:
        best = self._tiers.landing[0].name
        if blob in self._running or self._foresight.holds(best, blob):
            return False
        if self._failed.get(blob, 0.0) > time.monotonic():
            return False
        known = self._known.get(blob)
        return known is None or known.source is not None

    async def _locate(self, blobs: list[str]) -> None:
        unknown = [blob for blob in blobs if blob not in self._known]
        if not unknown:
            return
        located = await self._catalog.locate(unknown)
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        for blob in unknown:
            found = located.get(blob)
            places = places_of(found) if found is not None else []
            self._known[blob] = _Known(self._source(places))

    def _source(self, places: list[Place]) -> Place | None:
        """The copy to fetch from, None where the best tier has the blob, or nobody."""
        best = self._tiers.landing[0]
        if any(place.tier == best.name for place in places):
            return None
        names = {tier.name for tier in self._tiers.all}
        here = [place for place in places if place.tier in names]
        here.sort(key=lambda place: self._tiers.get(place.tier).kind != "hdd")
        return here[0] if here else None

    async def _begin_some(self, source: Place, seconds: float, sources: Sequence[Needed]) -> bool:
        """Begin to fetch *source*, or what its disk is to read before that in its run."""
        if not self._is_on_disk(source):
            return await self._begin(source, seconds)
        disk = source.tier
        needed = [
            (at, one) for at, one in sources if one.tier == disk and one.blob not in self._running
        ]
        first_seconds, first = self._runs.choose(disk, needed)
        if await self._begin(first, first_seconds, self._runs.seconds_left(disk)):
            self._runs.begun(first)
            return True
        self._runs.give_up(disk)
        if first.blob == source.blob or not await self._begin(source, seconds):
            return False
        self._runs.begun(source)
        return True

    async def _begin(self, source: Place, seconds: float, run_seconds: float = 0.0) -> bool:
        """Begin to fetch one blob that is needed in *seconds*; False: there is no room for it, nor
        for what is needed later. What is read in one run of *run_seconds* takes its room at once.
        """
        tier = self._tiers.landing[0]
        soon = max(SOONEST_SECONDS, MARGIN * max(self._fetch_seconds, run_seconds))
        if not self._cache.has_room(tier, source):
            if seconds > soon:
                self._wake_in(seconds - soon)
                return False
            if not await self._cache.make_room(tier, source):
                return False
        kind = self._tiers.get(source.tier).kind
        self._num_running[kind] += 1
        self._bytes_running += source.num_bytes
        self._cache.keep_room(tier, source)
        task = asyncio.create_task(self._fetch(source, tier), name=f"prefetch-{source.blob}")
        self._running[source.blob] = task
        task.add_done_callback(lambda _: self._end(source, tier, kind))
        return True

    # ------------------------------------------------------------------------------- fetching

    async def _fetch(self, source: Place, tier: Tier) -> None:
        started = time.monotonic()
        try:
            await self._bring(source, tier)
        except ResourceExhausted:
            return  # somebody else took the room: looked at again with the next change
        except ForebayError as error:
            self._failed[source.blob] = time.monotonic() + RETRY_SECONDS
            level = logging.DEBUG if isinstance(error, NotFound) else logging.INFO
            logger.log(level, "blob %s is not prefetched: %s", source.blob, error)
            return
        took = time.monotonic() - started
        if self._is_on_disk(source):
            self._runs.ended(source, took)
        self._fetch_seconds += 0.2 * (took - self._fetch_seconds)
        self._failed.pop(source.blob, None)
        self.num_fetched += 1
        self.fetched_bytes += source.num_bytes

    def _end(self, source: Place, tier: Tier, kind: str) -> None:
        self._num_running[kind] -= 1
        self._bytes_running -= source.num_bytes
        self._cache.let_room_go(tier, source)
        self._running.pop(source.blob, None)
        self._num_streams = self._num_streams + 1 if self._running else FIRST_STREAMS
        self._known.pop(source.blob, None)
        self.wake()
