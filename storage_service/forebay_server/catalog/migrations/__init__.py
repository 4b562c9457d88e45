"""Numbered steps that bring an older catalog to the current schema.

A step lies in a module of its own, ``vNNNN_what_it_does.py``, and is listed in :data:`MIGRATIONS`.
It says what it does in plain SQL and never imports ``catalog.tables``: those move on, it does not.
A new catalog is created from ``catalog.tables`` and needs no step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from forebay_server.catalog.migrations import (
    v0002_movement,
    v0003_parts,
    v0004_statistics,
    v0005_decisions,
    v0006_retention,
    v0007_fingerprints,
    v0008_shared,
    v0009_steps,
)


@dataclass(frozen=True)
class Migration:
    """One step: ``apply`` brings a catalog of schema ``number - 1`` to schema ``number``."""

    number: int
    name: str
    apply: Callable[[Connection], None]


MIGRATIONS: Final[tuple[Migration, ...]] = (
    Migration(2, "movement", v0002_movement.apply),
    Migration(3, "parts", v0003_parts.apply),
    Migration(4, "statistics", v0004_statistics.apply),
    Migration(5, "decisions", v0005_decisions.apply),
    Migration(6, "retention", v0006_retention.apply),
    Migration(7, "fingerprints", v0007_fingerprints.apply),
    Migration(8, "shared", v0008_shared.apply),
    Migration(9, "steps", v0009_steps.apply),
)
"""In order, without gaps, from 2 on; the last one's number is ``tables.SCHEMA_VERSION``."""
