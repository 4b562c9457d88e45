"""Replicas out of service, and back in it when they turn out to be good."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, and_, delete, or_, select, update

from forebay_server.catalog.queries_blobs import FileRef, batches, live_replica, remove_replica
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import REPAIR, RETURN, enqueue
from forebay_server.catalog.queries_objects import OBJECT_TIER, flush_again
from forebay_server.catalog.tables import extents, files, jobs, manifest_remote, replicas

EVERYTHING = "quarantined"
"""The target of the jobs that look at all quarantined replicas."""
REPAIR_PRIORITY = 10
"""What has lost a copy comes before what merely moves."""


def quarantine(connection: Connection, replica_id: str, reason: str) -> bool:
    """Take a replica out of service, with its file kept, and queue its repair; whether it was live.

    Where that was a blob's copy in the object tier, what names the blob is no longer remote and is
    queued to become so again. Wake the jobs after the commit.
    """
    changed = connection.execute(
        update(replicas)
        .where(replicas.c.replica == replica_id, replicas.c.state == "live")
        .values(state="quarantined", reason=reason)
    )
    if not changed.rowcount:
        return False
    found = select(replicas.c.blob, replicas.c.tier).where(replicas.c.replica == replica_id)
    row = connection.execute(found).one()
    _suspect_sharers(connection, replica_id)
    if row.tier == OBJECT_TIER:
        flush_again(connection, row.blob)
    record(connection, f"blob {row.blob}", "quarantined", f"{row.tier}: {reason}")
    enqueue_repair(connection, row.blob, row.tier)
    return True


def _suspect_sharers(connection: Connection, replica_id: str) -> None:
    """What shares files with a damaged replica is read first by the next scrub."""
    piece, other = extents.alias("piece"), extents.alias("other")
    sharing = (
        select(other.c.replica)
        .join(piece, piece.c.file == other.c.file)
        .where(piece.c.replica == replica_id, other.c.replica != replica_id)
    )
    connection.execute(update(replicas).where(replicas.c.replica.in_(sharing)).values(verified=0.0))


def enqueue_repair(connection: Connection, blob: str, tier: str) -> None:
    """Queue the replacement of the quarantined copies of *blob* in *tier*.

    Each tier has a job of its own: one that runs already may have looked before this copy was
    found to be bad.
    """
    enqueue(connection, REPAIR, f"{blob} {tier}", priority=REPAIR_PRIORITY)


def is_mended(connection: Connection, blob: str) -> bool | None:
    """Whether a copy of *blob* is in service; None while a repair of it runs, or is to run for the
    first time."""
    live = select(replicas.c.replica).where(replicas.c.blob == blob, replicas.c.state == "live")
    if connection.scalar(live.limit(1)) is not None:
        return True
    due = select(jobs.c.job).where(
        jobs.c.kind == REPAIR,
        or_(jobs.c.target.like(f"{blob} %"), jobs.c.target == EVERYTHING),
        or_(jobs.c.state == "running", and_(jobs.c.state == "queued", jobs.c.error == "")),
    )
    return None if connection.scalar(due.limit(1)) is not None else False


def repair_error(connection: Connection, blob: str) -> str:
    """Why the last repair of *blob* alone was given up; empty if none was."""
    return (
        connection.scalar(
            select(jobs.c.error)
            .where(jobs.c.kind == REPAIR, jobs.c.target.like(f"{blob} %"), jobs.c.state == "failed")
            .order_by(jobs.c.created.desc())
            .limit(1)
        )
        or ""
    )


def mark_missing(connection: Connection, names: Sequence[str], reason: str) -> int:
    """Quarantine what lies in files that are not there; how many replicas that were."""
    changed = 0
    for part in batches(names):
        connection.execute(update(files).where(files.c.file.in_(part)).values(state="missing"))
        hit = select(extents.c.replica).where(extents.c.file.in_(part))
        changed += connection.execute(
            update(replicas)
            .where(replicas.c.replica.in_(hit), replicas.c.state == "live")
            .values(state="quarantined", reason=reason)
        ).rowcount
    return changed


def give_up_objects(connection: Connection) -> int:
    """The object tier is lost: none of its copies serves any more, no manifest is there; how many
    copies that were. ``enqueue_missing`` has what is left stored again."""
    names = connection.scalars(select(files.c.file).where(files.c.tier == OBJECT_TIER)).all()
    connection.execute(delete(manifest_remote))
    return mark_missing(connection, names, "the object tier was replaced")


def return_to_service(connection: Connection, replica_id: str) -> bool:
    """Have a quarantined replica serve again, unless its tier has another one by now; whether it
    does. The caller has just read and checked all of it."""
    row = connection.execute(
        select(replicas.c.blob, replicas.c.tier, replicas.c.node).where(
            replicas.c.replica == replica_id, replicas.c.state == "quarantined"
        )
    ).one_or_none()
    if row is None or live_replica(connection, row.blob, [row.tier], node=row.node) is not None:
        return False
    connection.execute(
        update(replicas).where(replicas.c.replica == replica_id).values(state="live", reason="")
    )
    held = select(extents.c.file).where(extents.c.replica == replica_id)
    connection.execute(update(files).where(files.c.file.in_(held)).values(state="live"))
    return True


def quarantined_blobs(connection: Connection, after: str, limit: int) -> list[str]:
    """Blobs behind *after* with a quarantined replica, in order, at most *limit*."""
    return list(
        connection.scalars(
            select(replicas.c.blob)
            .where(replicas.c.state == "quarantined", replicas.c.blob > after)
            .distinct()
            .order_by(replicas.c.blob)
            .limit(limit)
        )
    )


def remove_replaced(connection: Connection, blob: str, tier: str) -> list[FileRef]:
    """Forget the quarantined replicas of *blob* in *tier* if a live one is there; their files, for
    the caller to delete after the transaction."""
    mine = (replicas.c.blob == blob, replicas.c.tier == tier)
    bad = connection.execute(
        select(replicas.c.replica, replicas.c.node).where(*mine, replicas.c.state == "quarantined")
    ).all()
    gone: list[FileRef] = []
    for row in bad:
        if live_replica(connection, blob, [tier], node=row.node) is not None:
            gone.extend(remove_replica(connection, row.replica))
            record(connection, f"blob {blob}", "repaired", f"{tier}: a good copy took its place")
    return gone


def enqueue_mendable(connection: Connection) -> None:
    """Queue the repair of all quarantined replicas, if there are any: a copy that has what they
    lack may have come after a repair that found none."""
    if quarantined_blobs(connection, "", 1):
        enqueue(connection, REPAIR, EVERYTHING, priority=REPAIR_PRIORITY)


def enqueue_return(connection: Connection) -> None:
    """At the daemon's start: queue a look at all quarantined replicas, and their repair, if there
    are any."""
    if quarantined_blobs(connection, "", 1):
        enqueue(connection, RETURN, EVERYTHING)
        enqueue_mendable(connection)
