"""Which rows of a version a split of it has, for what goes through the version in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay_wire.selection import Nested, Ring, Rule, Stored, rule_of

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset

Numbers = NDArray[np.int64]
Batch = TypeVar("Batch", pa.RecordBatch, pa.Table)


class Members:
    """Answers without a list of all rows, however many there are. Not thread-safe."""

    def __init__(self, of: Dataset) -> None:
        """*of*: the split, or a whole version, which has all rows."""
        self._of = of
        self._held: tuple[int, Numbers] = (-1, np.empty(0, dtype=np.int64))
        """A shard, and those of its rows that are stored."""

    def among(self, rows: Numbers) -> Numbers:
        """Where in *rows*, which ascend, those stand that the split has."""
        selection = self._of.selection
        if selection is None:
            return np.arange(len(rows), dtype=np.int64)
        positions, _ = self._places(rule_of(selection), selection.num_rows, rows)
        return positions

    def _places(self, rule: Rule, num_rows: int, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Where in *rows* those stand that *rule* chooses, as the first *num_rows* places of it,
        and their places."""
        if isinstance(rule, Stored):
            return self._stored_places(rule, rows)
        if isinstance(rule, Nested):
            positions, parents = self._places(rule.parent, rule.num_rows, rows)
            places = rule.places(parents)
        else:
            assert isinstance(rule, Ring), "there is no other rule"
            whole = self._of.manifest.num_rows
            positions = np.arange(len(rows), dtype=np.int64)
            places = rule.places(self._of.manifest_id, whole, rows)
        is_chosen = places < num_rows
        return positions[is_chosen], places[is_chosen]

    def _stored_places(self, rule: Stored, rows: Numbers) -> tuple[Numbers, Numbers]:
        starts = self._of.shard_starts
        shards = np.searchsorted(starts, rows, side="right") - 1
        found = [np.empty((2, 0), dtype=np.int64)]
        for shard in np.unique(shards).tolist():
            first = int(rule.ends[shard]) - rule.counts[shard]
            stored = self._stored_rows(shard, first, rule.counts[shard])
            within = np.flatnonzero(shards == shard)
            at = np.searchsorted(stored, rows[within])
            is_there = at < len(stored)
            is_there[is_there] = stored[at[is_there]] == rows[within][is_there]
            found.append(np.stack((within[is_there], first + at[is_there])))
        positions, places = np.concatenate(found, axis=1)
        return positions, places

    def _stored_rows(self, shard: int, first: int, count: int) -> Numbers:
        """The rows at the places [first, first + count) of what is stored, which lie in *shard*."""
        if self._held[0] != shard:
            places = np.arange(first, first + count, dtype=np.int64)
            self._held = (shard, self._of.stored_rows_at(places))
        return self._held[1]


def chosen(of: Dataset, batches: Iterable[Batch]) -> Iterator[tuple[Numbers, Batch]]:
    """Of *batches*, which are all rows of the version in order, what the split *of* has: rows of
    the version, and what is in them. As many as came, also where none is left."""
    members, start = Members(of), 0
    for batch in batches:
        rows = np.arange(start, start + batch.num_rows, dtype=np.int64)
        start += batch.num_rows
        if of.selection is None:
            yield rows, batch
        else:
            own = members.among(rows)
            yield rows[own], batch.take(pa.array(own))
