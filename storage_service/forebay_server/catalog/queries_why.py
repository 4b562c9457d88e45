"""Where a subject lies, what keeps it, and which work concerns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import Connection, and_, exists, func, or_, select, tuple_

from forebay_server.catalog.queries_blobs import batches
from forebay_server.catalog.queries_jobs import Job, is_scheduled, job_from
from forebay_server.catalog.queries_objects import OBJECT_TIER
from forebay_server.catalog.tables import (
    blobs,
    extents,
    files,
    generations,
    jobs,
    manifest_blobs,
    packs,
    replicas,
    trash,
    uploads,
    versions,
)

MAX_NAMED: Final = 20


@dataclass(frozen=True)
class Copies:
    """Copies that are alike; the field names are those of the message."""

    tier: str
    encoding: str
    state: str
    reason: str
    num_blobs: int
    num_bytes: int
    created_unix: float
    verified_unix: float
    stored_bytes: int


def count_copies(connection: Connection, ids: Sequence[str]) -> list[Copies]:
    """The copies of *ids* by tier, encoding and state."""
    found: dict[tuple[str, str, str], Copies] = {}
    for part in batches(ids):
        rows = connection.execute(
            select(
                replicas.c.tier,
                replicas.c.encoding,
                replicas.c.state,
                func.max(replicas.c.reason).label("reason"),
                func.count().label("num_blobs"),
                func.sum(blobs.c.num_bytes).label("num_bytes"),
                func.min(replicas.c.created).label("created"),
                func.min(replicas.c.verified).label("verified"),
                func.sum(files.c.num_bytes).label("stored_bytes"),
            )
            .join(blobs, blobs.c.blob == replicas.c.blob)
            .join(extents, and_(extents.c.replica == replicas.c.replica, extents.c.seq == 0))
            .join(files, files.c.file == extents.c.file)
            .where(replicas.c.blob.in_(part))
            .group_by(replicas.c.tier, replicas.c.encoding, replicas.c.state)
        )
        for row in rows:
            one = Copies(
                row.tier,
                row.encoding,
                row.state,
                row.reason,
                row.num_blobs,
                int(row.num_bytes),
                row.created,
                row.verified,
                int(row.stored_bytes),
            )
            key = (one.tier, one.encoding, one.state)
            found[key] = _add(found[key], one) if key in found else one
    return [found[key] for key in sorted(found)]


def _add(one: Copies, other: Copies) -> Copies:
    return replace(
        one,
        reason=max(one.reason, other.reason),
        num_blobs=one.num_blobs + other.num_blobs,
        num_bytes=one.num_bytes + other.num_bytes,
        created_unix=min(one.created_unix, other.created_unix),
        verified_unix=min(one.verified_unix, other.verified_unix),
        stored_bytes=one.stored_bytes + other.stored_bytes,
    )


def count_bytes(connection: Connection, ids: Sequence[str]) -> tuple[int, int, int]:
    """``(known blobs, their bytes, those of them without a live copy in the object tier)``."""
    number = total = dirty = 0
    is_remote = exists().where(
        replicas.c.blob == blobs.c.blob,
        replicas.c.tier == OBJECT_TIER,
        replicas.c.state == "live",
    )
    for part in batches(ids):
        rows = connection.execute(
            select(
                is_remote.label("is_remote"),
                func.count().label("number"),
                func.sum(blobs.c.num_bytes).label("num_bytes"),
            )
            .where(blobs.c.blob.in_(part))
            .group_by("is_remote")
        )
        for row in rows:
            number += row.number
            total += int(row.num_bytes)
            dirty += 0 if row.is_remote else int(row.num_bytes)
    return number, total, dirty


def owners_of(connection: Connection, blob: str) -> list[str]:
    """What keeps *blob*: ``dataset NAME@VERSION``, ``generation …``, ``trash: …``, ``upload …``."""
    named = select(manifest_blobs.c.manifest).where(manifest_blobs.c.blob == blob)
    of_datasets = connection.execute(
        select(versions.c.dataset, versions.c.version)
        .where(versions.c.manifest.in_(named))
        .order_by(versions.c.dataset, versions.c.version)
        .limit(MAX_NAMED)
    )
    found = [f"dataset {row.dataset}@{row.version}" for row in of_datasets]
    in_packs = select(packs.c.run, packs.c.attempt, packs.c.step).where(packs.c.blob == blob)
    key = (generations.c.run, generations.c.attempt, generations.c.step)
    of_runs = connection.execute(
        select(*key)
        .where(or_(generations.c.manifest.in_(named), tuple_(*key).in_(in_packs)))
        .order_by(*key)
        .limit(MAX_NAMED)
    )
    found.extend(f"generation {row.run}@{row.attempt}/{row.step}" for row in of_runs)
    kept = select(trash.c.target).where(trash.c.manifest.in_(named)).distinct().limit(MAX_NAMED)
    found.extend(f"trash: {target}" for target in connection.scalars(kept))
    sessions = select(uploads.c.owner).where(uploads.c.blob == blob).limit(MAX_NAMED)
    found.extend(f"upload of {owner}" for owner in connection.scalars(sessions))
    return found[:MAX_NAMED]


def count_without(connection: Connection, ids: Sequence[str], tiers: Sequence[str]) -> int:
    """How many of the blobs *ids* have no live copy in any of *tiers*."""
    there = exists().where(
        replicas.c.blob == blobs.c.blob, replicas.c.tier.in_(tiers), replicas.c.state == "live"
    )
    counted = select(func.count()).select_from(blobs)
    return sum(
        connection.scalar(counted.where(blobs.c.blob.in_(part), ~there)) or 0
        for part in batches(ids)
    )


def jobs_about(
    connection: Connection, manifests: Sequence[str], ids: Sequence[str], limit: int
) -> list[Job]:
    """Live and failed jobs that concern any of *manifests*, or of the blobs *ids*."""
    found: list[Job] = []
    live = jobs.c.state != "done"
    for part in batches(manifests):
        rows = connection.execute(select(jobs).where(live, jobs.c.target.in_(part)).limit(limit))
        found.extend(job_from(row) for row in rows)
    wanted = set(ids)
    moves = select(jobs).where(live, jobs.c.target.like("% %"))
    for row in connection.execute(moves.order_by(jobs.c.created, jobs.c.job)):
        if len(found) < limit and row.target.partition(" ")[0] in wanted:
            found.append(job_from(row))
    return found[:limit]


def page_jobs(
    connection: Connection, after: tuple[float, str] | None, limit: int, *, everything: bool
) -> list[Job]:
    """Jobs behind *after* (created, job), oldest first; *everything*: also finished ones, and those
    that are due later."""
    statement = select(jobs).order_by(jobs.c.created, jobs.c.job).limit(limit)
    if not everything:
        statement = statement.where(jobs.c.state != "done", ~is_scheduled())
    if after is not None:
        statement = statement.where(tuple_(jobs.c.created, jobs.c.job) > tuple_(*after))
    return [job_from(row) for row in connection.execute(statement)]
