"""Which figures of a version or selection are kept, and which records of them are not needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One record that is kept, as far as it can be read."""

    manifest: str
    columns: frozenset[str] | None
    """What it has figures of; None: it is damaged."""


@dataclass(frozen=True)
class Keeping:
    """What to do."""

    columns: dict[str, Any]
    """Figures for a new record; none: no record."""
    dropped: tuple[str, ...]
    """Records that say nothing any more."""


def keep(records: Sequence[Record], new: Mapping[str, Any], *, replaces: bool) -> Keeping:
    """Figures that are kept stay, unless *replaces*: of two who computed the same columns at once
    the first one's are everybody's. A later record's figures stand before those of an earlier one.

    A damaged record has no figures and goes, as does one whose every column is in the new record.
    """
    known = _known(records)
    columns = {name: new[name] for name in new if replaces or name not in known}
    dropped = [
        record.manifest
        for record in records
        if record.columns is None or (columns and record.columns <= columns.keys())
    ]
    return Keeping(columns, tuple(dropped))


def _known(records: Iterable[Record]) -> set[str]:
    return {name for record in records for name in record.columns or ()}
