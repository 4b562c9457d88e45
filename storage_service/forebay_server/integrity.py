"""Puts together what finds damage and mends it: scrub, repair, fsck, garbage collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    COMPACT,
    DELETE,
    FLUSH,
    GARBAGE,
    REPAIR,
    RETURN,
    SCRUB,
    TOMBSTONE,
    Job,
    are_settled,
    enqueue,
    get_job,
)
from forebay_server.catalog.queries_scrub import plan_scrub, repair_outcome
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.collect import Collector
from forebay_server.move.compact import Compactor
from forebay_server.move.copy import Copier
from forebay_server.move.fsck import Finding, Fsck
from forebay_server.move.garbage import Doomed, Garbage
from forebay_server.move.jobs import Handler, Jobs
from forebay_server.move.mend import Mender
from forebay_server.move.repair import Publisher, Repairer
from forebay_server.move.returns import Returns
from forebay_server.move.scrub import Report, Scrub, read_report, scrub_target
from forebay_server.observe.metrics import Sample
from forebay_server.serve.open import Opener
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import NotFound

SETTLE_SECONDS = 60.0
"""How long a repair waits for the jobs that it queued before it looks again."""
SCRUB_PRIORITY = 1
"""What somebody asked for comes before what comes by itself."""


@dataclass(frozen=True)
class ScrubState:
    """One scrub: its job, what it has found, and what became of each damaged copy."""

    job: Job
    report: Report
    outcomes: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """What fsck has found."""

    found: list[Finding]
    left: list[Finding]
    """What is wrong after the repair; without one the same as :attr:`found`."""


class Integrity:
    """Belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        opener: Opener,
        publisher: Publisher | None,
        locks: NamedLocks,
        budget: Budget,
        *,
        is_planned: Callable[[str], bool] = lambda blob: False,
        scrub_bytes_per_second: float = 0,
        scrub_interval_seconds: float = 0,
        grace_seconds: float = 3600.0,
    ) -> None:
        """*publisher* brings blobs into the object tier, None without one; *locks* are shared with
        all who move blobs; *is_planned* tells whether a plan is going to read a blob."""
        self._catalog = catalog
        self._interval_seconds = scrub_interval_seconds

        def is_in_use(blob: str) -> bool:
            return opener.is_open(blob) or is_planned(blob)

        self.collector = Collector(
            catalog,
            tiers,
            locks,
            is_open=is_in_use,
            forget=opener.forget,
            wake=lambda: self._jobs.wake(),
            grace_seconds=grace_seconds,
        )
        self.scrub = Scrub(
            catalog,
            tiers,
            opener.quarantine,
            budget,
            locks,
            bytes_per_second=scrub_bytes_per_second,
            interval_seconds=scrub_interval_seconds,
            wake=lambda: self._jobs.wake(),
        )
        self.repairer = Repairer(
            catalog,
            tiers,
            Copier(opener.bringer, budget, locks),
            Mender(catalog, tiers, budget, locks, opener.quarantine.condemn, forget=opener.forget),
            publisher,
            locks,
            return_good=opener.return_good,
            forget=opener.forget,
        )
        self.compactor = Compactor(
            catalog, tiers, budget, is_open=opener.is_open, forget=opener.forget
        )
        self._tiers = tiers
        self._fsck = Fsck(
            catalog, tiers, self.collector, opener.quarantine, locks, grace_seconds=grace_seconds
        )
        self.garbage = Garbage(catalog, tiers, self.collector, is_in_use)
        self.handlers: dict[str, Handler] = {
            COLLECT: self.collector.collect,
            COMPACT: self.compactor,
            DELETE: self.collector.delete_manifest,
            REPAIR: self.repairer,
            RETURN: Returns(catalog, opener.return_good),
            SCRUB: self.scrub,
        }

    async def start(self, jobs: Jobs) -> None:
        """Plan the next background scrub."""
        self._jobs = jobs
        await self._catalog.write(lambda connection: plan_scrub(connection, self._interval_seconds))

    async def begin_scrub(self, tier: str) -> ScrubState:
        """Read all copies, of one tier or (empty) of all, now; the scrub of the same that runs
        already, if there is one."""
        target = scrub_target(tier, self._tiers)
        job = await self._catalog.write(
            lambda connection: enqueue(connection, SCRUB, target, priority=SCRUB_PRIORITY)
        )
        self._jobs.wake()
        return await self.look_at_scrub(job)

    async def look_at_scrub(self, job: str) -> ScrubState:
        """How far a scrub is. :class:`NotFound` for one that ended long ago."""

        def look(connection: Connection) -> ScrubState:
            found = get_job(connection, job)
            if found is None or found.kind != SCRUB:
                raise NotFound(f"there is no scrub {job!r} (any more)")
            report = read_report(found.journal)
            outcomes = tuple(
                repair_outcome(connection, one["blob"], one["tier"]) for one in report.damaged
            )
            return ScrubState(found, report, outcomes)

        return await self._catalog.read(look)

    async def fsck(self, *, repair: bool) -> Checked:
        """Compare the catalog with the tiers; with *repair* mend what can be mended, and look
        again once that is done."""
        found = await self._fsck.run(repair=repair)
        if not repair or not found:
            return Checked(found, found)
        self._jobs.wake()
        kinds = (REPAIR, FLUSH, COLLECT, TOMBSTONE)
        await self._catalog.wait_until(
            lambda connection: are_settled(connection, kinds) or None, SETTLE_SECONDS
        )
        return Checked(found, await self._fsck.run())

    async def list_garbage(self) -> list[Doomed]:
        """What would be deleted now."""
        return await self.garbage.find()

    async def collect(self) -> None:
        """Have it deleted, in the background."""
        await self._catalog.write(lambda connection: enqueue(connection, COLLECT, GARBAGE))
        self._jobs.wake()

    def samples(self) -> Iterator[Sample]:
        """What it did since the start, as values of the gauges in ``observe.metrics``."""
        for tier, number in self.scrub.num_bytes.items():
            yield Sample("forebay_scrubbed_bytes", (tier,), number)
        for tier, number in self.scrub.num_damaged.items():
            yield Sample("forebay_scrub_damaged_replicas", (tier,), number)
        for result, number in self.repairer.num_done.items():
            yield Sample("forebay_repairs", (result,), number)
