"""Which version each epoch of a following reader reads: decided once, for all its ranks."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Row, delete, func, insert, select, update

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
    """Manifest of the version that was read until now."""


@dataclass(frozen=True)
class Decision:
    """A version, and manifests of it and of the selection of the asked name (empty: none)."""

    version: int
    manifest: str
    selection: str
    newest: int
    """The dataset's newest version by now; one above *version* may lack the selection."""


def decided(
    connection: Connection, asked: Question, keep_seconds: float
) -> tuple[Decision, bool] | None:
    """What was decided before, and whether that is kept for long enough yet; None if nothing was.

    :class:`NotFound` if the version that it names was deleted since.
    """
    row = connection.execute(
        select(
            decisions.c.manifest,
            decisions.c.selection_manifest,
            (decisions.c.expires > now() + keep_seconds / 2).label("is_kept"),
        ).where(*_key(asked), decisions.c.expires > now())
    ).one_or_none()
    if row is None:
        return None
    version = _version_of(connection, asked.dataset, row.manifest)
    if version is None:
        raise NotFound(
            f"epoch {asked.epoch} of {asked.reader!r} reads a version of dataset {asked.dataset} "
            "that was deleted since: restore it from the trash, or begin anew as another run"
        )
    newest = _newest_number(connection, asked.dataset)
    made = Decision(version, row.manifest, row.selection_manifest, newest)
    return made, bool(row.is_kept)


def decide(connection: Connection, asked: Question, keep_seconds: float) -> Decision:
    """What was decided before, kept for longer; else the newest version that has the selection,
    from now on.

    :class:`Conflict` if the base is of a dataset of that name that is no more, :class:`NotFound`
    for a dataset or selection that is not there.
    """
    connection.execute(delete(decisions).where(decisions.c.expires < now()))
    before = decided(connection, asked, keep_seconds)
    expires = now() + keep_seconds
    if before is not None:
        connection.execute(update(decisions).where(*_key(asked)).values(expires=expires))
        return before[0]
    found = _newest_with_selection(connection, asked)
    connection.execute(
        insert(decisions).values(
            reader=asked.reader,
            dataset=asked.dataset,
            selection=asked.selection,
            epoch=asked.epoch,
            manifest=found.manifest,
            selection_manifest=found.selection,
            expires=expires,
        )
    )
    return found


def _newest_with_selection(connection: Connection, asked: Question) -> Decision:
    rows = select(versions.c.version, versions.c.manifest).where(
        versions.c.dataset == asked.dataset
    )
    newest = _newest_number(connection, asked.dataset)
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
        return Decision(newest, row.manifest, "", newest)
    named: Row[tuple[int, str]] | None = connection.execute(
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
    return Decision(row.version, row.manifest, named.manifest, newest)


def _key(asked: Question) -> tuple[object, ...]:
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
