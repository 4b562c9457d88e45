"""Origins: files that the user keeps elsewhere, and what is known of their bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from forebay_server.catalog.queries_blobs import (
    ORIGIN_TIER,
    batches,
    insert_blob,
    insert_replica,
    remove_replica,
)
from forebay_server.catalog.tables import manifest_origins, origins, replicas
from forebay_wire.manifest import DatasetManifest, OriginRef, canonical_json
from forebay_wire.segments import SegmentTable, file_bytes_for


@dataclass(frozen=True)
class OriginRow:
    """One registered file."""

    origin: str
    ref: OriginRef
    num_bytes: int
    blob: str = ""
    """What its bytes make, as they were when they were first read; empty: not read yet."""
    segments: bytes = b""
    """The segment table of that blob."""

    def table(self) -> SegmentTable:
        """The digests that were kept, proven to be those of the blob."""
        return SegmentTable.decode(self.segments, f"origin {self.ref.url}", self.blob)


def _row(found: Row[Any]) -> OriginRow:
    ref = OriginRef(found.url, json.loads(found.validator))
    return OriginRow(found.origin, ref, found.num_bytes, found.blob or "", found.segments or b"")


def find_origins(connection: Connection, ids: Sequence[str]) -> dict[str, OriginRow]:
    """The known ones of *ids*."""
    found: dict[str, OriginRow] = {}
    for part in batches(list(dict.fromkeys(ids))):
        for row in connection.execute(select(origins).where(origins.c.origin.in_(part))):
            found[row.origin] = _row(row)
    return found


def origins_in_file(connection: Connection, file: str) -> list[OriginRow]:
    """The origins whose blob has the file name *file* in the origin tier: all hold its bytes."""
    statement = select(origins).where(origins.c.blob >= file, origins.c.blob < file + "g")
    return [_row(row) for row in connection.execute(statement.order_by(origins.c.created))]


def add_origin(connection: Connection, ref: OriginRef, num_bytes: int) -> str:
    """Make an origin known, unless it is; its id."""
    origin = ref.identity(num_bytes)
    if connection.scalar(select(origins.c.origin).where(origins.c.origin == origin)) is None:
        validator = canonical_json(ref.validator).decode()
        connection.execute(
            insert(origins).values(
                origin=origin, url=ref.url, num_bytes=num_bytes, validator=validator
            )
        )
    return origin


def name_origins(connection: Connection, manifest_id: str, manifest: DatasetManifest) -> None:
    """Remember which origins a stored manifest names."""
    named = {
        shard.blob: add_origin(connection, shard.origin, shard.num_bytes)
        for shard in manifest.shards
        if shard.origin is not None
    }
    if named:
        rows = [{"manifest": manifest_id, "origin": origin} for origin in named]
        connection.execute(insert(manifest_origins), rows)


def keep_digests(connection: Connection, origin: str, table: SegmentTable) -> str:
    """Remember what the first read of all bytes found; the blob that they make.

    Whoever was first stands: the blob that is returned may be another one.
    """
    connection.execute(
        update(origins)
        .where(origins.c.origin == origin, origins.c.blob.is_(None))
        .values(blob=table.blob_id, segments=table.encoded)
    )
    kept: str | None = connection.scalar(select(origins.c.blob).where(origins.c.origin == origin))
    assert kept is not None, "it was registered"
    place_content(connection, kept, table)
    return kept


def place_content(connection: Connection, blob: str, table: SegmentTable) -> None:
    """Make known that the bytes of *blob* lie at an origin, unless it is."""
    insert_blob(connection, blob, table.total_bytes, table.num_segments)
    known = select(replicas.c.replica).where(
        replicas.c.blob == blob, replicas.c.tier == ORIGIN_TIER
    )
    if connection.scalar(known.limit(1)) is None:
        file_bytes = file_bytes_for(table.total_bytes, table.num_segments)
        insert_replica(
            connection,
            blob,
            table.total_bytes,
            table.num_segments,
            ORIGIN_TIER,
            file_of(blob),
            file_bytes,
        )


def forget_place(connection: Connection, blob: str) -> None:
    """The bytes of *blob* are kept here from now on: its origin is not asked any more."""
    found = connection.scalars(
        select(replicas.c.replica).where(replicas.c.blob == blob, replicas.c.tier == ORIGIN_TIER)
    ).all()
    for replica in found:
        remove_replica(connection, replica)


def file_of(blob: str) -> str:
    """What the file of *blob* is called in the origin tier."""
    return blob[:32]
