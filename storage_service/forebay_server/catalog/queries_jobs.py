"""Background work as rows: queued once per target, run under a lease, repeated with back-off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    case,
    delete,
    insert,
    or_,
    select,
    update,
)

from forebay_server.catalog.clock import now
from forebay_server.catalog.tables import jobs
from forebay_wire.ids import new_random_name

LIVE = ("queued", "running")

FLUSH = "flush"
"""Publish a manifest, the target, with its blobs into the object tier."""
DELETE = "delete"
"""Remove a manifest, the target, from the object tier and then from the catalog."""
COLLECT = "collect"
"""Reclaim blobs that nothing names any more; with the target
:data:`GARBAGE` also files that no row names."""
GARBAGE = "garbage"
COMPACT = "compact"
"""Make files smaller of which most is not needed any more."""
REPAIR = "repair"
"""Replace quarantined copies by good ones: those of a blob in a tier, with the target
``BLOB TIER``, or with the target ``quarantined`` all."""
SCRUB = "scrub"
"""Read copies and compare them with their digests; see ``move/scrub.py`` for the targets."""
RETURN = "return"
"""Look at the replicas that are out of service, and have the good ones serve again."""
COPY = "copy"
"""Bring a blob into a tier; the target is ``BLOB TIER``."""
MIGRATE = "migrate"
"""Bring a blob into a tier and take it out of another; the target is ``BLOB FROM TO``."""
PLAN = "plan"
"""Have done what policies and grace periods ask for, again and again."""
TOMBSTONE = "tombstone"
"""Have the object tier say of a manifest, the target, whether it lies in the trash."""
PIN = "pin"
"""Bring what a pin, the target, holds into its tier, verified."""
RETAIN = "retain"
"""Delete what the policy of a run does not keep; the target is ``RUN NUMBER``, whatever that is."""
NOTES = "notes"
"""Have the object tier say what people said about a run; the target is ``RUN NUMBER``."""
FINGERPRINT = "fingerprint"
"""Compute the fingerprints of a generation, whose manifest is the target."""
SLOW_KINDS: frozenset[str] = frozenset({COMPACT, COPY, MIGRATE, PIN, REPAIR})
"""Kinds that move many bytes for nobody who waits: they have workers of their own, so that what
makes data safe (:data:`FLUSH`) never stands behind them."""

ENDLESS_KINDS: frozenset[str] = frozenset({SCRUB})
"""Kinds that may take days: they have workers of their own, and end when the daemon does."""

QUIET_KINDS: frozenset[str] = frozenset({FINGERPRINT})
"""Kinds that nothing depends on: one worker does one after the other, and ends when the daemon
does."""


@dataclass(frozen=True)
class Job:
    """One row of the job table."""

    job: str
    kind: str
    target: str
    state: str
    tries: int
    done_bytes: int
    total_bytes: int
    error: str
    priority: int = 0
    journal: str = ""
    """What the kind's handler wrote there: how far a sequence of steps is."""
    created_unix: float = 0.0
    due_unix: float = 0.0
    """Not started before."""


def job_from(row: Row[Any]) -> Job:
    """The job in a row of the table."""
    return Job(
        row.job,
        row.kind,
        row.target,
        row.state,
        row.tries,
        row.done_bytes,
        row.total_bytes,
        row.error,
        row.priority,
        row.journal,
        row.created,
        row.not_before,
    )


def enqueue(
    connection: Connection,
    kind: str,
    target: str,
    *,
    total_bytes: int = 0,
    priority: int = 0,
    journal: str = "",
) -> str:
    """The live job of *kind* for *target*: the one that exists, or a new one.

    One that is scheduled for later is due now; one of a lower priority is raised to *priority*.
    """
    existing: str | None = connection.scalar(
        select(jobs.c.job).where(
            jobs.c.kind == kind, jobs.c.target == target, jobs.c.state.in_(LIVE)
        )
    )
    if existing is not None:
        connection.execute(
            update(jobs).where(jobs.c.job == existing, is_scheduled()).values(not_before=now())
        )
        connection.execute(
            update(jobs)
            .where(jobs.c.job == existing, jobs.c.priority < priority)
            .values(priority=priority)
        )
        return existing
    job = new_random_name()
    connection.execute(
        insert(jobs).values(
            job=job,
            kind=kind,
            target=target,
            total_bytes=total_bytes,
            priority=priority,
            journal=journal,
        )
    )
    return job


