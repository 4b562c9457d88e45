"""Blobs, their replicas and files: where bytes lie, and which may go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, insert, or_, select

from forebay_server.catalog.tables import (
    blobs,
    extents,
    files,
    manifest_blobs,
    manifest_origins,
    origins,
    packs,
    replicas,
    uploads,
)
from forebay_wire.ids import new_random_name

ORIGIN_TIER = "origin"
"""Where the replicas lie that are the user's own files, which may change or go."""

IDS_PER_STATEMENT = 500
"""Ids in one IN list: SQLite allows 32766 variables, short lists keep its planner quick."""


@dataclass(frozen=True)
class Extent:
    """Bytes ``[blob_offset, blob_offset + num_bytes)`` of a blob, at *file_offset* of *file*."""

    blob_offset: int
    file: str
    file_offset: int
    num_bytes: int


@dataclass(frozen=True)
class Replica:
    """One copy of a blob in one tier."""

    replica_id: str
    tier: str
    state: str
    extents: tuple[Extent, ...]
    encoding: str = "raw"
    """How its bytes lie there: a key of ``forebay_server.model.encodings.CODES``."""


@dataclass(frozen=True)
class BlobLocation:
    """A blob and all its replicas, quarantined ones too."""

    blob: str
    num_bytes: int
    num_segments: int
    replicas: tuple[Replica, ...]

    def live(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.state == "live")


@dataclass(frozen=True)
class FileRef:
    """A file of a tier."""

    tier: str
    file: str


