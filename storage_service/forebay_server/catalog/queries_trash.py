"""What was deleted and can come back: names are free at once, bytes stay for a grace period.

The manifests stay where they are, with a row here instead of a version, a selection or a
generation; so their blobs are kept. The row holds what brings the others back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, Row, Table, and_, delete, func, insert, select

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import (
    DELETE,
    FLUSH,
    NOTES,
    TOMBSTONE,
    cancel_queued,
    enqueue,
    enqueue_anew,
)
from forebay_server.catalog.queries_pins import end_pins_of
from forebay_server.catalog.queries_runs import at
from forebay_server.catalog.queries_stamps import stamp_of
from forebay_server.catalog.tables import (
    attempts,
    datasets,
    generations,
    manifest_remote,
    packs,
    runs,
    selections,
    statistics,
    tags,
    trash,
    versions,
)
from forebay_server.model.trash_names import named_by
from forebay_wire.errors import AlreadyExists, Conflict, NotFound
from forebay_wire.ids import GenerationId, new_random_name

EXPIRED: Final = "expired"


@dataclass(frozen=True)
class Deletion:
    """One call that puts things into the trash."""

    target: str
    """``dataset NAME``, ``run NAME``, ``generation RUN@ATTEMPT/STEP``."""
    grace_seconds: float
    name: str = field(default_factory=new_random_name)


@dataclass(frozen=True)
class TrashEntry:
    """What one call deleted; the field names are those of the message."""

    deletion: str
    target: str
    num_manifests: int
    deleted_unix: float
    expires_unix: float


# -------------------------------------------------------------------------------------------- into


def trash_dataset(connection: Connection, name: str, grace_seconds: float) -> list[str]:
    """Move a dataset with its versions, selections and statistics into the trash; their manifests,
    empty if there is none."""
    deletion = Deletion(f"dataset {name}", grace_seconds)
    found: dict[str, dict[str, Any]] = {}
    for table in (statistics, selections, versions):
        for row in connection.execute(select(table).where(table.c.dataset == name)):
            found[row.manifest] = {table.name: [_plain(table, row)]}
    _insert(connection, deletion, found)
    connection.execute(delete(statistics).where(statistics.c.dataset == name))
    connection.execute(delete(selections).where(selections.c.dataset == name))
    connection.execute(delete(versions).where(versions.c.dataset == name))
    connection.execute(delete(datasets).where(datasets.c.name == name))
    end_pins_of(connection, f"dataset {name}")
    return list(found)


def trash_generations(
    connection: Connection, target: str, doomed: Sequence[GenerationId], grace_seconds: float
) -> list[str]:
    """Put the committed ones of *doomed* into the trash; their manifests. The caller forgets their
    other rows next."""
    found: dict[str, dict[str, Any]] = {}
    for one in doomed:
        row = connection.execute(
            select(generations).where(at(one), generations.c.manifest.is_not(None))
        ).one_or_none()
        if row is None:
            continue
        packed = connection.execute(select(packs).where(at(one, packs))).all()
        begun = connection.execute(
            select(attempts).where(attempts.c.run == one.run, attempts.c.attempt == one.attempt)
        ).one()
        tagged = and_(tags.c.run == one.run, tags.c.attempt == one.attempt, tags.c.step == one.step)
        found[row.manifest] = {
            runs.name: [
                _plain(runs, of)
                for of in connection.execute(select(runs).where(runs.c.run == one.run))
            ],
            tags.name: [
                _plain(tags, tag) for tag in connection.execute(select(tags).where(tagged))
            ],
            attempts.name: [_plain(attempts, begun)],
            generations.name: [_plain(generations, row)],
            packs.name: [_plain(packs, pack) for pack in packed],
        }
    _insert(connection, Deletion(target, grace_seconds), found)
    return list(found)


def _insert(
    connection: Connection, deletion: Deletion, found: Mapping[str, Mapping[str, Any]]
) -> None:
    for manifest, rows in found.items():
        connection.execute(
            insert(trash).values(
                manifest=manifest,
                deletion=deletion.name,
                target=deletion.target,
                record=json.dumps({"rows": rows, "number": len(found)}),
                expires=now() + deletion.grace_seconds,
            )
        )
        cancel_queued(connection, FLUSH, manifest)
        enqueue(connection, TOMBSTONE, manifest)
    if found:
        record(connection, deletion.target, "trashed", f"deletion {deletion.name}")


def _plain(table: Table, row: Row[Any]) -> dict[str, Any]:
    """A row as JSON: bytes are not among what is kept."""
    values = {column.name: getattr(row, column.name) for column in table.columns}
    return {name: value for name, value in values.items() if not isinstance(value, bytes)}


# --------------------------------------------------------------------------------------------- look


def list_trash(connection: Connection) -> list[TrashEntry]:
    """All deletions, newest first."""
    rows = connection.execute(
        select(
            trash.c.deletion,
            trash.c.target,
            func.count().label("number"),
            func.min(trash.c.created).label("deleted"),
            func.max(trash.c.expires).label("expires"),
        )
        .group_by(trash.c.deletion, trash.c.target)
        .order_by(func.min(trash.c.created).desc(), trash.c.deletion)
    )
    return [
        TrashEntry(row.deletion, row.target, row.number, row.deleted, row.expires) for row in rows
    ]


def find_deletion(connection: Connection, which: str) -> TrashEntry:
    """The deletion that *which* names: its own name, or, of what was deleted, the newest."""
    return _of_one_target(connection, which)[0]


def _of_one_target(connection: Connection, which: str) -> list[TrashEntry]:
    """The deletions that *which* names, newest first. :class:`Conflict` if it may mean more than
    one thing."""
    found = named_by(which, list_trash(connection))
    if not found:
        raise NotFound(f"the trash has no {which!r}: `forebay trash list` names what it has")
    targets = sorted({one.target for one in found})
    if len(targets) > 1:
        raise Conflict(
            f"{which!r} may be any of {', '.join(map(repr, targets))}: write one of these, or a "
            "deletion's own name of `forebay trash list`"
        )
    return found


def tombstone_of(connection: Connection, manifest: str) -> bytes | None:
    """What the object tier is to say of a manifest in the trash; None: it is not there."""
    row = connection.execute(select(trash).where(trash.c.manifest == manifest)).one_or_none()
    if row is None:
        return None
    names = ("deletion", "target", "record", "expires", "created")
    return json.dumps({name: getattr(row, name) for name in names}, sort_keys=True).encode()


# -------------------------------------------------------------------------------------- out of it


def restore(connection: Connection, which: str) -> TrashEntry:
    """Bring back what one deletion took. :class:`AlreadyExists` if its name is taken by now,
    :class:`Conflict` if a part of it was committed anew or its run is gone."""
    entry = find_deletion(connection, which)
    rows = connection.execute(select(trash).where(trash.c.deletion == entry.deletion)).all()
    parts = [json.loads(row.record) for row in rows]
    if len(parts) < parts[0]["number"]:
        raise Conflict(
            f"{entry.target} cannot come back: {parts[0]['number'] - len(parts)} of its parts were "
            "committed again since, by the same content"
        )
    kept: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for table, found in part["rows"].items():
            kept.setdefault(table, []).extend(found)
    kind, _, name = entry.target.partition(" ")
    if kind == "dataset":
        _restore_dataset(connection, name, kept)
    else:
        _restore_generations(connection, entry.target, kept)
    connection.execute(delete(trash).where(trash.c.deletion == entry.deletion))
    for row in rows:
        enqueue(connection, TOMBSTONE, row.manifest)
        remote = select(manifest_remote.c.manifest).where(
            manifest_remote.c.manifest == row.manifest
        )
        if connection.scalar(remote) is None:
            enqueue(connection, FLUSH, row.manifest)
    record(connection, entry.target, "restored", f"deletion {entry.deletion}")
    return entry


def _restore_dataset(
    connection: Connection, name: str, kept: Mapping[str, list[dict[str, Any]]]
) -> None:
    if connection.scalar(select(datasets.c.name).where(datasets.c.name == name)) is not None:
        raise AlreadyExists(
            f"dataset {name} cannot come back: there is another one of that name; delete that "
            "first, and restore by the deletion's own name"
        )
    created = min(row["created"] for row in kept[versions.name])
    connection.execute(insert(datasets).values(name=name, created=created))
    for row in sorted(kept[versions.name], key=lambda one: int(one["version"])):
        connection.execute(insert(versions).values(**row))
    for row in kept.get(selections.name, ()):
        connection.execute(insert(selections).values(**row))
    for row in kept.get(statistics.name, ()):
        connection.execute(insert(statistics).values(**row))


def _restore_generations(
    connection: Connection, target: str, kept: Mapping[str, list[dict[str, Any]]]
) -> None:
    run = kept[generations.name][0]["run"]
    is_known = connection.scalar(select(runs.c.run).where(runs.c.run == run)) is not None
    if target == f"run {run}":
        if is_known:
            raise AlreadyExists(
                f"run {run} cannot come back: there is another one of that name; delete that "
                "first, and restore by the deletion's own name"
            )
        connection.execute(insert(runs).values(**kept.get(runs.name, [{"run": run}])[0]))
    elif not is_known:
        raise Conflict(f"{target} cannot come back: its run is gone; restore the run first")
    elif not _is_same_run(connection, run, kept):
        raise Conflict(f"{target} cannot come back: run {run} is another one by now")
    for row in kept[attempts.name]:
        _restore_attempt(connection, row)
    for row in kept[generations.name]:
        generation = GenerationId(row["run"], row["attempt"], row["step"])
        if connection.scalar(select(generations.c.state).where(at(generation))) is not None:
            raise AlreadyExists(f"generation {generation} cannot come back: it was saved again")
        connection.execute(insert(generations).values(**row))
    for row in kept[packs.name]:
        connection.execute(insert(packs).values(**row))
    _restore_tags(connection, run, kept.get(tags.name, ()))
    enqueue_anew(connection, NOTES, run)


def _restore_tags(connection: Connection, run: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Those that no other generation of the run has by now."""
    for row in rows:
        taken = select(tags.c.tag).where(tags.c.run == run, tags.c.tag == row["tag"])
        if connection.scalar(taken) is None:
            connection.execute(insert(tags).values(**row))


