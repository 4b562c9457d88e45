"""What people say about a run's generations: what is kept, tags, pins and notes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, delete, insert, or_, select, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import NOTES, RETAIN, enqueue_anew
from forebay_server.catalog.queries_runs import at, fork_of
from forebay_server.catalog.queries_stamps import stamp_of
from forebay_server.catalog.tables import attempts, generations, runs, tags
from forebay_server.model.states import GenerationState
from forebay_wire.errors import NotFound
from forebay_wire.ids import GenerationId
from forebay_wire.keep import Keep

MAX_TAGS: Final = 1000
"""Of one run."""


@dataclass(frozen=True)
class TagInfo:
    """A tag of a run and what it is on; the field names are those of the message."""

    tag: str
    attempt: int
    step: int


def queue_notes(connection: Connection, run: str) -> None:
    """Have the object tier say anew what people said about *run*."""
    enqueue_anew(connection, NOTES, run)


def queue_retention(connection: Connection, run: str) -> None:
    """Have what is kept of *run* decided anew, if it has a policy."""
    if read_keep(connection, run):
        enqueue_anew(connection, RETAIN, run)


def queue_all_retention(connection: Connection) -> int:
    """At the daemon's start: :func:`queue_retention` of all runs; how many have a policy."""
    names = list(connection.scalars(select(runs.c.run).where(runs.c.keep != "")))
    for run in names:
        enqueue_anew(connection, RETAIN, run)
    return len(names)


# -------------------------------------------------------------------------------------------- runs


def check_run(connection: Connection, run: str) -> None:
    """:class:`NotFound` unless there is such a run."""
    if connection.scalar(select(runs.c.run).where(runs.c.run == run)) is None:
        raise NotFound(f"there is no run {run}: nothing has been saved under that name")


def read_keep(connection: Connection, run: str) -> str:
    """The JSON of what is kept of *run*; empty: everything, or there is no such run."""
    return connection.scalar(select(runs.c.keep).where(runs.c.run == run)) or ""


def set_keep(connection: Connection, run: str, keep_json: str) -> None:
    """Replace what is kept of *run*, and have it applied. :class:`NotFound`, InvalidRequest."""
    check_run(connection, run)
    keep = Keep.from_json(keep_json)
    text = keep.to_json() if keep is not None else ""
    if text != read_keep(connection, run):
        connection.execute(update(runs).where(runs.c.run == run).values(keep=text))
        record(connection, f"run {run}", "policy", str(keep) if keep else "everything is kept")
        queue_notes(connection, run)
    queue_retention(connection, run)


# -------------------------------------------------------------------------------------------- tags


def list_tags(connection: Connection, run: str) -> list[TagInfo]:
    """The tags of a run, by name."""
    rows = connection.execute(select(tags).where(tags.c.run == run).order_by(tags.c.tag))
    return [TagInfo(row.tag, row.attempt, row.step) for row in rows]


def find_tag(connection: Connection, run: str, tag: str) -> TagInfo | None:
    """What a tag of *run* is on."""
    row = connection.execute(select(tags).where(tags.c.run == run, tags.c.tag == tag)).one_or_none()
    return None if row is None else TagInfo(row.tag, row.attempt, row.step)


def set_tag(connection: Connection, generation: GenerationId, tag: str) -> None:
    """Give a committed generation a tag, taking it from another one of the run."""
    _check_committed(connection, generation)
    known = find_tag(connection, generation.run, tag)
    if known == TagInfo(tag, generation.attempt, generation.step):
        return
    connection.execute(delete(tags).where(tags.c.run == generation.run, tags.c.tag == tag))
    connection.execute(
        insert(tags).values(
            run=generation.run, tag=tag, attempt=generation.attempt, step=generation.step
        )
    )
    record(connection, f"generation {generation}", "tagged", tag)
    queue_notes(connection, generation.run)
    if known is not None:
        queue_retention(connection, generation.run)


def remove_tag(connection: Connection, run: str, tag: str) -> bool:
    """Take a tag away from whatever has it; whether anything had."""
    known = find_tag(connection, run, tag)
    if known is None:
        check_run(connection, run)
        return False
    connection.execute(delete(tags).where(tags.c.run == run, tags.c.tag == tag))
    record(connection, f"generation {run}@{known.attempt}/{known.step}", "untagged", tag)
    queue_notes(connection, run)
    queue_retention(connection, run)
    return True


def apply_wanted_tags(connection: Connection, generation: GenerationId) -> None:
    """In the transaction that commits it: give a generation the tags that its save named."""
    row = connection.execute(select(generations).where(at(generation))).one()
    for tag in json.loads(row.wanted_tags) if row.wanted_tags else ():
        set_tag(connection, generation, tag)
    if row.note:
        queue_notes(connection, generation.run)


# -------------------------------------------------------------------------------- pins and notes