def schedule(connection: Connection, kind: str, target: str, delay_seconds: float) -> None:
    """Queue a job of *kind* for *target* that is due in *delay_seconds*, unless one is live."""
    live = select(jobs.c.job).where(
        jobs.c.kind == kind, jobs.c.target == target, jobs.c.state.in_(LIVE)
    )
    if connection.scalar(live) is None:
        connection.execute(
            insert(jobs).values(
                job=new_random_name(), kind=kind, target=target, not_before=now() + delay_seconds
            )
        )


def enqueue_anew(connection: Connection, kind: str, name: str, delay_seconds: float = 0.0) -> None:
    """Queue a job of *kind* for ``NAME NUMBER`` that begins after this transaction, and take what
    it repeats out of the queue: one that runs may have looked before. Due in *delay_seconds*."""
    mine = jobs.c.target.startswith(f"{name} ", autoescape=True)
    connection.execute(delete(jobs).where(jobs.c.kind == kind, mine, jobs.c.state == "queued"))
    values: dict[str, Any] = {"not_before": now() + delay_seconds} if delay_seconds else {}
    target = f"{name} {new_random_name()}"
    connection.execute(
        insert(jobs).values(job=new_random_name(), kind=kind, target=target, **values)
    )


def is_scheduled() -> ColumnElement[bool]:
    """Queued for later, and not because it was tried: nothing waits for such a job."""
    return and_(jobs.c.state == "queued", jobs.c.tries == 0, jobs.c.not_before > now())


def enqueue_collection(connection: Connection) -> None:
    """Queue a search for blobs that this transaction left without a name.

    Each is a job of its own: one that runs already may have looked where these blobs are.
    """
    enqueue(connection, COLLECT, new_random_name())


def _may_start() -> ColumnElement[bool]:
    """Queued and due, or running under a lease that ended."""
    return or_(
        and_(jobs.c.state == "queued", jobs.c.not_before <= now()),
        and_(jobs.c.state == "running", jobs.c.expires < now()),
    )


def claim(
    connection: Connection, owner: str, lease_seconds: float, kinds: Sequence[str]
) -> Job | None:
    """The next job of one of *kinds*, now leased to *owner*; None if none is due.

    *owner* names one worker: another one of the same daemon is somebody else.
    """
    chosen = connection.scalar(
        select(jobs.c.job)
        .where(_may_start(), jobs.c.kind.in_(kinds))
        .order_by(jobs.c.priority.desc(), jobs.c.not_before, jobs.c.created, jobs.c.job)
        .limit(1)
    )
    if chosen is None:
        return None
    taken = connection.execute(
        update(jobs)
        .where(jobs.c.job == chosen, _may_start())
        .values(state="running", owner=owner, expires=now() + lease_seconds, tries=jobs.c.tries + 1)
    )
    return get_job(connection, chosen) if taken.rowcount else None


def _held(job: str, owner: str) -> ColumnElement[bool]:
    """The guard of every change by a worker: it still owns the job and its lease is live."""
    return and_(
        jobs.c.job == job,
        jobs.c.state == "running",
        jobs.c.owner == owner,
        jobs.c.expires >= now(),
    )


def hold(connection: Connection, job: str, owner: str) -> bool:
    """Whether *owner* still holds the job: asked inside a transaction that acts for it.

    The row stays locked until that transaction ends: nobody takes the job over meanwhile.
    """
    held = update(jobs).where(_held(job, owner)).values(expires=jobs.c.expires)
    return connection.execute(held).rowcount > 0


def set_journal(connection: Connection, job: str, owner: str, journal: str) -> bool:
    """Store how far the job is, in the transaction that makes it so; False if not held."""
    changed = update(jobs).where(_held(job, owner)).values(journal=journal)
    return connection.execute(changed).rowcount > 0


def renew(
    connection: Connection,
    job: str,
    owner: str,
    lease_seconds: float,
    done_bytes: int,
    total_bytes: int,
) -> bool:
    """Extend the lease and record progress; False if *owner* no longer holds the job."""
    changed = connection.execute(
        update(jobs)
        .where(_held(job, owner))
        .values(expires=now() + lease_seconds, done_bytes=done_bytes, total_bytes=total_bytes)
    )
    return changed.rowcount > 0


