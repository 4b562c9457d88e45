"""Which named policy a dataset or run has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, func, insert, or_, select, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import COPY, MIGRATE
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
    num_bytes: int
    created_unix: float
    used_unix: float
    tiers: tuple[str, ...]
    """Of its live copies."""
    pinned_tiers: frozenset[str]
    owners: tuple[str, ...]
    """All that keep it: ``dataset NAME``, ``run NAME``."""
    has_job: bool
    """Something is being moved already."""


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
    return [_placed(connection, row) for row in rows]


def _placed(connection: Connection, row: Row[Any]) -> PlacedBlob:
    blob = row.blob
    tiers = connection.scalars(
        select(replicas.c.tier).where(replicas.c.blob == blob, replicas.c.state == "live")
    )
    live = or_(pins.c.expires.is_(None), pins.c.expires > now())
    pinned = connection.scalars(
        select(pins.c.tier).join(pin_blobs).where(pin_blobs.c.blob == blob, live)
    )
    busy = select(jobs.c.job).where(
        jobs.c.state.in_(("queued", "running")), jobs.c.target.like(f"{blob} %")
    )
    return PlacedBlob(
        blob,
        row.num_bytes,
        row.created,
        row.used,
        tuple(tiers),
        frozenset(pinned),
        tuple(_owners(connection, blob)),
        connection.scalar(busy.limit(1)) is not None,
    )


def _owners(connection: Connection, blob: str) -> list[str]:
    named = select(manifest_blobs.c.manifest).where(manifest_blobs.c.blob == blob)
    of = connection.scalars(
        select(versions.c.dataset).where(versions.c.manifest.in_(named)).distinct()
    )
    by = connection.scalars(
        select(generations.c.run).where(generations.c.manifest.in_(named)).distinct()
    )
    return [*(f"dataset {name}" for name in of), *(f"run {name}" for name in by)]


def count_moves(connection: Connection) -> int:
    """Copies and migrations that have not ended."""
    live = jobs.c.state.in_(("queued", "running"))
    statement = select(func.count()).where(jobs.c.kind.in_((COPY, MIGRATE)), live)
    return connection.scalar(statement) or 0


def store_uses(connection: Connection, used: Mapping[str, float]) -> None:
    """Remember when blobs were opened last, in Unix seconds."""
    for blob, at in used.items():
        connection.execute(
            update(blobs).where(blobs.c.blob == blob, blobs.c.used < at).values(used=at)
        )
