"""Taking a copy away: only if another one as durable stays, and nothing wants it where it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sqlalchemy import Connection, exists, literal, or_, select

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_blobs import (
    ORIGIN_TIER,
    FileRef,
    is_promised,
    remove_replica,
)
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_policies import Claim, is_claimed
from forebay_server.catalog.tables import pin_blobs, pins, replicas
from forebay_wire.errors import Conflict

OBJECT_TIER: Final = "object"


def is_pinned(connection: Connection, blob: str, tier: str) -> bool:
    """Whether a pin that has not ended keeps *blob* in *tier*."""
    held = (
        exists()
        .where(pin_blobs.c.blob == blob)
        .where(pin_blobs.c.pin == pins.c.pin)
        .where(pins.c.tier == tier, or_(pins.c.expires.is_(None), pins.c.expires > now()))
    )
    return connection.scalar(select(pins.c.pin).where(held).limit(1)) is not None


def give_up_replica(
    connection: Connection,
    blob: str,
    tier: str,
    event: str,
    reason: str,
    *,
    among: Collection[str],
    claim: Claim | None = None,
    node: str = "",
) -> list[FileRef]:
    """Forget the live replica of *blob* in *tier*, and why; its files, for the caller to delete
    after the transaction. Empty if there is none any more.

    *among*: the tiers that can be reached now. :class:`Conflict` if none of them has another live
    copy of the blob, or a pin, or a policy of *claim*, keeps it there. Call it in a transaction
    that is guarded (``Progress.guard``), and tell the opener to forget the blob.
    """
    replica: str | None = connection.scalar(
        select(replicas.c.replica).where(
            replicas.c.blob == blob,
            replicas.c.tier == tier,
            replicas.c.node == node,
            replicas.c.state == "live",
        )
    )
    if replica is None:
        return []
    if tier == OBJECT_TIER:
        raise Conflict(f"blob {blob}: no other tier is as durable as the object tier")
    other = select(replicas.c.tier).where(
        replicas.c.blob == blob,
        replicas.c.replica != replica,
        replicas.c.state == "live",
        replicas.c.tier.in_(sorted(among)),
        or_(replicas.c.tier != ORIGIN_TIER, ~is_promised(replicas.c.blob)),
    )
    if connection.scalar(other.limit(1)) is None:
        raise Conflict(f"blob {blob} has no other copy than the one in tier {tier}: it stays")
    if is_pinned(connection, blob, tier):
        raise Conflict(f"blob {blob} is pinned in tier {tier}: it stays until it is unpinned")
    if claim is not None and connection.scalar(select(is_claimed(literal(blob), claim))):
        raise Conflict(f"blob {blob} has a policy that keeps it in tier {tier}: it stays")
    record(connection, f"blob {blob}", event, f"{tier}: {reason}")
    return remove_replica(connection, replica)
