"""Looking at runs, attempts and generations."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, Row, Select, and_, case, func, or_, select, tuple_

from forebay_server.catalog.clock import now
from forebay_server.catalog.tables import (
    attempts,
    generations,
    manifest_remote,
    packs,
    runs,
    tags,
)
from forebay_server.model.lineage import Lineage, Point
from forebay_server.model.states import GenerationState, PackState, durability_of
from forebay_wire.ids import GenerationId
from forebay_wire.limits import PAGE_BYTES

ROW_BYTES: Final = 512
"""More than a generation takes in a message without its metrics and its error."""


@dataclass(frozen=True)
class AttemptInfo:
    """One incarnation of a run."""

    run: str
    attempt: int
    parent: Point | None
    """The generation of this run that it restored."""
    created_unix: float
    fork: GenerationId | None = None
    """The generation of another run that it stands on."""


@dataclass(frozen=True)
class GenerationInfo:
    """One saved state as a caller sees it."""

    id: GenerationId
    state: GenerationState
    durability: str
    manifest: str | None
    num_ranks: int
    num_sealed: int
    """Ranks whose pack is sealed or landed."""
    num_bytes: int
    """Of all packs planned so far."""
    created_unix: float
    metrics_json: str
    parent: Point | None
    error: str
    fork: GenerationId | None = None
    """The generation of another run that its attempt stands on."""
    tags: tuple[str, ...] = ()
    pin: str | None = None
    """Why no retention takes it, empty without a reason; None: it may."""
    pin_expires_unix: float = 0.0
    """0: when it is unpinned."""
    note_json: str = ""
    dataset_json: str = ""
    ram_unix: float = 0.0
    """When all ranks had sealed it; 0: not yet, or not known."""
    local_unix: float = 0.0
    remote_unix: float = 0.0
    stall_seconds: float = 0.0
    shared_bytes: int = 0
    """Of ``num_bytes``: what the run, or this generation twice, had already when it landed."""
    """How long the save held its slowest rank up; 0: not known."""


@dataclass(frozen=True)
class RunInfo:
    """One run in one line."""

    run: str
    num_attempts: int
    num_generations: int
    """Committed ones."""
    num_bytes: int
    latest: GenerationInfo | None


def at(generation: GenerationId, table: Any = generations) -> Any:
    """The condition that a row of *table* belongs to *generation*."""
    return and_(
        table.c.run == generation.run,
        table.c.attempt == generation.attempt,
        table.c.step == generation.step,
    )


def parent_of(row: Row[Any]) -> Point | None:
    """The parent generation, in the same run, of a row that has an attempt's columns."""
    if row.parent_attempt is None or row.parent_run:
        return None
    return Point(row.parent_attempt, row.parent_step)


def fork_of(row: Row[Any]) -> GenerationId | None:
    """The generation of another run that an attempt stands on, if it does."""
    if not row.parent_run:
        return None
    return GenerationId(row.parent_run, row.parent_attempt, row.parent_step)


def attempt_info(row: Row[Any]) -> AttemptInfo:
    """An attempt as it lies in its row."""
    return AttemptInfo(row.run, row.attempt, parent_of(row), row.created, fork_of(row))


def _generation_rows() -> Select[Any]:
    sealed = case((packs.c.state != PackState.OPEN, 1), else_=0)
    sums = (
        select(
            packs.c.run,
            packs.c.attempt,
            packs.c.step,
            func.sum(packs.c.num_bytes).label("num_bytes"),
            func.sum(packs.c.shared_bytes).label("shared_bytes"),
            func.sum(sealed).label("num_sealed"),
        )
        .group_by(packs.c.run, packs.c.attempt, packs.c.step)
        .subquery()
    )
    return select(
        generations,
        attempts.c.parent_run,
        attempts.c.parent_attempt,
        attempts.c.parent_step,
        sums.c.num_bytes,
        sums.c.shared_bytes,
        sums.c.num_sealed,
        manifest_remote.c.at.label("remote_at"),
        or_(generations.c.pin_expires.is_(None), generations.c.pin_expires > now()).label("holds"),
    ).select_from(
        generations.join(attempts)
        .outerjoin(manifest_remote, manifest_remote.c.manifest == generations.c.manifest)
        .outerjoin(
            sums,
            and_(
                sums.c.run == generations.c.run,
                sums.c.attempt == generations.c.attempt,
                sums.c.step == generations.c.step,
            ),
        )
    )


def _with_tags(connection: Connection, row: Row[Any]) -> GenerationInfo:
    mine = and_(tags.c.run == row.run, tags.c.attempt == row.attempt, tags.c.step == row.step)
    named = connection.scalars(select(tags.c.tag).where(mine).order_by(tags.c.tag))
    return replace(_generation_info(row), tags=tuple(named))


