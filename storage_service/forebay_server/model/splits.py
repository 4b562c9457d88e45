"""How many rows each split or fold gets, and which positions of the permuted version those are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from forebay_wire.errors import InvalidRequest

TOLERANCE: Final = 1e-9
"""Fractions that differ from their sum by less are what the user meant: 0.7 + 0.2 + 0.1 < 1."""


def split_bounds(num_rows: int, fractions: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """Split name to [start, stop) of the permuted rows; the same for any order of *fractions*.

    Counts follow the largest remainder, so they add up to all rows if the fractions add up to 1.
    Raises :class:`InvalidRequest` for a fraction that is not in (0, 1] or a sum above 1.
    """
    if not fractions:
        raise InvalidRequest("no splits given: name at least one, as in {'train': 0.9}")
    for name, fraction in fractions.items():
        if not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise InvalidRequest(
                f"split {name!r}: fraction {fraction} is not above 0 and at most 1"
            )
    total = math.fsum(fractions.values())
    if total > 1 + TOLERANCE:
        raise InvalidRequest(f"the fractions add up to {total:.6g}: at most 1 is there to share")
    names = sorted(fractions)
    shared = num_rows if total > 1 - TOLERANCE else math.floor(num_rows * total + TOLERANCE)
    exact = {name: num_rows * fractions[name] for name in names}
    counts = {name: min(math.floor(exact[name]), shared) for name in names}
    left = shared - sum(counts.values())
    by_remainder = sorted(names, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: max(left, 0)]:
        counts[name] += 1
    bounds: dict[str, tuple[int, int]] = {}
    start = 0
    for name in names:
        stop = min(start + counts[name], num_rows)
        bounds[name] = (start, stop)
        start = stop
    return bounds


@dataclass(frozen=True)
class Fold:
    """One part of one of k folds: the permuted rows [start, stop), where behind the last row comes
    the first."""

    fold: int
    part: str
    """``train`` or ``test``."""
    start: int
    stop: int


def folds(num_rows: int, num_folds: int) -> list[Fold]:
    """Both parts of each fold. The test parts share out all rows; their sizes differ by one at
    most, larger ones first. :class:`InvalidRequest` unless each has a row."""
    if num_folds < 2:
        raise InvalidRequest(f"{num_folds} folds: at least 2, one to test on and one to train on")
    if num_folds > num_rows:
        raise InvalidRequest(
            f"{num_folds} folds of {num_rows} rows: a fold would be empty, ask for fewer"
        )
    size, larger = divmod(num_rows, num_folds)
    found: list[Fold] = []
    start = 0
    for fold in range(num_folds):
        stop = start + size + (fold < larger)
        found.append(
            Fold(fold, "train", stop % num_rows, stop % num_rows + num_rows - stop + start)
        )
        found.append(Fold(fold, "test", start, stop))
        start = stop
    return found
