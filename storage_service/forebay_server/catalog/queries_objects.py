"""What the object tier has: published manifests and blobs, what is missing, what may leave it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    delete,
    exists,
    insert,
    or_,
    select,
)

from forebay_server.catalog.queries_blobs import (
    FileRef,
    batches,
    insert_blob,
    orphan_blobs,
    remove_replica,
)
from forebay_server.catalog.queries_jobs import DELETE, FLUSH, enqueue
from forebay_server.catalog.queries_sharing import check_references
from forebay_server.catalog.tables import (
    extents,
    files,
    generations,
    jobs,
    manifest_blobs,
    manifest_remote,
    manifests,
    replicas,
    selections,
    statistics,
    trash,
    uploads,
    versions,
)
from forebay_server.model.extents import ObjectBlob
from forebay_wire.ids import new_random_name

OBJECT_TIER: Final = "object"
"""The name of the object tier in the catalog."""
CACHE_TIER: Final = "cache"
"""That of what is there in its place where the store can only cache."""


@dataclass(frozen=True)
class ManifestRecord:
    """A manifest with what it names."""

    manifest: str
    data: bytes
    blobs: tuple[str, ...]
    is_remote: bool


def is_anything_remote(connection: Connection) -> bool:
    """Whether any blob has a live copy in the object tier, or any manifest is there."""
    live = (replicas.c.tier == OBJECT_TIER) & (replicas.c.state == "live")
    copies = select(replicas.c.replica).where(live).limit(1)
    stored = select(manifest_remote.c.manifest).limit(1)
    return any(connection.scalar(found) is not None for found in (copies, stored))


def _is_named() -> ColumnElement[bool]:
    """A version, a selection, a generation or statistics are what this manifest says."""
    return or_(
        exists().where(versions.c.manifest == manifests.c.manifest),
        exists().where(selections.c.manifest == manifests.c.manifest),
        exists().where(generations.c.manifest == manifests.c.manifest),
        exists().where(statistics.c.manifest == manifests.c.manifest),
    )


def _is_trashed() -> ColumnElement[bool]:
    """What it made was deleted, and may still be restored."""
    return exists().where(trash.c.manifest == manifests.c.manifest)


def _is_remote() -> ColumnElement[bool]:
    return exists().where(manifest_remote.c.manifest == manifests.c.manifest)


def wanted_manifest(connection: Connection, manifest: str) -> ManifestRecord | None:
    """The manifest, unless it is unknown or what it made was deleted."""
    row = connection.execute(
        select(manifests.c.data, _is_remote().label("is_remote")).where(
            manifests.c.manifest == manifest, _is_named()
        )
    ).one_or_none()
    if row is None:
        return None
    named = connection.scalars(
        select(manifest_blobs.c.blob)
        .where(manifest_blobs.c.manifest == manifest)
        .order_by(manifest_blobs.c.blob)
    )
    return ManifestRecord(manifest, row.data, tuple(named), row.is_remote)


def mark_remote(connection: Connection, manifest: str) -> None:
    """The manifest and all that it names are in the object tier."""
    known = select(manifest_remote.c.manifest).where(manifest_remote.c.manifest == manifest)
    if connection.scalar(known) is None:
        connection.execute(insert(manifest_remote).values(manifest=manifest))


def enqueue_missing(connection: Connection) -> int:
    """Queue what the manifests as they stand need, and no live job does; how many jobs.

    A flush for each that is in use and not remote (committed while there was no object tier, or
    given up before, or one of its blobs has lost its good copy there since); a deletion for each
    that nothing names.
    """
    connection.execute(
        delete(manifest_remote).where(manifest_remote.c.manifest.in_(_no_longer_remote()))
    )
    to_flush = connection.scalars(
        select(manifests.c.manifest)
        .where(~_is_remote(), _is_named())
        .order_by(manifests.c.created, manifests.c.manifest)
    ).all()
    to_delete = connection.scalars(
        select(manifests.c.manifest).where(~_is_named(), ~_is_trashed())
    ).all()
    wanted = [(FLUSH, name) for name in to_flush] + [(DELETE, name) for name in to_delete]
    live = {
        (row.kind, row.target)
        for row in connection.execute(
            select(jobs.c.kind, jobs.c.target).where(jobs.c.state.in_(("queued", "running")))
        )
    }
    missing = [one for one in wanted if one not in live]
    for kind, manifest in missing:
        enqueue(connection, kind, manifest)
    return len(missing)


def _no_longer_remote() -> Select[Any]:
    """Manifests with a blob whose every copy in the object tier is quarantined."""
    lost = replicas.alias("lost")
    live = replicas.alias("live")
    same = and_(live.c.blob == lost.c.blob, live.c.tier == lost.c.tier, live.c.state == "live")
    return (
        select(manifest_blobs.c.manifest)
        .join(lost, lost.c.blob == manifest_blobs.c.blob)
        .where(lost.c.tier == OBJECT_TIER, lost.c.state == "quarantined", ~exists().where(same))
    )


def flush_again(connection: Connection, blob: str) -> None:
    """The object tier's copy of *blob* is no good: what names it and was remote is not so now, and
    is queued to become so again."""
    named = connection.scalars(
        select(manifest_blobs.c.manifest)
        .join(manifest_remote, manifest_remote.c.manifest == manifest_blobs.c.manifest)
        .join(manifests, manifests.c.manifest == manifest_blobs.c.manifest)
        .where(manifest_blobs.c.blob == blob, _is_named())
    ).all()
    for part in batches(named):
        connection.execute(delete(manifest_remote).where(manifest_remote.c.manifest.in_(part)))
    for manifest in named:
        enqueue(connection, FLUSH, manifest)


def may_be_in_tier(connection: Connection, manifest: str, tier: str) -> bool:
    """Whether *tier* has the manifest or anything that it names, as far as the catalog knows."""
    remote = select(manifest_remote.c.manifest).where(manifest_remote.c.manifest == manifest)
    named = (
        select(replicas.c.replica)
        .join(manifest_blobs, manifest_blobs.c.blob == replicas.c.blob)
        .where(manifest_blobs.c.manifest == manifest, replicas.c.tier == tier)
        .limit(1)
    )
    return connection.scalar(remote) is not None or connection.scalar(named) is not None


def remove_manifest(connection: Connection, manifest: str) -> list[str] | None:
    """Forget a manifest that nothing names; the blobs that it kept. None if something names it."""
    known = connection.execute(
        select(or_(_is_named(), _is_trashed()).label("is_named")).where(
            manifests.c.manifest == manifest
        )
    ).one_or_none()
    if known is not None and known.is_named:
        return None
    named = select(manifest_blobs.c.blob).where(manifest_blobs.c.manifest == manifest)
    kept = list(connection.scalars(named))
    connection.execute(delete(manifest_blobs).where(manifest_blobs.c.manifest == manifest))
    connection.execute(delete(manifest_remote).where(manifest_remote.c.manifest == manifest))
    connection.execute(delete(manifests).where(manifests.c.manifest == manifest))
    return kept


# -------------------------------------------------------------------------------------------- blobs


def insert_object_replica(
    connection: Connection, blob: str, tier: str, found: ObjectBlob, own_file: str | None = None
) -> None:
    """Record where the object tier keeps *blob*.

    With *own_file*: the other files that it lies in belong to others, too;
    :class:`StaleReference` if they are not all in service any more.
    """
    table = found.table
    if own_file is not None:
        shared = [one for one in found.extents if one.file != own_file]
        check_references(connection, tier, "", shared)
    insert_blob(connection, blob, table.total_bytes, table.num_segments)
    replica = new_random_name()
    connection.execute(
        insert(replicas).values(replica=replica, blob=blob, tier=tier, encoding=found.encoding)
    )
    known = set(_known_files(connection, tier, [one.file for one in found.extents]))
    for seq, one in enumerate(found.extents):
        if one.file not in known:
            known.add(one.file)
            connection.execute(
                insert(files).values(file=one.file, tier=tier, num_bytes=one.file_bytes)
            )
        connection.execute(
            insert(extents).values(
                replica=replica,
                seq=seq,
                blob_offset=one.blob_offset,
                file=one.file,
                file_offset=one.file_offset,
                num_bytes=one.num_bytes,
            )
        )


def take_out_of_tier(connection: Connection, blob: str, tier: str) -> list[FileRef] | None:
    """Forget the replicas of an orphan in *tier*: their files, for the caller to delete next.

    None if something names the blob (again): nothing of it may go.
    """
    if not orphan_blobs(connection, 1, [blob]):
        return None
    owned = connection.scalars(
        select(replicas.c.replica).where(replicas.c.blob == blob, replicas.c.tier == tier)
    ).all()
    return [ref for replica in owned for ref in remove_replica(connection, replica)]


def unnamed_files(connection: Connection, tier: str, names: Sequence[str]) -> set[str]:
    """Those of *names* that no row of *tier* and no live upload session names."""
    known = set(_known_files(connection, tier, names))
    for part in batches(names):
        known.update(connection.scalars(select(uploads.c.file).where(uploads.c.file.in_(part))))
    return set(names) - known


def without_object_replica(connection: Connection, tier: str, blob_ids: Sequence[str]) -> set[str]:
    """Those of *blob_ids* that have no replica in *tier* as far as the catalog knows."""
    known: set[str] = set()
    for part in batches(blob_ids):
        known.update(
            connection.scalars(
                select(replicas.c.blob).where(replicas.c.tier == tier, replicas.c.blob.in_(part))
            )
        )
    return set(blob_ids) - known


def _known_files(connection: Connection, tier: str, names: Sequence[str]) -> Iterable[Any]:
    for part in batches(names):
        yield from connection.scalars(
            select(files.c.file).where(files.c.tier == tier, files.c.file.in_(part))
        )
