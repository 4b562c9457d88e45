"""Fingerprints of checkpoints, kept beside their manifests."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, insert, select

from forebay_server.catalog.queries_jobs import FINGERPRINT, Job, enqueue, job_of
from forebay_server.catalog.queries_runs import at
from forebay_server.catalog.tables import fingerprints, generations, manifests
from forebay_wire.errors import NotFound
from forebay_wire.ids import GenerationId

WANTED: int = 1
"""Priority of a job that somebody waits for; of the others 0."""


@dataclass(frozen=True)
class Kept:
    """What is known of one generation."""

    manifest: str
    num_packs: int
    """So many have fingerprints."""
    num_bytes: int
    """Of the chosen pack's."""
    chunk: bytes
    job: Job | None
    """That computes them, or did so last."""


def ranks_done(connection: Connection, manifest: str) -> set[int]:
    """The packs of a generation whose fingerprints are kept."""
    found = select(fingerprints.c.rank).where(fingerprints.c.manifest == manifest)
    return set(connection.scalars(found))


def keep_fingerprints(connection: Connection, manifest: str, rank: int, data: bytes) -> None:
    """Keep those of one pack, unless they are kept, or the manifest is gone."""
    known = select(manifests.c.manifest).where(manifests.c.manifest == manifest)
    if connection.scalar(known) is None or rank in ranks_done(connection, manifest):
        return
    connection.execute(insert(fingerprints).values(manifest=manifest, rank=rank, data=data))


def latest_fingerprints(connection: Connection, run: str, manifest: str) -> list[bytes]:
    """Those of all packs of the run's newest generation that has some, *manifest* left out."""
    newest = connection.scalar(
        select(fingerprints.c.manifest)
        .join(generations, generations.c.manifest == fingerprints.c.manifest)
        .where(generations.c.run == run, fingerprints.c.manifest != manifest)
        .order_by(generations.c.attempt.desc(), generations.c.step.desc())
        .limit(1)
    )
    if newest is None:
        return []
    found = select(fingerprints.c.data).where(fingerprints.c.manifest == newest)
    return list(connection.scalars(found.order_by(fingerprints.c.rank)))


def read_fingerprints(
    connection: Connection, generation: GenerationId, rank: int, offset: int, limit: int
) -> Kept:
    """At most *limit* bytes from *offset* on of what is kept of one pack of a committed generation;
    none if it is not kept yet. :class:`NotFound` without such a generation."""
    manifest = connection.scalar(select(generations.c.manifest).where(at(generation)))
    if manifest is None:
        raise NotFound(f"there is no committed generation {generation}")
    row = connection.execute(
        select(
            func.length(fingerprints.c.data).label("size"),
            func.substr(fingerprints.c.data, offset + 1, limit).label("chunk"),
        ).where(fingerprints.c.manifest == manifest, fingerprints.c.rank == rank)
    ).one_or_none()
    return Kept(
        manifest,
        len(ranks_done(connection, manifest)),
        row.size if row is not None else 0,
        bytes(row.chunk) if row is not None else b"",
        job_of(connection, FINGERPRINT, manifest),
    )


def ask_for_fingerprints(connection: Connection, generation: GenerationId) -> None:
    """Have them computed soon, unless they are kept, or somebody is at it."""
    found = select(generations.c.manifest, generations.c.num_ranks).where(at(generation))
    row = connection.execute(found).one_or_none()
    if row is None or row.manifest is None:
        raise NotFound(f"there is no committed generation {generation}")
    if len(ranks_done(connection, row.manifest)) < row.num_ranks:
        enqueue(connection, FINGERPRINT, row.manifest, priority=WANTED)