def _generation_info(row: Row[Any]) -> GenerationInfo:
    state = GenerationState(row.state)
    return GenerationInfo(
        id=GenerationId(row.run, row.attempt, row.step),
        state=state,
        durability=durability_of(state, row.remote_at is not None),
        manifest=row.manifest,
        num_ranks=row.num_ranks,
        num_sealed=row.num_sealed or 0,
        num_bytes=row.num_bytes or 0,
        created_unix=row.created,
        metrics_json=row.metrics,
        parent=parent_of(row),
        error=row.error,
        fork=fork_of(row),
        pin=row.pinned if row.holds else None,
        pin_expires_unix=row.pin_expires or 0.0,
        note_json=row.note,
        dataset_json=row.dataset,
        ram_unix=row.sealed or 0.0,
        local_unix=row.committed or 0.0,
        remote_unix=row.remote_at or 0.0,
        stall_seconds=row.stall,
        shared_bytes=row.shared_bytes or 0,
    )


def find_generation(connection: Connection, generation: GenerationId) -> GenerationInfo | None:
    """One generation, in whatever state."""
    row = connection.execute(_generation_rows().where(at(generation))).one_or_none()
    return _with_tags(connection, row) if row is not None else None


def load_lineage(connection: Connection, run: str) -> Lineage | None:
    """The run's attempts and the states of its generations; None for an unknown run."""
    parents = {
        row.attempt: parent_of(row)
        for row in connection.execute(select(attempts).where(attempts.c.run == run))
    }
    if not parents:
        return None
    rows = connection.execute(
        select(generations.c.attempt, generations.c.step, generations.c.state).where(
            generations.c.run == run
        )
    )
    return Lineage(
        parents, {Point(row.attempt, row.step): GenerationState(row.state) for row in rows}
    )


def remote_points(connection: Connection, run: str) -> set[Point]:
    """The run's generations whose manifest is in the object tier."""
    rows = connection.execute(
        select(generations.c.attempt, generations.c.step)
        .join(manifest_remote, manifest_remote.c.manifest == generations.c.manifest)
        .where(generations.c.run == run)
    )
    return {Point(row.attempt, row.step) for row in rows}


def metrics_by_point(connection: Connection, run: str) -> dict[Point, dict[str, float]]:
    """The metrics of a run's committed generations."""
    rows = connection.execute(
        select(generations.c.attempt, generations.c.step, generations.c.metrics).where(
            generations.c.run == run, generations.c.state == GenerationState.COMMITTED
        )
    )
    return {
        Point(row.attempt, row.step): json.loads(row.metrics) if row.metrics else {} for row in rows
    }


def list_runs(connection: Connection, after: str, limit: int) -> list[RunInfo]:
    """Runs by name, those behind *after*."""
    names = connection.scalars(
        select(runs.c.run).where(runs.c.run > after).order_by(runs.c.run).limit(limit)
    ).all()
    return [_run_info(connection, name) for name in names]


def _run_info(connection: Connection, run: str) -> RunInfo:
    num_attempts = connection.scalar(select(func.count()).where(attempts.c.run == run)) or 0
    committed = and_(generations.c.run == run, generations.c.state == GenerationState.COMMITTED)
    number = connection.scalar(select(func.count()).where(committed)) or 0
    num_bytes = connection.scalar(
        select(func.sum(packs.c.num_bytes)).select_from(packs.join(generations)).where(committed)
    )
    lineage = load_lineage(connection, run)
    latest = lineage.latest({GenerationState.COMMITTED}) if lineage else None
    info = find_generation(connection, GenerationId(run, *latest)) if latest else None
    return RunInfo(run, num_attempts, number, num_bytes or 0, info)


def list_attempts(
    connection: Connection, run: str, newest: int | None, limit: int
) -> list[AttemptInfo]:
    """A run's attempts, newest first, from *newest* (None: the last one) down."""
    statement = select(attempts).where(attempts.c.run == run)
    if newest is not None:
        statement = statement.where(attempts.c.attempt <= newest)
    ordered = statement.order_by(attempts.c.attempt.desc())
    return [attempt_info(row) for row in connection.execute(ordered.limit(limit))]


def list_generations(
    connection: Connection, run: str, before: Point | None, lowest: int, limit: int
) -> tuple[list[GenerationInfo], bool]:
    """``(generations, whether there are more)`` of a run, from the newest attempt's last step down
    to attempt *lowest*, those behind *before*: at most *limit*, and as many as fit one message."""
    statement = _generation_rows().where(generations.c.run == run, generations.c.attempt >= lowest)
    if before is not None:
        statement = statement.where(
            tuple_(generations.c.attempt, generations.c.step) < tuple_(before.attempt, before.step)
        )
    ordered = statement.order_by(generations.c.attempt.desc(), generations.c.step.desc())
    page: list[GenerationInfo] = []
    num_bytes = 0
    for row in connection.execute(ordered.limit(limit + 1)):
        if len(page) == limit or num_bytes > PAGE_BYTES:
            return page, True
        page.append(_with_tags(connection, row))
        texts = (row.metrics, row.error, row.note, row.dataset, row.pinned or "")
        num_bytes += ROW_BYTES + sum(len(text.encode()) for text in texts)
    return page, False
