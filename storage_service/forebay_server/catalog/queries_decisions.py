"""Which version each epoch of a following reader reads: decided once, for all its ranks."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.tables import decisions, selections, versions
from forebay_wire.errors import Conflict, NotFound


@dataclass(frozen=True)
class Question:
    """What *reader* is to read of a dataset in *epoch*."""

    reader: str
    """The same on all ranks, and in all workers."""
    dataset: str
    selection: str
    """Name; empty: the whole version."""
    epoch: int
    base: str
    """Manifest of the version that it read until now."""


@dataclass(frozen=True)
class Choice:
    """Manifests of a version, and of the selection of the asked name (empty: none)."""

    manifest: str
    selection: str


@dataclass(frozen=True)
class Decision:
    """What an epoch reads, or might."""

    version: int
    manifest: str
    selection: str
    newest: int
    """The dataset's newest version by now; one above *version* may lack the selection."""
    is_decided: bool
    """Else it is what the reader may propose."""


def look(connection: Connection, asked: Question) -> Decision:
    """What was decided; else the newest version that has the selection, not decided.

    :class:`NotFound` for a dataset, a selection or a decided version that is not there (any more),
    :class:`Conflict` if the base is of another dataset of that name.
    """
    newest = _newest_number(connection, asked.dataset)
    row = connection.execute(
        select(decisions.c.manifest, decisions.c.selection_manifest).where(
            *_key(asked), decisions.c.expires > now()
        )
    ).one_or_none()
    if row is None:
        return _newest_with_selection(connection, asked, newest)
    version = _version_of(connection, asked.dataset, row.manifest)
    if version is None:
        raise NotFound(
            f"epoch {asked.epoch} of {asked.reader!r} reads a version of dataset {asked.dataset} "
            "that was deleted since: restore it from the trash, or begin anew as another run"
        )
    return Decision(version, row.manifest, row.selection_manifest, newest, is_decided=True)


def needs_renewal(connection: Connection, asked: Question, keep_seconds: float) -> bool:
    """Whether what was decided ends sooner than half of *keep_seconds* from now."""
    expires = connection.scalar(select(decisions.c.expires - now()).where(*_key(asked)))
    return expires is not None and expires < keep_seconds / 2


def renew(connection: Connection, asked: Question, keep_seconds: float) -> None:
    """What was decided is kept for longer, if it is there."""
    connection.execute(
        update(decisions)
        .where(*_key(asked), decisions.c.expires > now())
        .values(expires=now() + keep_seconds)
    )


def decide(
    connection: Connection, asked: Question, proposed: Choice, keep_seconds: float
) -> Decision:
    """What was decided before; else *proposed* is, from now on.

    :class:`NotFound` if that is no version (or no such selection of it) any more.
    """
    connection.execute(delete(decisions).where(decisions.c.expires < now()))
    before = look(connection, asked)
    if before.is_decided:
        return before
    version = _version_of(connection, asked.dataset, proposed.manifest)
    named = connection.scalar(
        select(selections.c.manifest).where(
            selections.c.dataset == asked.dataset,
            selections.c.version == version,
            selections.c.name == asked.selection,
        )
    )
    if version is None or (named or "") != proposed.selection:
        raise NotFound(
            f"what was proposed for epoch {asked.epoch} of {asked.reader!r} is no version of "
            f"dataset {asked.dataset}, or none with that split (any more)"
        )
    connection.execute(
        insert(decisions).values(
            reader=asked.reader,
            dataset=asked.dataset,
            selection=asked.selection,
            epoch=asked.epoch,
            manifest=proposed.manifest,
            selection_manifest=proposed.selection,
            expires=now() + keep_seconds,
        )
    )
    return Decision(version, proposed.manifest, proposed.selection, before.newest, is_decided=True)


def _newest_with_selection(connection: Connection, asked: Question, newest: int) -> Decision:
    rows = select(versions.c.version, versions.c.manifest).where(
        versions.c.dataset == asked.dataset
    )
    if not newest:
        raise NotFound(
            f"there is no dataset {asked.dataset} any more, of which epoch {asked.epoch} was to "
            "follow the newest version: restore it from the trash"
        )
    if _version_of(connection, asked.dataset, asked.base) is None:
        raise Conflict(
            f"dataset {asked.dataset} is another one than that which was read until now: it was "
            "deleted, and made anew under this name; open it again and begin a new run"
        )
    if not asked.selection:
        row = connection.execute(rows.where(versions.c.version == newest)).one()
        return Decision(newest, row.manifest, "", newest, is_decided=False)
    named = connection.execute(
        select(selections.c.version, selections.c.manifest)
        .where(selections.c.dataset == asked.dataset, selections.c.name == asked.selection)
        .order_by(selections.c.version.desc())
        .limit(1)
    ).one_or_none()
    if named is None:
        raise NotFound(
            f"no version of dataset {asked.dataset} has a split {asked.selection!r}: define it "
            "with client.dataset(...).define_splits({...})"
        )
    row = connection.execute(rows.where(versions.c.version == named.version)).one()
    return Decision(row.version, row.manifest, named.manifest, newest, is_decided=False)


def _key(asked: Question) -> tuple[ColumnElement[bool], ...]:
    return (
        decisions.c.reader == asked.reader,
        decisions.c.dataset == asked.dataset,
        decisions.c.selection == asked.selection,
        decisions.c.epoch == asked.epoch,
    )


def _newest_number(connection: Connection, dataset: str) -> int:
    """0: there is no version."""
    newest = select(func.max(versions.c.version)).where(versions.c.dataset == dataset)
    return connection.scalar(newest) or 0


def _version_of(connection: Connection, dataset: str, manifest: str) -> int | None:
    found: int | None = connection.scalar(
        select(func.max(versions.c.version)).where(
            versions.c.dataset == dataset, versions.c.manifest == manifest
        )
    )
    return found
