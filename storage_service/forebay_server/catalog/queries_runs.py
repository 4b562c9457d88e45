"""Looking at runs, attempts and generations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, Select, and_, case, exists, func, select, tuple_

from forebay_server.catalog.tables import attempts, generations, manifest_remote, packs, runs
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
    """The generation that it restored."""
    created_unix: float


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
    """The parent generation of a row that has an attempt's columns."""
    if row.parent_attempt is None:
        return None
    return Point(row.parent_attempt, row.parent_step)


def attempt_info(row: Row[Any]) -> AttemptInfo:
    """An attempt as it lies in its row."""
    return AttemptInfo(row.run, row.attempt, parent_of(row), row.created)


def _generation_rows() -> Select[Any]:
    sealed = case((packs.c.state != PackState.OPEN, 1), else_=0)
    sums = (
        select(
            packs.c.run,
            packs.c.attempt,
            packs.c.step,
            func.sum(packs.c.num_bytes).label("num_bytes"),
            func.sum(sealed).label("num_sealed"),
        )
        .group_by(packs.c.run, packs.c.attempt, packs.c.step)
        .subquery()
    )
    return select(
        generations,
        attempts.c.parent_attempt,
        attempts.c.parent_step,
        sums.c.num_bytes,
        sums.c.num_sealed,
        exists().where(manifest_remote.c.manifest == generations.c.manifest).label("is_remote"),
    ).select_from(
        generations.join(attempts).outerjoin(
            sums,
            and_(
                sums.c.run == generations.c.run,
                sums.c.attempt == generations.c.attempt,
                sums.c.step == generations.c.step,
            ),
        )
    )


def _generation_info(row: Row[Any]) -> GenerationInfo:
    state = GenerationState(row.state)
    return GenerationInfo(
        id=GenerationId(row.run, row.attempt, row.step),
        state=state,
        durability=durability_of(state, row.is_remote),
        manifest=row.manifest,
        num_ranks=row.num_ranks,
        num_sealed=row.num_sealed or 0,
        num_bytes=row.num_bytes or 0,
        created_unix=row.created,
        metrics_json=row.metrics,
        parent=parent_of(row),
        error=row.error,
    )


def find_generation(connection: Connection, generation: GenerationId) -> GenerationInfo | None:
    """One generation, in whatever state."""
    row = connection.execute(_generation_rows().where(at(generation))).one_or_none()
    return _generation_info(row) if row is not None else None


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
        page.append(_generation_info(row))
        num_bytes += ROW_BYTES + len((row.metrics + row.error).encode())
    return page, False
