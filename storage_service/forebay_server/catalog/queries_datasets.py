"""Datasets, their versions and selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, insert, select

from forebay_server.catalog.queries_blobs import batches
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import DELETE, FLUSH, cancel_queued, enqueue
from forebay_server.catalog.queries_manifests import commit_manifest
from forebay_server.catalog.queries_origins import name_origins
from forebay_server.catalog.queries_pins import end_pins_of
from forebay_server.catalog.tables import (
    blobs,
    datasets,
    manifest_remote,
    manifests,
    selections,
    statistics,
    versions,
)
from forebay_wire.manifest import (
    KIND_DATASET,
    KIND_SELECTION,
    DatasetManifest,
    SelectionManifest,
)


@dataclass(frozen=True)
class VersionInfo:
    """One immutable version of a dataset."""

    dataset: str
    version: int
    manifest: str
    num_rows: int
    num_bytes: int
    num_shards: int
    created_unix: float
    durability: str
    """``local`` or ``remote``."""


@dataclass(frozen=True)
class SelectionInfo:
    """One selection of a version."""

    name: str
    version: int
    manifest: str
    num_rows: int


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset with everything it has."""

    name: str
    versions: tuple[VersionInfo, ...]
    """Oldest first."""
    selections: tuple[SelectionInfo, ...]


@dataclass(frozen=True)
class DatasetSummary:
    """A dataset in one line; numbers are the newest version's."""

    name: str
    num_versions: int
    num_rows: int
    num_bytes: int
    durability: str


# -------------------------------------------------------------------------------------------- read


def _version_rows() -> Select[Any]:
    return select(versions, manifest_remote.c.at).outerjoin(
        manifest_remote, manifest_remote.c.manifest == versions.c.manifest
    )


def _version(row: Row[Any]) -> VersionInfo:
    return VersionInfo(
        row.dataset,
        row.version,
        row.manifest,
        row.num_rows,
        row.num_bytes,
        row.num_shards,
        row.created,
        "local" if row.at is None else "remote",
    )


