"""Lists of numbers (tokens) of many rows: how long they are, and pieces of them end to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.gather import GROUPS_AT_ONCE, Group, RowReader, groups
from forebay.dataset.schema import Column
from forebay_wire.errors import SchemaMismatch

Numbers = NDArray[np.int64]

CHUNK_ROWS: Final = 1 << 18
"""Rows whose lengths are added up at a time."""


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
    for group, values in _parts(reader, rows, column):
        offsets = _offsets(values)
        own = np.diff(offsets)
        if values.null_count:
            own[values.is_null().to_numpy(zero_copy_only=False)] = 0
        found[group.target] = own[group.source]
    return found


def pieces(
    reader: RowReader, rows: Numbers, starts: Numbers, sizes: Numbers, column: Column
) -> NDArray[Any]:
    """Elements [start, start + size) of the list of each of *rows*, one after the other."""
    assert column.dtype is not None, "a list has an element type"
    ends = np.cumsum(sizes)
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype=column.dtype)
    places = ends - sizes
    for group, values in _parts(reader, rows, column):
        flat = values.values.to_numpy(zero_copy_only=False)
        first = starts[group.target] + _offsets(values)[:-1][group.source]
        _copy(flat, first, sizes[group.target], out, places[group.target])
    return out


def _parts(
    reader: RowReader, rows: Numbers, column: Column
) -> Iterator[tuple[Group, pa.ListArray]]:
    """The wanted rows by record batch, with the column of that batch over the mapped memory."""
    wanted = list(groups(reader._index.starts, rows))
    for start in range(0, len(wanted), GROUPS_AT_ONCE):
        some = wanted[start : start + GROUPS_AT_ONCE]
        for group, batch in zip(some, reader._batches(some), strict=True):
            yield group, batch._arrow(column)


def _offsets(values: pa.ListArray) -> Numbers:
    offsets: Numbers = values.offsets.to_numpy(zero_copy_only=False)
    return offsets.astype(np.int64)


def _copy(
    flat: NDArray[Any], first: Numbers, sizes: Numbers, out: NDArray[Any], places: Numbers
) -> None:
    """Elements [first, first + size) of *flat* to each of *places* of *out*."""
    if len(first) <= FEW_PIECES or int(sizes.sum()) >= LONG_PIECE * len(first):
        for source, size, place in zip(
            first.tolist(), sizes.tolist(), places.tolist(), strict=True
        ):
            out[place : place + size] = flat[source : source + size]
        return
    within = np.arange(int(sizes.sum()), dtype=np.int64)
    within -= np.repeat(np.cumsum(sizes) - sizes, sizes)
    out[np.repeat(places, sizes) + within] = flat[np.repeat(first, sizes) + within]


FEW_PIECES: Final = 4
LONG_PIECE: Final = 64
"""From so many elements on, a copy of its own costs less than indices do."""
