"""What a subject consists of: its manifests and their blobs."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from forebay_server.catalog.queries_datasets import find_version
from forebay_server.catalog.queries_runs import at
from forebay_server.catalog.tables import (
    datasets,
    generations,
    manifest_blobs,
    runs,
    selections,
    versions,
)
from forebay_server.model.subjects import Subject
from forebay_wire.errors import NotFound


@dataclass(frozen=True)
class Resolved:
    """A subject as it stands."""

    target: str
    """Its full name, with the version if it is one."""
    manifests: tuple[str, ...]
    """Of versions or generations."""
    blobs: tuple[str, ...]
    """Those of the selections of these versions as well."""


def resolve(connection: Connection, subject: Subject) -> Resolved:
    """A dataset version (the newest one without a number) or a committed generation."""
    if subject.kind == "dataset":
        found = find_version(connection, subject.name, subject.version)
        if found is None:
            raise _missing(connection, subject)
        target, manifest = f"dataset {subject.name}@{found.version}", found.manifest
    else:
        assert subject.generation is not None, "the caller takes datasets and generations"
        named = connection.scalar(
            select(generations.c.manifest).where(at(subject.generation)).limit(1)
        )
        if named is None:
            raise NotFound(f"there is no committed {subject}: `forebay checkpoint list` names all")
        target, manifest = str(subject), named
    return Resolved(target, (manifest,), _blobs_of(connection, [manifest]))


def resolve_all(connection: Connection, subject: Subject) -> Resolved:
    """Everything of a subject: a dataset without a version is all its versions."""
    if subject.kind == "blob":
        return Resolved(str(subject), (), (subject.name,))
    if subject.kind == "generation" or subject.version:
        return resolve(connection, subject)
    if subject.kind == "dataset":
        known = select(datasets.c.name).where(datasets.c.name == subject.name)
        listed = select(versions.c.manifest).where(versions.c.dataset == subject.name)
    else:
        known = select(runs.c.run).where(runs.c.run == subject.name)
        listed = select(generations.c.manifest).where(
            generations.c.run == subject.name, generations.c.manifest.is_not(None)
        )
    if connection.scalar(known) is None:
        raise _missing(connection, subject)
    manifests = list(connection.scalars(listed))
    return Resolved(str(subject), tuple(manifests), _blobs_of(connection, manifests))


def _blobs_of(connection: Connection, manifests: list[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    chosen = select(selections.c.manifest).join(
        versions,
        (versions.c.dataset == selections.c.dataset) & (versions.c.version == selections.c.version),
    )
    of = [
        one
        for manifest in manifests
        for one in connection.scalars(chosen.where(versions.c.manifest == manifest))
    ]
    for manifest in [*manifests, *of]:
        statement = select(manifest_blobs.c.blob).where(manifest_blobs.c.manifest == manifest)
        found.update(dict.fromkeys(connection.scalars(statement)))
    return tuple(sorted(found))


def _missing(connection: Connection, subject: Subject) -> NotFound:
    if subject.version and (newest := find_version(connection, subject.name, 0)) is not None:
        return NotFound(
            f"dataset {subject.name} has no version {subject.version}: the newest is "
            f"{newest.version}"
        )
    return NotFound(f"there is no {subject.kind} {subject.name}")