def batches(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    """*ids* in lists short enough for one statement."""
    for start in range(0, len(ids), IDS_PER_STATEMENT):
        yield ids[start : start + IDS_PER_STATEMENT]


# ------------------------------------------------------------------------------------- where


def locate_blobs(connection: Connection, ids: Sequence[str]) -> dict[str, BlobLocation]:
    """The known ones of *ids* with all their replicas."""
    found: dict[str, BlobLocation] = {}
    for part in batches(list(dict.fromkeys(ids))):
        copies = _replicas_of(connection, part)
        for row in connection.execute(select(blobs).where(blobs.c.blob.in_(part))):
            located = tuple(copies.get(row.blob, ()))
            found[row.blob] = BlobLocation(row.blob, row.num_bytes, row.num_segments, located)
    return found


def _replicas_of(connection: Connection, ids: Sequence[str]) -> dict[str, list[Replica]]:
    pieces: dict[str, list[Extent]] = {}
    joined = extents.join(replicas)
    statement = (
        select(extents)
        .select_from(joined)
        .where(replicas.c.blob.in_(ids))
        .order_by(extents.c.replica, extents.c.seq)
    )
    for row in connection.execute(statement):
        piece = Extent(row.blob_offset, row.file, row.file_offset, row.num_bytes)
        pieces.setdefault(row.replica, []).append(piece)
    copies: dict[str, list[Replica]] = {}
    ordered = select(replicas).where(replicas.c.blob.in_(ids)).order_by(replicas.c.replica)
    for row in connection.execute(ordered):
        found = tuple(pieces.get(row.replica, ()))
        copy = Replica(row.replica, row.tier, row.state, found, row.encoding)
        copies.setdefault(row.blob, []).append(copy)
    return copies


def blobs_in_tier(connection: Connection, tier: str, after: str, limit: int) -> list[str]:
    """Blobs behind *after* with a live replica in *tier*, in order, at most *limit*."""
    return list(
        connection.scalars(
            select(replicas.c.blob)
            .where(replicas.c.tier == tier, replicas.c.state == "live", replicas.c.blob > after)
            .distinct()
            .order_by(replicas.c.blob)
            .limit(limit)
        )
    )


# ------------------------------------------------------------------------------------ change


def insert_blob(connection: Connection, blob: str, num_bytes: int, num_segments: int) -> None:
    """Make *blob* known, unless it is."""
    if connection.scalar(select(blobs.c.blob).where(blobs.c.blob == blob)) is None:
        connection.execute(
            insert(blobs).values(blob=blob, num_bytes=num_bytes, num_segments=num_segments)
        )


def insert_replica(
    connection: Connection,
    blob: str,
    num_bytes: int,
    num_segments: int,
    tier: str,
    file: str,
    file_bytes: int,
    *,
    node: str = "",
    encoding: str = "raw",
) -> str:
    """Record that *file* of *tier* holds all of *blob*, in *encoding*; the new replica's id.

    The file is durable already. A second live replica in the same tier and node is refused
    (Conflict): ask :func:`live_replica` first.
    """
    insert_blob(connection, blob, num_bytes, num_segments)
    return add_replica(
        connection, blob, num_bytes, tier, file, file_bytes, node=node, encoding=encoding
    )


def add_replica(
    connection: Connection,
    blob: str,
    num_bytes: int,
    tier: str,
    file: str,
    file_bytes: int,
    *,
    node: str = "",
    encoding: str = "raw",
) -> str:
    """:func:`insert_replica` of a blob that is known."""
    connection.execute(insert(files).values(file=file, tier=tier, num_bytes=file_bytes))
    replica = new_random_name()
    connection.execute(
        insert(replicas).values(replica=replica, blob=blob, tier=tier, node=node, encoding=encoding)
    )
    connection.execute(
        insert(extents).values(
            replica=replica, seq=0, blob_offset=0, file=file, file_offset=0, num_bytes=num_bytes
        )
    )
    return replica


def live_replica(
    connection: Connection, blob: str, tiers: Sequence[str], *, node: str = ""
) -> str | None:
    """The id of a live replica of *blob* in one of *tiers*, if there is one."""
    return connection.scalar(
        select(replicas.c.replica)
        .where(
            replicas.c.blob == blob,
            replicas.c.tier.in_(tiers),
            replicas.c.node == node,
            replicas.c.state == "live",
        )
        .limit(1)
    )


def known_in_tier(
    connection: Connection, blob: str, tier: str, *, node: str = ""
) -> tuple[bool, str | None]:
    """Whether *blob* is known, and its live replica in *tier*, if it has one there."""
    is_live = and_(
        replicas.c.blob == blobs.c.blob,
        replicas.c.tier == tier,
        replicas.c.node == node,
        replicas.c.state == "live",
    )
    found = connection.execute(
        select(replicas.c.replica)
        .select_from(blobs.outerjoin(replicas, is_live))
        .where(blobs.c.blob == blob)
    ).first()
    return found is not None, None if found is None else found.replica


def remove_replica(connection: Connection, replica_id: str) -> list[FileRef]:
    """Forget a replica; the files that no extent names any more, for the caller to delete after
    the transaction."""
    named = list(
        connection.scalars(select(extents.c.file).where(extents.c.replica == replica_id).distinct())
    )
    connection.execute(delete(extents).where(extents.c.replica == replica_id))
    connection.execute(delete(replicas).where(replicas.c.replica == replica_id))
    return _remove_unnamed_files(connection, named)


def _remove_unnamed_files(connection: Connection, names: Sequence[str]) -> list[FileRef]:
    gone: list[FileRef] = []
    for part in batches(names):
        unnamed = and_(files.c.file.in_(part), ~exists().where(extents.c.file == files.c.file))
        rows = connection.execute(select(files.c.tier, files.c.file).where(unnamed)).all()
        gone.extend(FileRef(row.tier, row.file) for row in rows)
        connection.execute(delete(files).where(unnamed))
    return gone


# ------------------------------------------------------------------------------------ garbage


def is_promised(blob: ColumnElement[str]) -> ColumnElement[bool]:
    """A manifest, a pack or an upload session names *blob*: its bytes have to be kept here."""
    return or_(
        exists().where(manifest_blobs.c.blob == blob),
        exists().where(packs.c.blob == blob),
        exists().where(uploads.c.blob == blob),
    )


def _is_orphan() -> ColumnElement[bool]:
    """No manifest, no pack and no upload session names the blob; nor is it what an origin holds
    that a manifest names."""
    read_from = origins.join(manifest_origins)
    named = select(origins.c.origin).select_from(read_from).where(origins.c.blob == blobs.c.blob)
    return and_(~is_promised(blobs.c.blob), ~named.exists())


def orphan_blobs(
    connection: Connection,
    limit: int,
    candidates: Sequence[str] | None = None,
    *,
    tiers: Sequence[str] | None = None,
) -> list[str]:
    """Blobs that nothing names, at most *limit*; only among *candidates*, and only those with a
    replica in *tiers* or without any, if given."""
    statement = select(blobs.c.blob).where(_is_orphan()).order_by(blobs.c.blob)
    if tiers is not None:
        replica = exists().where(replicas.c.blob == blobs.c.blob)
        statement = statement.where(replica.where(replicas.c.tier.in_(tiers)) | ~replica)
    if candidates is None:
        return list(connection.scalars(statement.limit(limit)))
    found: list[str] = []
    for part in batches(candidates):
        found.extend(connection.scalars(statement.where(blobs.c.blob.in_(part))))
    return found[:limit]


def local_orphan_blobs(
    connection: Connection,
    tiers: Sequence[str],
    limit: int,
    candidates: Sequence[str] | None = None,
) -> list[str]:
    """Orphans without a replica outside of *tiers*, at most *limit*; only among *candidates*, if
    given."""
    elsewhere = exists().where(replicas.c.blob == blobs.c.blob, replicas.c.tier.not_in(tiers))
    statement = select(blobs.c.blob).where(_is_orphan(), ~elsewhere).order_by(blobs.c.blob)
    if candidates is not None:
        statement = statement.where(blobs.c.blob.in_(candidates))
    return list(connection.scalars(statement.limit(limit)))


def remove_orphan(
    connection: Connection, blob: str, tiers: Sequence[str] | None = None
) -> list[FileRef]:
    """Forget *blob* if nothing names it; its files, for the caller to delete afterwards.

    With *tiers*: only its replicas there, and the blob itself once there are no others.
    """
    if not orphan_blobs(connection, 1, [blob]):
        return []
    statement = select(replicas.c.replica).where(replicas.c.blob == blob)
    if tiers is not None:
        statement = statement.where(replicas.c.tier.in_(tiers))
    owned = list(connection.scalars(statement))
    gone = [ref for replica in owned for ref in remove_replica(connection, replica)]
    left = ~exists().where(replicas.c.blob == blobs.c.blob)
    connection.execute(delete(blobs).where(blobs.c.blob == blob, left))
    return gone


# ---------------------------------------------------------------------------- at the daemon's start


def known_files(connection: Connection, tier: str) -> dict[str, int]:
    """Name and size in bytes of every file that a row names in *tier*."""
    rows = connection.execute(select(files.c.file, files.c.num_bytes).where(files.c.tier == tier))
    return {row.file: row.num_bytes for row in rows}


def is_known_file(connection: Connection, file: str) -> bool:
    """Whether a row names *file*."""
    return connection.scalar(select(files.c.file).where(files.c.file == file)) is not None
