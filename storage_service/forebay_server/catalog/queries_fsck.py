"""What fsck compares: rows of files, copies, manifests, blobs and pins, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, and_, delete, exists, or_, select

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_blobs import batches
from forebay_server.catalog.queries_jobs import DELETE, FLUSH, LIVE, enqueue
from forebay_server.catalog.tables import (
    blobs,
    extents,
    files,
    jobs,
    manifest_blobs,
    manifest_remote,
    manifests,
    packs,
    pin_blobs,
    pins,
    replicas,
    trash,
    uploads,
)


@dataclass(frozen=True)
class FileRow:
    """A file with the copy that lies in it."""

    file: str
    num_bytes: int
    """Size of the file."""
    blob: str
    replica_id: str
    encoding: str
    state: str
    reason: str
    """Why it is quarantined."""


def page_files(connection: Connection, tier: str, after: str, limit: int) -> list[FileRow]:
    """Files of *tier* behind *after*, in order, at most *limit*, each with every copy that it is
    part of."""
    page = (
        select(files.c.file)
        .where(files.c.tier == tier, files.c.file > after)
        .order_by(files.c.file)
        .limit(limit)
    )
    rows = connection.execute(
        select(
            files.c.file,
            files.c.num_bytes,
            replicas.c.blob,
            replicas.c.replica,
            replicas.c.encoding,
            replicas.c.state,
            replicas.c.reason,
        )
        .join(extents, extents.c.file == files.c.file)
        .join(replicas, replicas.c.replica == extents.c.replica)
        .where(files.c.file.in_(page))
        .distinct()
        .order_by(files.c.file, replicas.c.replica)
    )
    return [FileRow(*row) for row in rows]


def files_without_copy(connection: Connection, limit: int) -> list[tuple[str, str]]:
    """``(tier, file)`` of rows that belong to no copy."""
    lone = ~exists().where(extents.c.file == files.c.file)
    rows = connection.execute(select(files.c.tier, files.c.file).where(lone).limit(limit))
    return [(row.tier, row.file) for row in rows]


def has_replica(connection: Connection, blob: str, tier: str) -> bool:
    """Whether any replica of *blob* in *tier* is known, in whatever state."""
    found = select(replicas.c.replica).where(replicas.c.blob == blob, replicas.c.tier == tier)
    return connection.scalar(found.limit(1)) is not None


@dataclass(frozen=True)
class ManifestRow:
    """A manifest, and the blobs that the catalog keeps for it."""

    manifest: str
    data: bytes
    is_remote: bool
    blobs: frozenset[str]


def page_manifests(connection: Connection, after: str, limit: int) -> list[ManifestRow]:
    """Manifests behind *after*, in order, at most *limit*."""
    remote = exists().where(manifest_remote.c.manifest == manifests.c.manifest)
    rows = connection.execute(
        select(manifests.c.manifest, manifests.c.data, remote.label("is_remote"))
        .where(manifests.c.manifest > after)
        .order_by(manifests.c.manifest)
        .limit(limit)
    ).all()
    found = []
    for row in rows:
        named = select(manifest_blobs.c.blob).where(manifest_blobs.c.manifest == row.manifest)
        kept = frozenset(connection.scalars(named))
        found.append(ManifestRow(row.manifest, row.data, bool(row.is_remote), kept))
    return found


def known_manifests(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Those of *ids* that the catalog has."""
    known: set[str] = set()
    for part in batches(ids):
        statement = select(manifests.c.manifest).where(manifests.c.manifest.in_(part))
        known.update(connection.scalars(statement))
    return known


def trashed_manifests(connection: Connection) -> set[str]:
    """Manifests whose deletion can be undone."""
    return set(connection.scalars(select(trash.c.manifest)))


