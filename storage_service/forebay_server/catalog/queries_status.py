"""What the status page and the metrics count in the catalog."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, case, exists, func, or_, select

from forebay_server.catalog.queries_jobs import Job, is_scheduled, job_from
from forebay_server.catalog.tables import (
    blobs,
    datasets,
    generations,
    jobs,
    packs,
    replicas,
    runs,
    uploads,
)

MAX_JOBS: Final = 200
"""Jobs listed on the status page, those that run first; the counts are of all."""


@dataclass(frozen=True)
class Counts:
    """One snapshot of the catalog in numbers."""

    num_datasets: int
    num_runs: int
    num_uploads: int
    """Upload sessions that have not ended."""
    num_below_local: int
    """Sealed uploads and generations that have not landed: nothing may end the daemon lightly."""
    dirty_bytes: dict[str, int]
    """Tier to bytes of live replicas whose blob has none in the object tier; tier ``ram`` to
    bytes of sealed packs that have not landed."""
    plain_bytes: dict[str, int]
    """Tier to bytes of the data whose live replicas lie there, encoded or not."""
    num_quarantined: dict[str, int]
    """Tier to replicas that were found damaged or missing and serve nobody."""
    num_jobs: dict[tuple[str, str], int]
    """(kind, state) to number of jobs; like the list, without those scheduled for later."""
    jobs: tuple[Job, ...]


def count_all(connection: Connection, object_tier: str) -> Counts:
    """All numbers of the status page; *object_tier* is the name of the most durable tier."""
    dirty, plain = _tier_bytes(connection, object_tier)
    return Counts(
        num_datasets=_count(connection, select(func.count()).select_from(datasets)),
        num_runs=_count(connection, select(func.count()).select_from(runs)),
        num_uploads=_count(connection, select(func.count()).select_from(uploads)),
        num_below_local=count_below_local(connection),
        dirty_bytes=dirty,
        plain_bytes=plain,
        num_quarantined=_count_quarantined(connection),
        num_jobs=_count_jobs(connection),
        jobs=_list_jobs(connection),
    )


def count_below_local(connection: Connection) -> int:
    """Sealed uploads and generations that have not landed."""
    sealed_uploads = select(func.count()).where(uploads.c.state == "sealed")
    sealed_generations = select(func.count()).where(generations.c.state == "sealed")
    return _count(connection, sealed_uploads) + _count(connection, sealed_generations)


def _count(connection: Connection, statement: object) -> int:
    return int(connection.scalar(statement) or 0)  # type: ignore[call-overload]


def _tier_bytes(connection: Connection, object_tier: str) -> tuple[dict[str, int], dict[str, int]]:
    """``(dirty, plain)`` bytes of each tier."""
    remote = replicas.alias("remote")
    is_remote = exists().where(
        remote.c.blob == replicas.c.blob,
        remote.c.tier == object_tier,
        remote.c.state == "live",
    )
    rows = connection.execute(
        select(
            replicas.c.tier,
            case((or_(replicas.c.tier == object_tier, is_remote), 1), else_=0).label("is_clean"),
            # Not of their pieces: several may be for the same bytes.
            func.sum(blobs.c.num_bytes).label("num_bytes"),
        )
        .select_from(replicas.join(blobs))
        .where(replicas.c.state == "live")
        .group_by(replicas.c.tier, "is_clean")
    )
    dirty: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    for row in rows:
        plain[row.tier] += int(row.num_bytes)
        if not row.is_clean:
            dirty[row.tier] += int(row.num_bytes)
    # Those of aborted and failed generations stay as rows only, to tell a late seal.
    in_slots = (
        select(func.sum(packs.c.num_bytes))
        .select_from(packs.join(generations))
        .where(packs.c.state == "sealed", generations.c.state.in_(("open", "sealed")))
    )
    return {**dirty, "ram": _count(connection, in_slots)}, dict(plain)


def _count_quarantined(connection: Connection) -> dict[str, int]:
    rows = connection.execute(
        select(replicas.c.tier, func.count())
        .where(replicas.c.state == "quarantined")
        .group_by(replicas.c.tier)
    )
    return {str(tier): int(number) for tier, number in rows}


def _count_jobs(connection: Connection) -> dict[tuple[str, str], int]:
    rows = connection.execute(
        select(jobs.c.kind, jobs.c.state, func.count())
        .where(~is_scheduled())
        .group_by(jobs.c.kind, jobs.c.state)
    )
    return {(kind, state): int(number) for kind, state, number in rows}


def _list_jobs(connection: Connection) -> tuple[Job, ...]:
    turn = case({"running": 0, "failed": 1}, value=jobs.c.state, else_=2)
    rows = connection.execute(
        select(jobs)
        .where(jobs.c.state != "done", ~is_scheduled())
        .order_by(turn, jobs.c.not_before)
        .limit(MAX_JOBS)
    )
    return tuple(job_from(row) for row in rows)
