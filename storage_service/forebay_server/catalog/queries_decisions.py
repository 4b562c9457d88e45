"""Which version each epoch of a following reader reads: decided once, for all its ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.tables import decisions, selections, versions
from forebay_wire.errors import Conflict, NotFound


@dataclass(frozen=True)
class Followed:
    """One of the datasets that a reader follows."""

    dataset: str
    selection: str
    """Name; empty: the whole version."""
    base: str
    """Manifest of the version that it read until now."""


@dataclass(frozen=True)
class Question:
    """What *reader* is to read of all its datasets in *epoch*."""

    reader: str
    """The same on all ranks, and in all workers."""
    epoch: int
    datasets: tuple[Followed, ...]


@dataclass(frozen=True)
class Choice:
    """Manifests of a version, and of the selection of the asked name (empty: none)."""

    manifest: str
    selection: str


@dataclass(frozen=True)
class Chosen:
    """What an epoch reads of one dataset, or might."""

    version: int
    manifest: str
    selection: str
    newest: int
    """The dataset's newest version by now; one above *version* may lack the selection."""


@dataclass(frozen=True)
class Decision:
    """What an epoch reads, or might."""

    is_decided: bool
    """Else it is what the reader may propose."""
    datasets: tuple[Chosen, ...]
    """As they were asked for."""


def look(connection: Connection, asked: Question) -> Decision:
    """What was decided; else the newest versions that have the selections, not decided.

    :class:`NotFound` for a dataset, a selection or a decided version that is not there (any more),
    :class:`Conflict` if a base is of another dataset of that name, or other datasets were decided.
    """
    text = connection.scalar(
        select(decisions.c.choices).where(*_key(asked), decisions.c.expires > now())
    )
    if text is None:
        return Decision(False, tuple(_newest(connection, asked, one) for one in asked.datasets))
    choices = json.loads(text)
    if [choice[:2] for choice in choices] != [
        [one.dataset, one.selection] for one in asked.datasets
    ]:
        raise Conflict(
            f"epoch {asked.epoch} of {asked.reader!r} was decided for other datasets or splits: "
            "these are another run"
        )
    return Decision(True, tuple(_decided(connection, asked, choice) for choice in choices))


def _decided(
    connection: Connection,
    asked: Question,
    choice: Sequence[str],
) -> Chosen:
    """What was decided of one dataset."""
    dataset, _, manifest, selection = choice
    version = _version_of(connection, dataset, manifest)
    if version is None:
        raise NotFound(
            f"epoch {asked.epoch} of {asked.reader!r} reads a version of dataset {dataset} "
            "that was deleted since: restore it from the trash, or begin anew as another run"
        )
    return Chosen(version, manifest, selection, _newest_number(connection, dataset))


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
    connection: Connection, asked: Question, proposed: Sequence[Choice], keep_seconds: float
) -> Decision:
    """What was decided before; else all that is *proposed* is, from now on: one for each dataset.

    :class:`NotFound` if that is no version (or no such selection of it) any more.
    """
    connection.execute(delete(decisions).where(decisions.c.expires < now()))
    before = look(connection, asked)
    if before.is_decided:
        return before
    pairs = list(zip(asked.datasets, proposed, strict=True))
    chosen = tuple(_proposed(connection, asked, one, choice) for one, choice in pairs)
    choices = [
        [one.dataset, one.selection, choice.manifest, choice.selection] for one, choice in pairs
    ]
    connection.execute(
        insert(decisions).values(
            reader=asked.reader,
            epoch=asked.epoch,
            choices=json.dumps(choices),
            expires=now() + keep_seconds,
        )
    )
    return Decision(True, chosen)


def _proposed(
    connection: Connection, asked: Question, followed: Followed, proposed: Choice
) -> Chosen:
    """What is proposed of one dataset, which is there."""
    version = _version_of(connection, followed.dataset, proposed.manifest)
    named = connection.scalar(
        select(selections.c.manifest).where(
            selections.c.dataset == followed.dataset,
            selections.c.version == version,
            selections.c.name == followed.selection,
        )
    )
    if version is None or (named or "") != proposed.selection:
        raise NotFound(
            f"what was proposed for epoch {asked.epoch} of {asked.reader!r} is no version of "
            f"dataset {followed.dataset}, or none with that split (any more)"
        )
    newest = _newest_number(connection, followed.dataset)
    return Chosen(version, proposed.manifest, proposed.selection, newest)


def _newest(connection: Connection, asked: Question, followed: Followed) -> Chosen:
    """The newest version of one dataset that has the selection."""
    newest = _newest_number(connection, followed.dataset)
    rows = select(versions.c.version, versions.c.manifest).where(
        versions.c.dataset == followed.dataset
    )
    if not newest:
        raise NotFound(
            f"there is no dataset {followed.dataset} any more, of which epoch {asked.epoch} was to "
            "follow the newest version: restore it from the trash"
        )
    if _version_of(connection, followed.dataset, followed.base) is None:
        raise Conflict(
            f"dataset {followed.dataset} is another one than that which was read until now: it was "
            "deleted, and made anew under this name; open it again and begin a new run"
        )
    if not followed.selection:
        row = connection.execute(rows.where(versions.c.version == newest)).one()
        return Chosen(newest, row.manifest, "", newest)
    named = connection.execute(
        select(selections.c.version, selections.c.manifest)
        .where(selections.c.dataset == followed.dataset, selections.c.name == followed.selection)
        .order_by(selections.c.version.desc())
        .limit(1)
    ).one_or_none()
    if named is None:
        raise NotFound(
            f"no version of dataset {followed.dataset} has a split {followed.selection!r}: define "
            "it with client.dataset(...).define_splits({...})"
        )
    row = connection.execute(rows.where(versions.c.version == named.version)).one()
    return Chosen(row.version, row.manifest, named.manifest, newest)


def _key(asked: Question) -> tuple[ColumnElement[bool], ...]:
    return decisions.c.reader == asked.reader, decisions.c.epoch == asked.epoch


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