def find_version(connection: Connection, dataset: str, version: int) -> VersionInfo | None:
    """One version, 0: the newest; None if there is none."""
    rows = _version_rows().where(versions.c.dataset == dataset)
    if version:
        rows = rows.where(versions.c.version == version)
    newest = rows.order_by(versions.c.version.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    return None if row is None else _version(row)


def version_of_request(connection: Connection, request: str) -> VersionInfo | None:
    """The version that the commit *request* made."""
    row = connection.execute(_version_rows().where(versions.c.request == request)).one_or_none()
    return None if row is None else _version(row)


def find_dataset(connection: Connection, name: str) -> DatasetInfo | None:
    """A dataset with its versions and selections."""
    if connection.scalar(select(datasets.c.name).where(datasets.c.name == name)) is None:
        return None
    ordered = _version_rows().where(versions.c.dataset == name).order_by(versions.c.version)
    found = tuple(_version(row) for row in connection.execute(ordered))
    return DatasetInfo(name, found, find_selections(connection, name))


def find_selections(
    connection: Connection, dataset: str, version: int = 0
) -> tuple[SelectionInfo, ...]:
    """The selections of one version (0: of all), by version and name."""
    rows = select(selections).where(selections.c.dataset == dataset)
    if version:
        rows = rows.where(selections.c.version == version)
    ordered = rows.order_by(selections.c.version, selections.c.name)
    return tuple(
        SelectionInfo(row.name, row.version, row.manifest, row.num_rows)
        for row in connection.execute(ordered)
    )


def find_selection_manifests(
    connection: Connection, dataset: str, version: int
) -> list[tuple[SelectionInfo, bytes]]:
    """:func:`find_selections` of one version, each with its manifest."""
    rows = (
        select(selections, manifests.c.data)
        .join(manifests, manifests.c.manifest == selections.c.manifest)
        .where(selections.c.dataset == dataset, selections.c.version == version)
        .order_by(selections.c.name)
    )
    return [
        (SelectionInfo(row.name, row.version, row.manifest, row.num_rows), row.data)
        for row in connection.execute(rows)
    ]


def list_datasets(connection: Connection, after: str, limit: int) -> list[DatasetSummary]:
    """Datasets whose names come after *after*, by name, at most *limit*."""
    newest = (
        select(
            versions.c.dataset,
            func.count().label("num_versions"),
            func.max(versions.c.version).label("version"),
        )
        .where(versions.c.dataset > after)
        .group_by(versions.c.dataset)
        .order_by(versions.c.dataset)
        .limit(limit)
        .subquery()
    )
    rows = (
        select(versions, newest.c.num_versions, manifest_remote.c.at)
        .join(
            newest,
            (newest.c.dataset == versions.c.dataset) & (newest.c.version == versions.c.version),
        )
        .outerjoin(manifest_remote, manifest_remote.c.manifest == versions.c.manifest)
        .order_by(versions.c.dataset)
    )
    found = [(_version(row), row.num_versions) for row in connection.execute(rows)]
    return [
        DatasetSummary(one.dataset, count, one.num_rows, one.num_bytes, one.durability)
        for one, count in found
    ]


def blob_sizes(connection: Connection, ids: Sequence[str]) -> dict[str, int]:
    """Blob to its length in bytes, for the known ones of *ids*."""
    sizes: dict[str, int] = {}
    for part in batches(list(dict.fromkeys(ids))):
        rows = connection.execute(
            select(blobs.c.blob, blobs.c.num_bytes).where(blobs.c.blob.in_(part))
        )
        sizes.update((row.blob, row.num_bytes) for row in rows)
    return sizes


# ------------------------------------------------------------------------------------------ change


def insert_version(
    connection: Connection,
    manifest: DatasetManifest,
    manifest_id: str,
    data: bytes,
    request: str,
) -> VersionInfo:
    """Make one version visible, with all that it names; its blobs are known.

    Version 1 creates the dataset. Whoever commits queues the flush (:func:`enqueue_flush`).
    """
    name = manifest.dataset
    base = find_version(connection, name, 0)
    sibling = base.manifest if base is not None else None
    commit_manifest(connection, manifest_id, KIND_DATASET, data, manifest.blobs(), sibling)
    name_origins(connection, manifest_id, manifest)
    if base is None:
        connection.execute(insert(datasets).values(name=name))
    connection.execute(
        insert(versions).values(
            dataset=name,
            version=manifest.version,
            manifest=manifest_id,
            num_rows=manifest.num_rows,
            num_bytes=manifest.num_bytes,
            num_shards=len(manifest.shards),
            request=request,
        )
    )
    made = find_version(connection, name, manifest.version)
    assert made is not None, "inserted above"
    return made


def insert_selection(
    connection: Connection, manifest: SelectionManifest, manifest_id: str, data: bytes
) -> None:
    """Make one selection of a known version visible; its blobs are known.

    Whoever defines it queues the flush (:func:`enqueue_flush`).
    """
    sibling = manifest.dataset_manifest
    commit_manifest(connection, manifest_id, KIND_SELECTION, data, manifest.blobs(), sibling)
    connection.execute(
        insert(selections).values(
            dataset=manifest.dataset,
            version=manifest.version,
            name=manifest.name,
            manifest=manifest_id,
            num_rows=manifest.num_rows,
        )
    )


def enqueue_flush(connection: Connection, manifest: str) -> None:
    """Have *manifest* published into the object tier."""
    enqueue(connection, FLUSH, manifest)


def delete_dataset(connection: Connection, name: str) -> list[str]:
    """Forget a dataset; the manifests that it consisted of, empty if there is none.

    From here on nobody sees it. The manifests stay, each with a job that removes it from the object
    tier first and then from here; until then their blobs are kept. Selections go before versions.
    """
    doomed = [
        *connection.scalars(select(statistics.c.manifest).where(statistics.c.dataset == name)),
        *connection.scalars(select(selections.c.manifest).where(selections.c.dataset == name)),
        *connection.scalars(
            select(versions.c.manifest)
            .where(versions.c.dataset == name)
            .order_by(versions.c.version.desc())
        ),
    ]
    connection.execute(delete(statistics).where(statistics.c.dataset == name))
    connection.execute(delete(selections).where(selections.c.dataset == name))
    connection.execute(delete(versions).where(versions.c.dataset == name))
    connection.execute(delete(datasets).where(datasets.c.name == name))
    if doomed:
        record(connection, f"dataset {name}", "deleted", "at once")
        end_pins_of(connection, f"dataset {name}")
    for manifest in doomed:
        cancel_queued(connection, FLUSH, manifest)
        enqueue(connection, DELETE, manifest)
    return doomed
