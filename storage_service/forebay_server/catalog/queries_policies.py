"""Which named policy a dataset or run has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    case,
    delete,
    exists,
    insert,
    or_,
    select,
    update,
)

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import COPY, LIVE, MIGRATE
from forebay_server.catalog.tables import (
    assigned_policies,
    blobs,
    generations,
    jobs,
    manifest_blobs,
    pin_blobs,
    pins,
    replicas,
    versions,
)
from forebay_wire.segments import file_bytes_for


def policy_of(connection: Connection, owner: str) -> str | None:
    """The policy assigned to *owner* (``dataset NAME``, ``run NAME``), None: the default one."""
    name: str | None = connection.scalar(
        select(assigned_policies.c.policy).where(assigned_policies.c.owner == owner)
    )
    return name


def assign_policy(connection: Connection, owner: str, policy: str) -> None:
    """Give *owner* a policy, empty: the default one."""
    if (policy_of(connection, owner) or "") == policy:
        return
    connection.execute(delete(assigned_policies).where(assigned_policies.c.owner == owner))
    if policy:
        connection.execute(insert(assigned_policies).values(owner=owner, policy=policy))
    record(connection, owner, "policy", policy or "the default one")


def list_assigned(connection: Connection) -> dict[str, str]:
    """Owner to policy, those with the default one left out."""
    rows = connection.execute(select(assigned_policies).order_by(assigned_policies.c.owner))
    return {row.owner: row.policy for row in rows}


@dataclass(frozen=True)
class PlacedBlob:
    """A blob of an owner, as a policy looks at it."""

    blob: str
    file_bytes: int
    """Of a raw copy."""
    created_unix: float
    used_unix: float
    tiers: tuple[str, ...]
    """Of its live copies."""
    pinned_tiers: frozenset[str]
    owners: tuple[str, ...]
    """All that keep it: ``dataset NAME``, ``run NAME``."""
    has_job: bool
    """Something is being moved already."""


@dataclass(frozen=True)
class Claim:
    """Which policies keep copies in a kind of tier, by name: eviction for room leaves them."""

    wanting: frozenset[str]
    known: frozenset[str]
    """All that the configuration has; the default one holds where another is assigned."""
    default: str


def is_claimed(blob: ColumnElement[str], claim: Claim) -> ColumnElement[bool]:
    """Whether a dataset or run that has *blob* has one of the policies of *claim*."""
    policy = case(
        (assigned_policies.c.policy.in_(sorted(claim.known)), assigned_policies.c.policy),
        else_=claim.default,
    )
    wanted = and_(manifest_blobs.c.blob == blob, policy.in_(sorted(claim.wanting)))
    of = manifest_blobs.join(versions, versions.c.manifest == manifest_blobs.c.manifest)
    by = manifest_blobs.join(generations, generations.c.manifest == manifest_blobs.c.manifest)
    of_dataset = assigned_policies.c.owner == "dataset " + versions.c.dataset
    by_run = assigned_policies.c.owner == "run " + generations.c.run
    return or_(
        exists().select_from(of.outerjoin(assigned_policies, of_dataset)).where(wanted),
        exists().select_from(by.outerjoin(assigned_policies, by_run)).where(wanted),
    )


def unassigned_owners(connection: Connection) -> list[str]:
    """The datasets and runs that have no policy of their own, in order."""
    taken = select(assigned_policies.c.owner)
    of = select(versions.c.dataset).where(("dataset " + versions.c.dataset).not_in(taken))
    by = select(generations.c.run).where(
        generations.c.manifest.is_not(None), ("run " + generations.c.run).not_in(taken)
    )
    return [
        *sorted(f"dataset {name}" for name in connection.scalars(of.distinct())),
        *sorted(f"run {name}" for name in connection.scalars(by.distinct())),
    ]


def blobs_of_owner(connection: Connection, owner: str, after: str, limit: int) -> list[PlacedBlob]:
    """The committed blobs of a dataset or run behind *after*, in order, at most *limit*."""
    kind, _, name = owner.partition(" ")
    named = (
        select(versions.c.manifest).where(versions.c.dataset == name)
        if kind == "dataset"
        else select(generations.c.manifest).where(
            generations.c.run == name, generations.c.manifest.is_not(None)
        )
    )
    mine = exists().where(
        manifest_blobs.c.blob == blobs.c.blob, manifest_blobs.c.manifest.in_(named)
    )
    rows = connection.execute(
        select(blobs).where(mine, blobs.c.blob > after).order_by(blobs.c.blob).limit(limit)
    ).all()
    ids = [row.blob for row in rows]
    tiers = _by_blob(
        connection,
        select(replicas.c.blob, replicas.c.tier).where(
            replicas.c.blob.in_(ids), replicas.c.state == "live"
        ),
    )
    live = or_(pins.c.expires.is_(None), pins.c.expires > now())
    pinned = _by_blob(
        connection,
        select(pin_blobs.c.blob, pins.c.tier).join(pins).where(pin_blobs.c.blob.in_(ids), live),
    )
    owners = _owners(connection, ids)
    busy = _moved_blobs(connection)
    return [
        PlacedBlob(
            row.blob,
            file_bytes_for(row.num_bytes, row.num_segments),
            row.created,
            row.used,
            tuple(tiers[row.blob]),
            frozenset(pinned[row.blob]),
            tuple(owners[row.blob]),
            row.blob in busy,
        )
        for row in rows
    ]


def _by_blob(connection: Connection, pairs: Select[Any]) -> defaultdict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row in connection.execute(pairs):
        found[row[0]].append(row[1])
    return found


def _moved_blobs(connection: Connection) -> set[str]:
    """Those that a job is about; its target begins with the blob."""
    targets = connection.scalars(
        select(jobs.c.target).where(jobs.c.state.in_(LIVE), jobs.c.target.like("% %"))
    )
    return {target.partition(" ")[0] for target in targets}


def _owners(connection: Connection, ids: Sequence[str]) -> defaultdict[str, list[str]]:
    mine = manifest_blobs.c.blob.in_(ids)
    of = _by_blob(
        connection,
        select(manifest_blobs.c.blob, versions.c.dataset)
        .join(versions, versions.c.manifest == manifest_blobs.c.manifest)
        .where(mine)
        .distinct(),
    )
    by = _by_blob(
        connection,
        select(manifest_blobs.c.blob, generations.c.run)
        .join(generations, generations.c.manifest == manifest_blobs.c.manifest)
        .where(mine)
        .distinct(),
    )
    found: defaultdict[str, list[str]] = defaultdict(list)
    for blob in ids:
        found[blob] = [f"dataset {name}" for name in of[blob]]
        found[blob] += [f"run {name}" for name in by[blob]]
    return found


@dataclass(frozen=True)
class Move:
    """A copy or migration that has not ended."""

    kind: str
    tier: str
    """Where the bytes go."""
    num_bytes: int


def live_moves(connection: Connection) -> list[Move]:
    """Copies and migrations that have not ended."""
    rows = connection.execute(
        select(jobs.c.kind, jobs.c.target, jobs.c.total_bytes).where(
            jobs.c.kind.in_((COPY, MIGRATE)), jobs.c.state.in_(LIVE)
        )
    )
    return [Move(row.kind, row.target.rpartition(" ")[2], row.total_bytes) for row in rows]


def store_uses(connection: Connection, used: Mapping[str, float]) -> None:
    """Remember when blobs were opened last, in Unix seconds."""
    for blob, at in used.items():
        connection.execute(
            update(blobs).where(blobs.c.blob == blob, blobs.c.used < at).values(used=at)
        )
