"""Rebuilds rows from manifests that were found in the object tier."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select

from forebay_server.catalog.queries_manifests import insert_manifest
from forebay_server.catalog.queries_objects import insert_object_replica, mark_remote
from forebay_server.catalog.queries_origins import name_origins
from forebay_server.catalog.queries_runs import parent_of
from forebay_server.catalog.tables import (
    attempts,
    blobs,
    datasets,
    generations,
    packs,
    runs,
    selections,
    statistics,
    trash,
    versions,
)
from forebay_server.model.extents import ObjectBlob
from forebay_server.model.lineage import Point
from forebay_server.model.states import GenerationState, PackState
from forebay_wire.errors import Conflict
from forebay_wire.ids import new_random_name
from forebay_wire.manifest import (
    KIND_DATASET,
    KIND_GENERATION,
    KIND_SELECTION,
    KIND_STATISTICS,
    DatasetManifest,
    GenerationManifest,
    SelectionManifest,
    StatisticsManifest,
    parse,
    read_stamp,
)


@dataclass(frozen=True)
class RecoveredCounts:
    """What the rebuilt catalog holds."""

    num_datasets: int
    num_runs: int
    num_blobs: int
    num_bytes: int


def count_recovered(connection: Connection) -> RecoveredCounts:
    """Numbers of a catalog that was just rebuilt."""

    def count(table: Any) -> int:
        return connection.scalar(select(func.count()).select_from(table)) or 0

    num_bytes = connection.scalar(select(func.sum(blobs.c.num_bytes))) or 0
    return RecoveredCounts(count(datasets), count(runs), count(blobs), num_bytes)


def restore_blob(connection: Connection, blob: str, tier: str, found: ObjectBlob) -> None:
    """Make a blob known that lies in the object tier, unless it is."""
    if connection.scalar(select(blobs.c.blob).where(blobs.c.blob == blob)) is None:
        insert_object_replica(connection, blob, tier, found)


def restore_version(
    connection: Connection, identity: str, data: bytes, found: DatasetManifest
) -> None:
    """Make a dataset version visible again; its blobs are known."""
    insert_manifest(connection, identity, KIND_DATASET, data, found.blobs())
    name_origins(connection, identity, found)
    mark_remote(connection, identity)
    _insert_missing(connection, datasets, name=found.dataset)
    connection.execute(
        insert(versions).values(
            dataset=found.dataset,
            version=found.version,
            manifest=identity,
            num_rows=found.num_rows,
            num_bytes=found.num_bytes,
            num_shards=len(found.shards),
            request=new_random_name(),
            created=read_stamp(data).committed_ns / 1e9,
        )
    )


def restore_selection(
    connection: Connection, identity: str, data: bytes, found: SelectionManifest
) -> None:
    """Make a selection visible again; its blobs are known. :class:`Conflict` without the version
    that it selects of."""
    of = connection.scalar(
        select(versions.c.manifest).where(
            versions.c.dataset == found.dataset, versions.c.version == found.version
        )
    )
    if of != found.dataset_manifest:
        raise Conflict(f"version {found.version} of dataset {found.dataset} is not there")
    insert_manifest(connection, identity, KIND_SELECTION, data, found.blobs())
    mark_remote(connection, identity)
    connection.execute(
        insert(selections).values(
            dataset=found.dataset,
            version=found.version,
            name=found.name,
            manifest=identity,
            num_rows=found.num_rows,
            created=read_stamp(data).committed_ns / 1e9,
        )
    )


def restore_statistics(
    connection: Connection, identity: str, data: bytes, found: StatisticsManifest
) -> None:
    """Keep figures again. :class:`Conflict` without the version or selection that they are of."""
    of = connection.scalar(
        select(versions.c.manifest).where(
            versions.c.dataset == found.dataset, versions.c.version == found.version
        )
    )
    chosen = select(selections.c.manifest).where(
        selections.c.manifest == found.selection_manifest,
        selections.c.dataset == found.dataset,
        selections.c.version == found.version,
    )
    if of != found.dataset_manifest:
        raise Conflict(f"version {found.version} of dataset {found.dataset} is not there")
    if found.selection_manifest and connection.scalar(chosen) is None:
        raise Conflict(f"selection {found.selection_manifest} of {found.dataset} is not there")
    insert_manifest(connection, identity, KIND_STATISTICS, data, ())
    mark_remote(connection, identity)
    connection.execute(
        insert(statistics).values(
            manifest=identity,
            dataset=found.dataset,
            version=found.version,
            selection=found.selection_manifest,
            created=read_stamp(data).committed_ns / 1e9,
        )
    )


def restore_trashed(
    connection: Connection,
    identity: str,
    kind: int,
    data: bytes,
    named: Iterable[str],
    tombstone: bytes,
) -> None:
    """Put a manifest into the trash again, as its tombstone says; its blobs are known. ValueError
    or KeyError for a tombstone that says nothing."""
    told = json.loads(tombstone)
    insert_manifest(connection, identity, kind, data, named)
    found = parse(data, f"manifest {identity}", identity)
    if isinstance(found, DatasetManifest):
        name_origins(connection, identity, found)
    mark_remote(connection, identity)
    columns = ("deletion", "target", "record", "expires", "created")
    connection.execute(
        insert(trash).values(manifest=identity, **{name: told[name] for name in columns})
    )


def restore_generation(
    connection: Connection, identity: str, data: bytes, found: GenerationManifest
) -> None:
    """Make a generation visible again, with its run and attempt; its blobs are known."""
    insert_manifest(connection, identity, KIND_GENERATION, data, found.blobs())
    mark_remote(connection, identity)
    _insert_missing(connection, runs, run=found.run)
    _restore_attempt(connection, found)
    key = {"run": found.run, "attempt": found.attempt, "step": found.step}
    connection.execute(
        insert(generations).values(
            **key,
            state=GenerationState.COMMITTED,
            num_ranks=found.num_ranks,
            manifest=identity,
            metrics=json.dumps(found.metrics) if found.metrics else "",
            dataset=json.dumps(found.dataset) if found.dataset is not None else "",
            committed=read_stamp(data).committed_ns / 1e9,
            created=found.created_unix,
        )
    )
    for pack in found.packs:
        connection.execute(
            insert(packs).values(
                **key,
                rank=pack.rank,
                state=PackState.LANDED,
                session=new_random_name(),
                blob=pack.blob,
                num_bytes=pack.num_bytes,
                created=found.created_unix,
            )
        )


def _restore_attempt(connection: Connection, found: GenerationManifest) -> None:
    """The generation's attempt; :class:`Conflict` if another one says that it began elsewhere."""
    parent = Point(*found.parent) if found.parent is not None else None
    known = connection.execute(
        select(attempts).where(attempts.c.run == found.run, attempts.c.attempt == found.attempt)
    ).one_or_none()
    if known is not None:
        if parent_of(known) != parent:
            raise Conflict(
                f"attempt {found.attempt} of run {found.run} stands on {parent_of(known)} "
                f"according to its other generations, here on {parent}"
            )
        return
    connection.execute(
        insert(attempts).values(
            run=found.run,
            attempt=found.attempt,
            parent_attempt=parent.attempt if parent else None,
            parent_step=parent.step if parent else None,
            num_ranks=found.num_ranks,
            request=new_random_name(),
            created=found.created_unix,
        )
    )


def _insert_missing(connection: Connection, table: Any, **key: str) -> None:
    where = [table.c[name] == value for name, value in key.items()]
    if not connection.scalar(select(func.count()).select_from(table).where(*where)):
        connection.execute(insert(table).values(**key))
