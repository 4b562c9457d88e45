"""The scrub job: every copy is read from its medium, again and again, before somebody needs it.

Targets: ``background`` comes again by itself, within a rate; ``now`` and ``now TIER`` are what
somebody asked for. All step back while readers wait for the tier, and read around the page cache. A
copy that is bad is quarantined, which queues its repair; another copy serves meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

from forebay_server.catalog import queries_scrub as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_damage import enqueue_mendable
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_scrub import BACKGROUND, Copy
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.jobs import Progress
from forebay_server.move.lists import list_problem, rewrite_list
from forebay_server.tier.encode import open_plain
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import (
    DaemonUnavailable,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
)

logger = logging.getLogger(__name__)

PAGE: Final = 1000
"""Copies that are looked up at a time: each look sorts all copies of the tier."""
BATCH_BYTES: Final = 64 << 20
BATCH: Final = 100
"""After so many copies, or bytes of them, it is stored how far it is."""
NOW: Final = "now"
MAX_NAMED: Final = 100
"""Damaged copies that a report names; it counts all."""


class Condemner(Protocol):
    """What is needed of :class:`forebay_server.quarantine.Quarantine`."""

    async def condemn(
        self, blob: str, replica_id: str, tier: str, file: str, error: ForebayError
    ) -> None:
        """Take a replica out of service because of *error*; its file stays."""
        ...


@dataclass
class Report:
    """What one scrub has found so far; the job's journal."""

    started_unix: float = 0.0
    num_copies: int = 0
    num_bytes: int = 0
    num_damaged: int = 0
    num_lists: int = 0
    """Extent lists of the object tier that were written anew."""
    num_unread: int = 0
    """Copies of which nothing is known: their tier did not answer."""
    unread: str = ""
    """Why, of the first one."""
    damaged: list[dict[str, str]] = field(default_factory=list)
    """``blob``, ``tier``, ``file``, ``problem``."""