def set_pin(
    connection: Connection, generation: GenerationId, reason: str, hold_seconds: float
) -> None:
    """Keep a committed generation from retention; *hold_seconds* 0: until it is unpinned."""
    _check_committed(connection, generation)
    connection.execute(
        update(generations)
        .where(at(generation))
        .values(pinned=reason, pin_expires=now() + hold_seconds if hold_seconds else None)
    )
    record(connection, f"generation {generation}", "kept", reason or "pinned")
    queue_notes(connection, generation.run)
    queue_retention(connection, generation.run)  # looks again when the pin ends


def remove_pin(connection: Connection, generation: GenerationId) -> None:
    """Let retention decide about a generation again. Idempotent."""
    _check_committed(connection, generation)
    connection.execute(
        update(generations).where(at(generation)).values(pinned=None, pin_expires=None)
    )
    record(connection, f"generation {generation}", "no longer kept", "unpinned")
    queue_notes(connection, generation.run)
    queue_retention(connection, generation.run)


def is_pinned() -> ColumnElement[bool]:
    """A pin of the row of ``generations`` has not ended."""
    return generations.c.pinned.is_not(None) & or_(
        generations.c.pin_expires.is_(None), generations.c.pin_expires > now()
    )


def set_note(connection: Connection, generation: GenerationId, note_json: str) -> None:
    """Replace the free metadata of a committed generation."""
    _check_committed(connection, generation)
    connection.execute(update(generations).where(at(generation)).values(note=note_json))
    queue_notes(connection, generation.run)


def _check_committed(connection: Connection, generation: GenerationId) -> None:
    state = connection.scalar(select(generations.c.state).where(at(generation)))
    if state != GenerationState.COMMITTED:
        raise NotFound(
            f"there is no committed generation {generation}: `forebay checkpoint list "
            f"{generation.run}` names what there is"
        )


# ------------------------------------------------------------------------- in the object tier


def begun_of_run(connection: Connection, run: str) -> int | None:
    """When *run* began, as the stamps of its manifests say; None if it has none."""
    manifest = connection.scalar(
        select(generations.c.manifest)
        .where(generations.c.run == run, generations.c.manifest.is_not(None))
        .limit(1)
    )
    return None if manifest is None else stamp_of(connection, manifest).begun_ns


def notes_of(connection: Connection, run: str) -> dict[str, Any] | None:
    """What people said about *run*, and which runs its attempts forked: what a recovery cannot know
    from its manifests. None if there is nothing, or no such run."""
    forks = {
        str(row.attempt): [fork.run, fork.attempt, fork.step]
        for row in connection.execute(select(attempts).where(attempts.c.run == run))
        if (fork := fork_of(row)) is not None
    }
    named: dict[str, dict[str, Any]] = {}
    said = or_(generations.c.note != "", generations.c.pinned.is_not(None))
    committed = generations.c.state == GenerationState.COMMITTED
    rows = connection.execute(select(generations).where(generations.c.run == run, said, committed))
    for row in rows:
        kept = named.setdefault(f"{row.attempt}/{row.step}", {})
        if row.note:
            kept["note"] = json.loads(row.note)
        if row.pinned is not None:
            kept["pinned"], kept["pin_expires"] = row.pinned, row.pin_expires
    for tag in list_tags(connection, run):
        kept = named.setdefault(f"{tag.attempt}/{tag.step}", {})
        kept.setdefault("tags", []).append(tag.tag)
    keep = read_keep(connection, run)
    if not (forks or named or keep):
        return None
    return {"run": run, "keep": keep, "forks": forks, "generations": named}


def restore_notes(connection: Connection, said: Mapping[str, Any]) -> None:
    """Say again about a recovered run what its notes say; of generations that are not there
    nothing."""
    run = said["run"]
    connection.execute(update(runs).where(runs.c.run == run).values(keep=said["keep"]))
    for attempt, (parent_run, parent_attempt, parent_step) in said["forks"].items():
        connection.execute(
            update(attempts)
            .where(attempts.c.run == run, attempts.c.attempt == int(attempt))
            .values(parent_run=parent_run, parent_attempt=parent_attempt, parent_step=parent_step)
        )
    for point, kept in said["generations"].items():
        attempt, _, step = point.partition("/")
        generation = GenerationId(run, int(attempt), int(step))
        if connection.scalar(select(generations.c.state).where(at(generation))) is None:
            continue
        values: dict[str, Any] = {"note": json.dumps(kept["note"]) if "note" in kept else ""}
        if "pinned" in kept:
            values |= {"pinned": kept["pinned"], "pin_expires": kept["pin_expires"]}
        connection.execute(update(generations).where(at(generation)).values(**values))
        _restore_tags(connection, generation, kept.get("tags", ()))


def _restore_tags(connection: Connection, generation: GenerationId, names: Sequence[str]) -> None:
    for tag in names:
        connection.execute(
            insert(tags).values(
                run=generation.run, tag=tag, attempt=generation.attempt, step=generation.step
            )
        )