def lost_blobs(connection: Connection, after: str, limit: int) -> list[str]:
    """Blobs behind *after* that a manifest or a pack needs and that have no copy in service."""
    needed = or_(
        exists().where(manifest_blobs.c.blob == blobs.c.blob),
        exists().where(packs.c.blob == blobs.c.blob),
    )
    live = exists().where(and_(replicas.c.blob == blobs.c.blob, replicas.c.state == "live"))
    statement = select(blobs.c.blob).where(needed, ~live, blobs.c.blob > after)
    return list(connection.scalars(statement.order_by(blobs.c.blob).limit(limit)))


def pins_to_nothing(connection: Connection, limit: int) -> list[tuple[str, str, str]]:
    """``(pin, target, blob)`` of pins that hold a blob which is not known."""
    statement = (
        select(pins.c.pin, pins.c.target, pin_blobs.c.blob)
        .join(pin_blobs, pin_blobs.c.pin == pins.c.pin)
        .where(~exists().where(blobs.c.blob == pin_blobs.c.blob))
        .limit(limit)
    )
    return [(row.pin, row.target, row.blob) for row in connection.execute(statement)]


@dataclass(frozen=True)
class OrphanRow:
    """A blob that nothing names any more."""

    blob: str
    num_bytes: int
    tiers: tuple[str, ...]


def describe_blobs(connection: Connection, ids: Sequence[str]) -> list[OrphanRow]:
    """The known ones of *ids*, with the tiers that have copies."""
    found: list[OrphanRow] = []
    for part in batches(ids):
        places: dict[str, set[str]] = {}
        rows = connection.execute(
            select(replicas.c.blob, replicas.c.tier).where(replicas.c.blob.in_(part))
        )
        for row in rows:
            places.setdefault(row.blob, set()).add(row.tier)
        for row in connection.execute(select(blobs).where(blobs.c.blob.in_(part))):
            tiers = tuple(sorted(places.get(row.blob, ())))
            found.append(OrphanRow(row.blob, row.num_bytes, tiers))
    return found


def doomed_manifests(connection: Connection) -> list[str]:
    """Manifests that are queued to be deleted."""
    return list(
        connection.scalars(
            select(jobs.c.target)
            .where(jobs.c.kind == DELETE, jobs.c.state.in_(LIVE))
            .order_by(jobs.c.target)
        )
    )


def expired_trash(connection: Connection) -> list[tuple[str, str]]:
    """``(manifest, target)`` of what can no longer be restored."""
    rows = connection.execute(
        select(trash.c.manifest, trash.c.target).where(trash.c.expires <= now())
    )
    return [(row.manifest, row.target) for row in rows]


def blobs_only_of(connection: Connection, ids: Sequence[str]) -> list[str]:
    """The blobs that none but the manifests *ids* name."""
    candidates: set[str] = set()
    for part in batches(ids):
        named = select(manifest_blobs.c.blob).where(manifest_blobs.c.manifest.in_(part))
        candidates.update(connection.scalars(named))
    kept: set[str] = set()
    mine = set(ids)
    for part in batches(sorted(candidates)):
        others = select(manifest_blobs).where(manifest_blobs.c.blob.in_(part))
        kept.update(row.blob for row in connection.execute(others) if row.manifest not in mine)
        kept.update(connection.scalars(select(packs.c.blob).where(packs.c.blob.in_(part))))
        kept.update(connection.scalars(select(uploads.c.blob).where(uploads.c.blob.in_(part))))
    return sorted(candidates - kept)


# ------------------------------------------------------------------------------------------ repairs


def drop_pin_blob(connection: Connection, pin: str, blob: str) -> None:
    """Let a pin hold *blob* no longer, and end it with the last one."""
    connection.execute(delete(pin_blobs).where(pin_blobs.c.pin == pin, pin_blobs.c.blob == blob))
    left = exists().where(pin_blobs.c.pin == pins.c.pin)
    connection.execute(delete(pins).where(pins.c.pin == pin, ~left))


def publish_again(connection: Connection, manifest: str) -> None:
    """The object tier does not have *manifest* as it should: queue its publication."""
    connection.execute(delete(manifest_remote).where(manifest_remote.c.manifest == manifest))
    enqueue(connection, FLUSH, manifest)
