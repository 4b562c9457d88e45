"""What happened to blobs, datasets, generations and tiers: written in the transaction that does it.

Subjects: ``blob ID``, ``dataset NAME`` or ``dataset NAME@VERSION``, ``run NAME``,
``generation RUN@ATTEMPT/STEP``, ``manifest ID``, ``tier NAME``. Every deletion is among the events,
with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select

from forebay_server.catalog.clock import now
from forebay_server.catalog.tables import history

MAX_ROWS: Final = 200_000
"""About 50 MB; older events are forgotten first."""
MAX_AGE_SECONDS: Final = 90 * 86400.0
MAX_DETAIL: Final = 1000
"""Characters of a detail that are kept."""


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    at_unix: float
    subject: str
    event: str
    detail: str


def record(connection: Connection, subject: str, event: str, detail: str = "") -> None:
    """Remember that *event* happened to *subject*."""
    connection.execute(
        insert(history).values(subject=subject, event=event, detail=detail[:MAX_DETAIL])
    )


def list_events(connection: Connection, subjects: Sequence[str], limit: int) -> list[Event]:
    """What happened to any of *subjects*, newest first."""
    rows = connection.execute(
        select(history)
        .where(history.c.subject.in_(subjects))
        .order_by(history.c.seq.desc())
        .limit(limit)
    )
    return [Event(row.at, row.subject, row.event, row.detail) for row in rows]


def prune(
    connection: Connection, max_rows: int = MAX_ROWS, max_age_seconds: float = MAX_AGE_SECONDS
) -> int:
    """Forget the oldest events beyond *max_rows* and those older than *max_age_seconds*; how many.

    Rows are numbered in the order in which they were made.
    """
    newest = connection.scalar(select(func.max(history.c.seq))) or 0
    gone = connection.execute(
        delete(history).where(
            (history.c.seq <= newest - max_rows) | (history.c.at < now() - max_age_seconds)
        )
    )
    return gone.rowcount
