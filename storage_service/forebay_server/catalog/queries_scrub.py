"""Which copies were read in full how long ago, and what a scrub has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, func, select, tuple_, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_blobs import batches
from forebay_server.catalog.queries_jobs import SCRUB, cancel_queued, schedule
from forebay_server.catalog.tables import blobs, extents, jobs, replicas

BACKGROUND = "background"
"""The target of the scrub that comes again and again."""


@dataclass(frozen=True)
class Copy:
    """A live replica, to be read in full."""

    replica_id: str
    blob: str
    file: str
    encoding: str
    num_bytes: int
    """Of the blob."""
    verified_unix: float


def database_now(connection: Connection) -> float:
    """Unix seconds by the database's clock."""
    return float(connection.scalar(select(now())) or 0.0)


def _is_due(tier: str, before_unix: float) -> ColumnElement[bool]:
    return and_(
        replicas.c.tier == tier,
        replicas.c.state == "live",
        replicas.c.verified < before_unix,
        replicas.c.created <= before_unix,
    )


def due_copies(
    connection: Connection,
    tier: str,
    before_unix: float,
    after: tuple[float, str],
    limit: int,
) -> list[Copy]:
    """Live replicas in *tier* that were made, and not read in full, before *before_unix*: the
    longest unread first, at most *limit*, behind *after* (``verified_unix, replica_id``)."""
    rows = connection.execute(
        select(replicas, extents.c.file, blobs.c.num_bytes)
        .join(extents, and_(extents.c.replica == replicas.c.replica, extents.c.seq == 0))
        .join(blobs, blobs.c.blob == replicas.c.blob)
        .where(
            _is_due(tier, before_unix),
            tuple_(replicas.c.verified, replicas.c.replica) > tuple_(*after),
        )
        .order_by(replicas.c.verified, replicas.c.replica)
        .limit(limit)
    )
    return [
        Copy(row.replica, row.blob, row.file, row.encoding, row.num_bytes, row.verified)
        for row in rows
    ]


def due_bytes(connection: Connection, tiers: Sequence[str], before_unix: float) -> int:
    """Plain bytes of all :func:`due_copies` of *tiers*."""
    total = 0
    for tier in tiers:
        found = (
            select(func.sum(blobs.c.num_bytes))
            .join(replicas, replicas.c.blob == blobs.c.blob)
            .where(_is_due(tier, before_unix))
        )
        total += int(connection.scalar(found) or 0)
    return total


def mark_verified(connection: Connection, replica_ids: Sequence[str]) -> None:
    """Every byte of these replicas was read, just now, and is good."""
    for part in batches(replica_ids):
        connection.execute(
            update(replicas).where(replicas.c.replica.in_(part)).values(verified=now())
        )


def is_live(connection: Connection, replica_id: str) -> bool:
    """Whether the replica is there and in service."""
    found = select(replicas.c.replica).where(
        replicas.c.replica == replica_id, replicas.c.state == "live"
    )
    return connection.scalar(found) is not None


def plan_scrub(connection: Connection, interval_seconds: float) -> None:
    """At the daemon's start: the next background scrub comes after at most that long; 0: none."""
    if not interval_seconds:
        cancel_queued(connection, SCRUB, BACKGROUND)
        return
    schedule(connection, SCRUB, BACKGROUND, interval_seconds)
    waiting = (
        jobs.c.kind == SCRUB,
        jobs.c.target == BACKGROUND,
        jobs.c.state == "queued",
        jobs.c.not_before > now() + interval_seconds,
    )
    connection.execute(update(jobs).where(*waiting).values(not_before=now() + interval_seconds))


def repair_outcome(connection: Connection, blob: str, tier: str) -> str:
    """What became of a damaged copy: ``repaired``, ``gone`` (with its blob) or ``quarantined``."""
    states = set(
        connection.scalars(
            select(replicas.c.state).where(replicas.c.blob == blob, replicas.c.tier == tier)
        )
    )
    if "quarantined" in states:
        return "quarantined"
    return "repaired" if states else "gone"