def finish(connection: Connection, job: str, owner: str) -> bool:
    """Mark the job done; False if *owner* no longer holds it."""
    changed = connection.execute(
        update(jobs)
        .where(_held(job, owner))
        .values(state="done", owner=None, expires=None, error="", done_bytes=jobs.c.total_bytes)
    )
    return changed.rowcount > 0


def retry_later(
    connection: Connection, job: str, owner: str, error: str, delay_seconds: float
) -> bool:
    """Queue the job again, not before *delay_seconds* from now; False if not held."""
    changed = connection.execute(
        update(jobs)
        .where(_held(job, owner))
        .values(
            state="queued",
            owner=None,
            expires=None,
            error=error,
            not_before=now() + delay_seconds,
        )
    )
    return changed.rowcount > 0


def retry_now(connection: Connection) -> None:
    """What waits for another try is due now."""
    connection.execute(
        update(jobs).where(jobs.c.state == "queued", jobs.c.tries > 0).values(not_before=now())
    )


def fail(connection: Connection, job: str, owner: str, error: str) -> bool:
    """Give the job up for good; False if not held."""
    changed = connection.execute(
        update(jobs)
        .where(_held(job, owner))
        .values(state="failed", owner=None, expires=None, error=error)
    )
    return changed.rowcount > 0


def requeue_all(connection: Connection) -> int:
    """At the daemon's start: what its previous incarnation was running is queued again."""
    changed = connection.execute(
        update(jobs)
        .where(jobs.c.state == "running")
        .values(state="queued", owner=None, expires=None, not_before=now())
    )
    return changed.rowcount


def cancel_queued(connection: Connection, kind: str, target: str) -> None:
    """Drop the job of *target* unless somebody runs it."""
    connection.execute(
        delete(jobs).where(jobs.c.kind == kind, jobs.c.target == target, jobs.c.state == "queued")
    )


def running(connection: Connection, kind: str, targets: Sequence[str]) -> list[Job]:
    """The jobs of *targets* that somebody runs under a live lease."""
    rows = connection.execute(
        select(jobs).where(
            jobs.c.kind == kind,
            jobs.c.target.in_(targets),
            jobs.c.state == "running",
            jobs.c.expires >= now(),
        )
    )
    return [job_from(row) for row in rows]


def get_job(connection: Connection, job: str) -> Job | None:
    row = connection.execute(select(jobs).where(jobs.c.job == job)).one_or_none()
    return None if row is None else job_from(row)


def job_of(connection: Connection, kind: str, target: str) -> Job | None:
    """The newest job of *kind* for *target*, in whatever state; a scheduled one if there is no
    other."""
    row = connection.execute(
        select(jobs)
        .where(jobs.c.kind == kind, jobs.c.target == target)
        .order_by(case((is_scheduled(), 1), else_=0), jobs.c.created.desc(), jobs.c.job)
        .limit(1)
    ).one_or_none()
    return None if row is None else job_from(row)


def list_jobs(connection: Connection, limit: int) -> list[Job]:
    """Live and failed jobs, newest first; without those that are scheduled."""
    rows = connection.execute(
        select(jobs)
        .where(jobs.c.state != "done", ~is_scheduled())
        .order_by(jobs.c.created.desc(), jobs.c.job)
        .limit(limit)
    )
    return [job_from(row) for row in rows]


def seconds_until_due(connection: Connection, kinds: Sequence[str]) -> float | None:
    """How long until some job may start (0: now); None if no job is live."""
    waiting = select(jobs.c.not_before - now()).where(
        jobs.c.state == "queued", jobs.c.kind.in_(kinds)
    )
    leased = select(jobs.c.expires - now()).where(jobs.c.state == "running", jobs.c.kind.in_(kinds))
    times = [*connection.scalars(waiting), *connection.scalars(leased)]
    return max(0.0, min(times)) if times else None


def are_settled(connection: Connection, kinds: Sequence[str]) -> bool:
    """Whether no job of *kinds* is live, those left out that are only scheduled."""
    live = select(jobs.c.job).where(jobs.c.kind.in_(kinds), jobs.c.state.in_(LIVE), ~is_scheduled())
    return connection.scalar(live.limit(1)) is None


def drop_finished(connection: Connection, older_than_seconds: float) -> int:
    """Forget done jobs created longer ago than this; how many."""
    gone = connection.execute(
        delete(jobs).where(jobs.c.state == "done", jobs.c.created < now() - older_than_seconds)
    )
    return gone.rowcount
