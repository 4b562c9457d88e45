"""Lists of numbers (tokens) of many rows: how long they are, and pieces of them end to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.gather import GROUPS_AT_ONCE, Group, RowReader, groups
from forebay.dataset.schema import Column
from forebay.dataset.shard import BatchColumns
from forebay_wire.errors import SchemaMismatch

Numbers = NDArray[np.int64]

CHUNK_ROWS: Final = 1 << 18
"""Rows whose lengths are added up at a time."""

FEW_PIECES: Final = 4
LONG_PIECE: Final = 64
"""From so many elements on, a copy of its own costs less than indices do."""


def check_list(column: Column) -> Column:
    """*column* unchanged if it holds lists of numbers."""
    if column.kind != "list":
        raise SchemaMismatch(
            f"column {column.name!r} holds {column.text}: packing, and weights by token, need a "
            "column of lists of numbers, like list[uint16]"
        )
    return column


def lengths(reader: RowReader, rows: Numbers, column: Column) -> Numbers:
    """How long the list of each of *rows* is; missing ones are empty."""
    found = np.empty(len(rows), dtype=np.int64)
    for group, lists in _parts(reader, rows, column):
        own = lists.ends[group.source] - lists.starts[group.source]
        if lists.missing is not None:
            own[lists.missing[group.source]] = 0
        found[group.target] = own
    return found


def pieces(
    reader: RowReader, rows: Numbers, starts: Numbers, sizes: Numbers, column: Column
) -> NDArray[Any]:
    """Elements [start, start + size) of the list of each of *rows*, one after the other."""
    assert column.dtype is not None, "a list has an element type"
    ends = np.cumsum(sizes)
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype=column.dtype)
    places = ends - sizes
    for group, lists in _parts(reader, rows, column):
        target = group.target
        first = starts[target] + lists.starts[group.source]
        _copy(lists.values, first, sizes[target], out, places[target])
    return out


@dataclass(frozen=True)
class _Lists:
    """A column of lists of one record batch, over the mapped memory."""

    values: NDArray[Any]
    starts: Numbers
    ends: Numbers
    """Where the list of each row lies in *values*."""
    missing: NDArray[np.bool_] | None

    @classmethod
    def of(cls, values: pa.ListArray) -> _Lists:
        offsets = values.offsets.to_numpy(zero_copy_only=False)
        missing = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
        flat = values.values.to_numpy(zero_copy_only=False)
        return cls(flat, offsets[:-1], offsets[1:], missing)


_seen: WeakKeyDictionary[BatchColumns, dict[str, _Lists]] = WeakKeyDictionary()
"""What was made of record batches, as long as their cache holds them."""


def _parts(reader: RowReader, rows: Numbers, column: Column) -> Iterator[tuple[Group, _Lists]]:
    """The wanted rows by record batch, with the column of that batch."""
    wanted = list(groups(reader._index.starts, rows))
    for start in range(0, len(wanted), GROUPS_AT_ONCE):
        some = wanted[start : start + GROUPS_AT_ONCE]
        for group, batch in zip(some, reader._batches(some), strict=True):
            known = _seen.get(batch)
            if known is None:
                known = _seen[batch] = {}
            lists = known.get(column.name)
            if lists is None:
                lists = known[column.name] = _Lists.of(batch._arrow(column))
            yield group, lists


def _copy(
    flat: NDArray[Any], first: Numbers, sizes: Numbers, out: NDArray[Any], places: Numbers
) -> None:
    """Elements [first, first + size) of *flat* to each of *places* of *out*."""
    # Long pieces are few: a loop over them costs less than an index for each element.
    if len(first) <= FEW_PIECES or int(sizes.sum()) >= LONG_PIECE * len(first):
        for source, size, place in zip(
            first.tolist(), sizes.tolist(), places.tolist(), strict=True
        ):
            out[place : place + size] = flat[source : source + size]
        return
    within = np.arange(int(sizes.sum()), dtype=np.int64)
    within -= np.repeat(np.cumsum(sizes) - sizes, sizes)
    out[np.repeat(places, sizes) + within] = flat[np.repeat(first, sizes) + within]
