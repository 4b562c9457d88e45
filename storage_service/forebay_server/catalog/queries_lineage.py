"""What a run stands on beyond its own attempts: the generations of the runs that it forked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, select

from forebay_server.catalog.queries_runs import at, fork_of, load_lineage
from forebay_server.catalog.tables import attempts, generations
from forebay_server.model.lineage import Point
from forebay_server.model.states import GenerationState
from forebay_wire.ids import GenerationId

COMMITTED: Final = frozenset({GenerationState.COMMITTED})
MAX_FORKS: Final = 64
"""Forks of forks that are followed."""


@dataclass(frozen=True)
class Ancestor:
    """A committed generation that a run stands on."""

    run: str
    attempt: int
    step: int
    manifest: str


def ancestors(connection: Connection, run: str, limit: int = 16) -> list[Ancestor]:
    """The committed generations that the newest attempt of *run* stands on, newest first, at most
    *limit*: its own, then those of the run that it was forked from, from there down, and so on."""
    found: list[Ancestor] = []
    start: GenerationId | None = None
    for _ in range(MAX_FORKS):
        lineage = load_lineage(connection, run)
        if lineage is None:
            break
        points = lineage.candidates(COMMITTED, start=None if start is None else _point(start))
        for point in points:
            row = connection.execute(
                select(generations.c.manifest).where(at(GenerationId(run, *point)))
            ).one()
            found.append(Ancestor(run, *point, row.manifest))
            if len(found) == limit:
                return found
        start = fork_at_root(connection, run, None if start is None else start.attempt)
        if start is None:
            break
        run = start.run
    return found


def fork_at_root(
    connection: Connection, run: str, newest: int | None = None
) -> GenerationId | None:
    """The generation of another run that the lineage of attempt *newest* (None: the newest one)
    of *run* begins with; None if it does not."""
    lineage = load_lineage(connection, run)
    root = lineage.root(newest) if lineage is not None else None
    if root is None:
        return None
    row = connection.execute(
        select(attempts).where(attempts.c.run == run, attempts.c.attempt == root)
    ).one()
    return fork_of(row)


def fork_of_run(connection: Connection, run: str) -> GenerationId | None:
    """What the run was forked from when it began; None: it was not."""
    row = connection.execute(
        select(attempts).where(attempts.c.run == run).order_by(attempts.c.attempt).limit(1)
    ).one_or_none()
    return None if row is None else fork_of(row)


def forks_needing(connection: Connection, generation: GenerationId) -> list[str]:
    """The runs that stand on *generation* and have committed nothing of their own since: a resume
    of theirs starts from it."""
    rows = connection.execute(
        select(attempts.c.run)
        .where(
            attempts.c.parent_run == generation.run,
            attempts.c.parent_attempt == generation.attempt,
            attempts.c.parent_step == generation.step,
        )
        .distinct()
        .order_by(attempts.c.run)
    )
    return [row.run for row in rows if _stands_on_fork(connection, row.run, generation)]


def forks_needing_run(connection: Connection, run: str) -> list[tuple[str, GenerationId]]:
    """``(fork, the generation of run that it needs)`` as :func:`forks_needing`, of a whole run."""
    rows = connection.execute(
        select(attempts).where(attempts.c.parent_run == run).order_by(attempts.c.run)
    ).all()
    named = dict.fromkeys((row.run, fork_of(row)) for row in rows)
    return [
        (fork, parent)
        for fork, parent in named
        if parent is not None and _stands_on_fork(connection, fork, parent)
    ]


def forks_of(connection: Connection, run: str) -> list[tuple[str, int, GenerationId]]:
    """``(fork, its attempt, the generation of run that it began from)``, by name."""
    rows = connection.execute(
        select(attempts)
        .where(attempts.c.parent_run == run)
        .order_by(attempts.c.run, attempts.c.attempt)
    )
    return [
        (row.run, row.attempt, GenerationId(run, row.parent_attempt, row.parent_step))
        for row in rows
    ]


def _stands_on_fork(connection: Connection, run: str, parent: GenerationId) -> bool:
    lineage = load_lineage(connection, run)
    if lineage is None or lineage.latest(COMMITTED) is not None:
        return False
    return fork_at_root(connection, run) == parent


def _point(generation: GenerationId) -> Point:
    return Point(generation.attempt, generation.step)