class Scrub:
    """Handles jobs of the kind ``scrub``. Belongs to the event loop; reads on the tiers' threads.

    After a crash it goes on where it was: what was read since its start is not read again.
    """

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        quarantine: Condemner,
        budget: Budget,
        locks: NamedLocks,
        *,
        bytes_per_second: float = 0,
        interval_seconds: float = 0,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        """*locks* are shared with whoever publishes and collects blobs; *bytes_per_second* holds
        for each tier in the background (0: no limit);
        *interval_seconds* lie between two background scrubs (0: there is none); *wake* is called
        when repairs may have been queued."""
        self._catalog = catalog
        self._tiers = tiers
        self._quarantine = quarantine
        self._budget = budget
        self._locks = locks
        self._rate = Budget({tier.name: bytes_per_second for tier in tiers.own})
        self._interval_seconds = interval_seconds
        self._wake = wake
        self.num_bytes: Counter[str] = Counter({tier.name: 0 for tier in tiers.own})
        """Tier to bytes that were read since the start."""
        self.num_damaged: Counter[str] = Counter({tier.name: 0 for tier in tiers.own})
        """Tier to copies that were found bad since the start."""

    async def __call__(self, progress: Progress) -> None:
        if progress.target == BACKGROUND and self._interval_seconds:
            progress.repeat_after(self._interval_seconds)
        tiers = self._tiers_of(progress.target)
        report = Report(**progress.journal)
        if not report.started_unix:
            await self._begin(report, tiers, progress)
        progress.plan(progress.total_bytes or report.num_bytes)
        progress.advance(report.num_bytes)
        try:
            async with asyncio.TaskGroup() as group:
                for tier in tiers:
                    group.create_task(self._scrub(tier, report, progress))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if report.num_damaged or report.num_unread:
            logger.error(
                "scrub: %d of %d copies are damaged, %d could not be read",
                report.num_damaged,
                report.num_copies,
                report.num_unread,
            )

    def _tiers_of(self, target: str) -> Sequence[Tier]:
        _, _, name = target.partition(" ")
        if not name:
            return self._tiers.own
        return [self._tiers.get(name)]

    async def _begin(self, report: Report, tiers: Sequence[Tier], progress: Progress) -> None:
        names = [tier.name for tier in tiers]

        def begin(connection: Connection) -> int:
            report.started_unix = queries.database_now(connection)
            progress.note(connection, asdict(report))
            enqueue_mendable(connection)
            return queries.due_bytes(connection, names, report.started_unix)

        progress.plan(await self._catalog.write(begin))
        self._wake()

    async def _scrub(self, tier: Tier, report: Report, progress: Progress) -> None:
        """All due copies of one tier, the longest unread first."""
        after = (-1.0, "")
        good: list[str] = []
        while page := await self._page(tier, report, after):
            stored = report.num_bytes
            for one in page:
                after = (one.verified_unix, one.replica_id)
                if await self._look(tier, one, report, progress):
                    good.append(one.replica_id)
                if len(good) >= BATCH or report.num_bytes - stored >= BATCH_BYTES:
                    await self._store(good, report, progress)
                    good, stored = [], report.num_bytes
            await self._store(good, report, progress)
            good = []

    async def _page(self, tier: Tier, report: Report, after: tuple[float, str]) -> list[Copy]:
        name, started = tier.name, report.started_unix
        return await self._catalog.read(
            lambda connection: queries.due_copies(connection, name, started, after, PAGE)
        )

    async def _store(self, good: list[str], report: Report, progress: Progress) -> None:
        def store(connection: Connection) -> None:
            progress.note(connection, asdict(report))
            queries.mark_verified(connection, good)

        await self._catalog.write(store)

    # ------------------------------------------------------------------------------- one copy

    async def _look(self, tier: Tier, one: Copy, report: Report, progress: Progress) -> bool:
        """Read one copy; whether it is good."""
        is_background = progress.target == BACKGROUND

        def advance(num_bytes: int) -> None:
            if is_background:
                self._rate.take(tier.name, num_bytes, lambda: progress.advance(0))
            self._budget.take(tier.name, num_bytes, lambda: progress.advance(0))
            progress.advance(num_bytes)

        progress.advance(0)
        try:
            await self._tiers.run_moving(tier, _verify, tier, one, advance)
            if tier is self._tiers.object:
                await self._check_list(tier, one, report)
        except DaemonUnavailable:  # the job ends here, to go on later
            raise
        except (IntegrityError, NotFound) as error:
            if not await self._is_live(one):
                return False  # it went meanwhile
            await self._condemn(tier, one, error, report)
            return False
        except ForebayError as error:
            report.num_unread += 1
            report.unread = report.unread or error.message
            return False
        finally:
            report.num_copies += 1
            report.num_bytes += one.num_bytes
            self.num_bytes[tier.name] += one.num_bytes
        return True

    async def _condemn(self, tier: Tier, one: Copy, error: ForebayError, report: Report) -> None:
        report.num_damaged += 1
        self.num_damaged[tier.name] += 1
        if len(report.damaged) < MAX_NAMED:
            report.damaged.append(
                {"blob": one.blob, "tier": tier.name, "file": one.file, "problem": error.message}
            )
        await self._quarantine.condemn(one.blob, one.replica_id, tier.name, one.file, error)

    async def _check_list(self, tier: Tier, one: Copy, report: Report) -> None:
        """Have the object tier's own word on a good copy be right, too."""
        arguments = tier, one.blob, one.file, one.encoding
        async with self._locks.hold(one.blob):  # it is not collected or published meanwhile
            problem = await self._tiers.run_moving(tier, list_problem, *arguments)
            if not problem or not await self._is_live(one):
                return
            logger.error("the extent list of blob %s is written anew: %s", one.blob, problem)
            await self._tiers.run_moving(tier, rewrite_list, *arguments)
        report.num_lists += 1
        await self._catalog.write(
            lambda connection: record(
                connection, f"blob {one.blob}", "repaired", f"{tier.name}: extent list: {problem}"
            )
        )

    async def _is_live(self, one: Copy) -> bool:
        return await self._catalog.read(
            lambda connection: queries.is_live(connection, one.replica_id)
        )


def _verify(tier: Tier, one: Copy, advance: Callable[[int], Any]) -> None:
    with open_plain(tier, one.file, one.encoding, one.blob, read=tier.read_medium) as reader:
        verify_file(reader, one.blob, advance)


def read_report(journal: str) -> Report:
    """What the journal of a scrub's job says; an empty one of a scrub that has not begun."""
    return Report(**json.loads(journal or "{}"))


def scrub_target(tier: str, tiers: Tiers) -> str:
    """The target of a scrub that somebody asks for, of one tier or (empty) of all."""
    names = [one.name for one in tiers.own]
    if tier and tier not in names:
        raise InvalidRequest(f"there is no tier {tier!r} on this node; it has {', '.join(names)}")
    return f"{NOW} {tier}" if tier else NOW