def _is_same_run(
    connection: Connection, run: str, kept: Mapping[str, list[dict[str, Any]]]
) -> bool:
    """Whether the run of that name is the one that the generations were deleted from."""
    of_run = select(generations.c.manifest).where(
        generations.c.run == run, generations.c.manifest.is_not(None)
    )
    sibling = connection.scalar(of_run.limit(1))
    if sibling is not None:
        mine = stamp_of(connection, kept[generations.name][0]["manifest"])
        return stamp_of(connection, sibling).begun_ns == mine.begun_ns
    # Nothing of it is committed: its attempts tell.
    requests = {row["request"] for row in kept[attempts.name]}
    known = set(connection.scalars(select(attempts.c.request).where(attempts.c.run == run)))
    return bool(requests & known)


def _restore_attempt(connection: Connection, row: Mapping[str, Any]) -> None:
    known = select(attempts.c.request).where(
        attempts.c.run == row["run"], attempts.c.attempt == row["attempt"]
    )
    if connection.scalar(known) is None:
        connection.execute(insert(attempts).values(**row))


def forget_trashed(connection: Connection, manifest: str) -> bool:
    """Take a manifest out of the trash for good because the very same is committed again; whether
    it was there."""
    gone = connection.execute(delete(trash).where(trash.c.manifest == manifest)).rowcount
    if gone:
        enqueue(connection, TOMBSTONE, manifest)
    return bool(gone)


def empty_trash(connection: Connection, which: str = "", reason: str = "emptied") -> int:
    """Let go what one deletion took, or with the reason ``expired`` what is past its time, or
    everything; how many deletions."""
    doomed = select(trash)
    if which:
        named = [one.deletion for one in _of_one_target(connection, which)]
        doomed = doomed.where(trash.c.deletion.in_(named))
    elif reason == EXPIRED:
        doomed = doomed.where(trash.c.expires <= now())
    rows = connection.execute(doomed).all()
    for row in rows:
        connection.execute(delete(trash).where(trash.c.manifest == row.manifest))
        enqueue(connection, DELETE, row.manifest)
    gone = {(row.deletion, row.target) for row in rows}
    for deletion, target in sorted(gone):
        record(connection, target, "deleted", f"trash {reason}: deletion {deletion}")
    return len(gone)


def seconds_until_expiry(connection: Connection) -> float | None:
    """How long until something in the trash is past its time; None: it is empty."""
    left: float | None = connection.scalar(select(func.min(trash.c.expires) - now()))
    return left
