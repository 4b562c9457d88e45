"""Which copies of the landing tiers could go, as another tier has their blobs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, exists, func, or_, select, true

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_blobs import ORIGIN_TIER, is_promised
from forebay_server.catalog.queries_policies import Claim, is_claimed
from forebay_server.catalog.tables import extents, files, pin_blobs, pins, replicas

PAGE_ROWS = 10_000


@dataclass(frozen=True)
class Spare:
    """A copy that may go."""

    blob: str
    num_bytes: int
    """Of the files that no other copy names: what its end gives back."""


def spare_replicas(
    connection: Connection,
    tier: str,
    among: Collection[str],
    after: str = "",
    *,
    claim: Claim | None = None,
    only: Sequence[str] | None = None,
    node: str = "",
) -> list[Spare]:
    """A page of the live copies in *tier* whose blobs lie in another of the tiers *among*, too, and
    that neither a pin nor a policy of *claim* keeps; in the order of blobs, those after *after*,
    and of *only*, if that is given."""
    other = replicas.alias("other")
    elsewhere = exists().where(
        other.c.blob == replicas.c.blob,
        other.c.replica != replicas.c.replica,
        other.c.state == "live",
        other.c.tier.in_(sorted(set(among) - {tier})),
        or_(other.c.tier != ORIGIN_TIER, ~is_promised(other.c.blob)),
    )
    pinned = exists().where(
        pin_blobs.c.blob == replicas.c.blob,
        pin_blobs.c.pin == pins.c.pin,
        pins.c.tier == tier,
        or_(pins.c.expires.is_(None), pins.c.expires > now()),
    )
    sharing = extents.alias("sharing")
    shared = (
        exists()
        .where(sharing.c.file == files.c.file, sharing.c.replica != replicas.c.replica)
        .correlate(files, replicas)
    )
    own = select(extents.c.file).where(extents.c.replica == replicas.c.replica)
    freed = (
        select(func.coalesce(func.sum(files.c.num_bytes), 0))
        .where(files.c.file.in_(own.correlate(replicas)), ~shared)
        .correlate(replicas)
    )
    statement = (
        select(replicas.c.blob, freed.scalar_subquery().label("num_bytes"))
        .where(
            replicas.c.tier == tier,
            replicas.c.node == node,
            replicas.c.state == "live",
            replicas.c.blob > after,
            elsewhere,
            ~pinned,
            ~is_claimed(replicas.c.blob, claim) if claim is not None else true(),
            replicas.c.blob.in_(only) if only is not None else true(),
        )
        .order_by(replicas.c.blob)
        .limit(PAGE_ROWS)
    )
    return [Spare(row.blob, row.num_bytes) for row in connection.execute(statement)]
