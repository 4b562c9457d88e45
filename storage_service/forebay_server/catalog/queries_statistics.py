"""Statistics that are kept with versions and selections."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from forebay_server.catalog.queries_jobs import DELETE, FLUSH, cancel_queued, enqueue
from forebay_server.catalog.queries_manifests import commit_manifest
from forebay_server.catalog.queries_settings import next_moment
from forebay_server.catalog.queries_stamps import stamp_of
from forebay_server.catalog.tables import manifests, selections, statistics
from forebay_wire.manifest import KIND_STATISTICS, Stamp, StatisticsManifest, put_stamp


def find_statistics(
    connection: Connection, dataset: str, version: int, selection: str
) -> list[tuple[str, bytes]]:
    """``(manifest id, bytes)`` of what is kept, oldest first."""
    rows = connection.execute(
        select(statistics.c.manifest, manifests.c.data)
        .join(manifests, manifests.c.manifest == statistics.c.manifest)
        .where(
            statistics.c.dataset == dataset,
            statistics.c.version == version,
            statistics.c.selection == selection,
        )
        .order_by(statistics.c.created, statistics.c.manifest)
    )
    return [(row.manifest, row.data) for row in rows]


def has_selection(connection: Connection, dataset: str, version: int, manifest: str) -> bool:
    """Whether that selection is one of the version."""
    found = select(selections.c.name).where(
        selections.c.manifest == manifest,
        selections.c.dataset == dataset,
        selections.c.version == version,
    )
    return connection.scalar(found) is not None


def insert_statistics(
    connection: Connection, found: StatisticsManifest, manifest: str, data: bytes
) -> None:
    """Keep a record of a known version, and queue its publication."""
    sibling = found.dataset_manifest
    commit_manifest(connection, manifest, KIND_STATISTICS, data, (), sibling)
    moment = stamp_of(connection, manifest).committed_ns
    connection.execute(
        insert(statistics).values(
            manifest=manifest,
            dataset=found.dataset,
            version=found.version,
            selection=found.selection_manifest,
            created=moment / 1e9,
        )
    )
    enqueue(connection, FLUSH, manifest)


def rewrite_statistics(
    connection: Connection, found: StatisticsManifest, manifest: str, data: bytes
) -> None:
    """Put a kept record's bytes right, and make it the newest."""
    stamp = Stamp(stamp_of(connection, found.dataset_manifest).begun_ns, next_moment(connection))
    connection.execute(
        update(manifests)
        .where(manifests.c.manifest == manifest)
        .values(data=put_stamp(data, stamp))
    )
    connection.execute(
        update(statistics)
        .where(statistics.c.manifest == manifest)
        .values(created=stamp.committed_ns / 1e9)
    )


def drop_statistics(connection: Connection, manifest: str) -> None:
    """Forget a record, and queue its removal from the object tier."""
    connection.execute(delete(statistics).where(statistics.c.manifest == manifest))
    cancel_queued(connection, FLUSH, manifest)
    enqueue(connection, DELETE, manifest)
