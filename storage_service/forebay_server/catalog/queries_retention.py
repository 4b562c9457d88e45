"""What a decision about keeping the generations of a run has to know."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_lineage import forks_needing_run
from forebay_server.catalog.queries_managing import is_pinned, list_tags
from forebay_server.catalog.tables import generations, manifest_blobs, packs, replicas
from forebay_server.model.lineage import Point
from forebay_server.model.states import GenerationState


@dataclass(frozen=True)
class Candidate:
    """One committed generation."""

    point: Point
    committed_unix: float
    is_good: bool
    """Each of its blobs has a copy that is in service, in some tier."""
    metrics_json: str
    num_bytes: int
    tags: tuple[str, ...]
    pin: str | None
    pin_ends_unix: float
    """0: by nobody but people, or there is none."""
    forks: tuple[str, ...]
    blobs: tuple[str, ...]


@dataclass(frozen=True)
class Candidates:
    """The committed generations of a run at one moment by the catalog's clock."""

    now: float
    generations: tuple[Candidate, ...]


def load_candidates(connection: Connection, run: str) -> Candidates:
    """All committed generations of *run*, in no order."""
    committed = (generations.c.run == run) & (generations.c.state == GenerationState.COMMITTED)
    blobs: dict[str, list[str]] = defaultdict(list)
    bad: set[str] = set()
    live = (
        select(func.count())
        .where(replicas.c.blob == manifest_blobs.c.blob, replicas.c.state == "live")
        .scalar_subquery()
    )
    named = (
        select(manifest_blobs, live.label("num_live"))
        .join(generations, generations.c.manifest == manifest_blobs.c.manifest)
        .where(committed)
    )
    for row in connection.execute(named):
        blobs[row.manifest].append(row.blob)
        if not row.num_live:
            bad.add(row.manifest)
    tags: dict[Point, list[str]] = defaultdict(list)
    for tag in list_tags(connection, run):
        tags[Point(tag.attempt, tag.step)].append(tag.tag)
    forks: dict[Point, list[str]] = defaultdict(list)
    for fork, parent in forks_needing_run(connection, run):
        forks[Point(parent.attempt, parent.step)].append(fork)
    sizes = _sizes(connection, run)
    rows = connection.execute(select(generations, is_pinned().label("is_pinned")).where(committed))
    found = []
    for row in rows:
        point = Point(row.attempt, row.step)
        found.append(
            Candidate(
                point,
                row.committed or row.created,
                row.manifest not in bad,
                row.metrics,
                sizes.get(point, 0),
                tuple(tags[point]),
                row.pinned if row.is_pinned else None,
                (row.pin_expires or 0.0) if row.is_pinned else 0.0,
                tuple(forks[point]),
                tuple(blobs[row.manifest]),
            )
        )
    return Candidates(connection.scalar(select(now())) or 0.0, tuple(found))


def _sizes(connection: Connection, run: str) -> dict[Point, int]:
    rows = connection.execute(
        select(packs.c.attempt, packs.c.step, func.sum(packs.c.num_bytes).label("num_bytes"))
        .where(packs.c.run == run)
        .group_by(packs.c.attempt, packs.c.step)
    )
    return {Point(row.attempt, row.step): row.num_bytes for row in rows}
