"""Lists of numbers (tokens) of many rows: how long they are, and pieces of them end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.addresses import gather_runs
from forebay.dataset.gather import GROUPS_AT_ONCE, Group, RowReader, groups
from forebay.dataset.layers import Reader
from forebay.dataset.schema import Column
from forebay.dataset.shard import BatchColumns, as_array, is_present, refuse_missing
from forebay_wire.errors import SchemaMismatch
from forebay_wire.manifest import DatasetManifest

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset

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


@dataclass(frozen=True)
class Lists:
    """Lists of numbers end to end."""

    values: NDArray[Any]
    lengths: Numbers

    @classmethod
    def of(cls, given: Lists | Sequence[NDArray[Any] | None], dtype: np.dtype[Any] | None) -> Lists:
        """*given* as such; a list that is None is empty."""
        if isinstance(given, Lists):
            return given
        counts = [0 if one is None else len(one) for one in given]
        there = [one for one in given if one is not None]
        values = np.concatenate(there) if there else np.empty(0)
        return cls(values.astype(dtype, copy=False), np.array(counts, dtype=np.int64))

    def among(self, present: NDArray[np.bool_]) -> Lists:
        """Those of the *present* rows, with empty ones in the others."""
        lengths = np.zeros(len(present), dtype=np.int64)
        lengths[present] = self.lengths
        return Lists(self.values, lengths)

    def parts(self, present: NDArray[np.bool_]) -> list[NDArray[Any] | None]:
        """Each list by itself; None where there is none."""
        pieces = np.split(self.values, np.cumsum(self.lengths))[:-1]
        return [one if there else None for one, there in zip(pieces, present, strict=True)]


def merged(parts: Sequence[tuple[Numbers, Lists]], num_rows: int) -> Lists:
    """*num_rows* lists from *parts*: where they stand, and the lists."""
    lengths = np.zeros(num_rows, dtype=np.int64)
    starts = np.zeros(num_rows, dtype=np.int64)
    before = 0
    for target, lists in parts:
        lengths[target] = lists.lengths
        starts[target] = before + np.cumsum(lists.lengths) - lists.lengths
        before += len(lists.values)
    values = np.concatenate([lists.values for _, lists in parts])
    out = np.empty(int(lengths.sum()), dtype=values.dtype)
    _copy(values, starts, lengths, out, np.cumsum(lengths) - lengths)
    return Lists(out, lengths)


def read_flat(reader: Reader, rows: Numbers, columns: Sequence[Column]) -> dict[str, Any]:
    """As ``reader.read``, and the columns of lists as :class:`Lists`."""
    plain = [column for column in columns if column.kind != "list"]
    found: dict[str, Any] = reader.read(rows, plain) if plain else {}
    return {
        column.name: found[column.name]
        if column.name in found
        else _read_lists(reader.of(column), rows, column)
        for column in columns
    }


class WithFlatLists:
    """A dataset whose lists are read end to end."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.read = dataset.read_flat
        self.columns = dataset.columns

    @property
    def manifest(self) -> DatasetManifest:
        return self.dataset.manifest

    def __reduce__(self) -> tuple[type[WithFlatLists], tuple[Dataset]]:
        return WithFlatLists, (self.dataset,)


def _read_lists(reader: RowReader, rows: Numbers, column: Column) -> Lists:
    looked = _bounds(reader, rows, column)
    if looked is None:
        sizes = lengths(reader, rows, column)
        return Lists(pieces(reader, rows, np.zeros_like(sizes), sizes, column), sizes)
    held, bounds = looked
    sizes = bounds[:, 1].copy()
    found = _gather(bounds[:, 0], sizes, column)
    del held
    return Lists(found, sizes)


def _bounds(reader: RowReader, rows: Numbers, column: Column) -> tuple[Any, Numbers] | None:
    """(address, length) of each list, and what keeps the memory; None if not all of it is held."""
    dtype = np.dtype(np.int64)
    looked = reader.held(rows, [replace(column, kind="bounds", dtype=dtype, shape=(2,))])
    return None if looked is None else (looked[0], looked[1][column.name])


def _gather(addresses: Numbers, sizes: Numbers, column: Column) -> NDArray[Any]:
    assert column.dtype is not None, "a list has an element type"
    return gather_runs(addresses, sizes, column.dtype.itemsize).view(column.dtype)


def lengths(reader: RowReader, rows: Numbers, column: Column) -> Numbers:
    """How long the list of each of *rows* is; missing ones are empty."""
    looked = _bounds(reader, rows, column)
    if looked is not None:
        return looked[1][:, 1].copy()
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
    looked = _bounds(reader, rows, column)
    if looked is not None:
        held, bounds = looked
        _check_pieces(starts, sizes, bounds[:, 1])
        found = _gather(bounds[:, 0] + starts * column.dtype.itemsize, sizes, column)
        del held
        return found
    _check_pieces(starts, sizes, lengths(reader, rows, column))
    ends = np.cumsum(sizes)
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype=column.dtype)
    places = ends - sizes
    for group, lists in _parts(reader, rows, column):
        target = group.target
        first = starts[target] + lists.starts[group.source]
        _copy(lists.values, first, sizes[target], out, places[target])
    return out


def _check_pieces(starts: Numbers, sizes: Numbers, longest: Numbers) -> None:
    """Addresses are computed from them."""
    if len(sizes) and (min(starts.min(), sizes.min()) < 0 or (starts + sizes > longest).any()):
        raise IndexError("a piece reaches beyond its list")


@dataclass(frozen=True)
class _Lists:
    """A column of lists of one record batch, over the mapped memory."""

    values: NDArray[Any]
    starts: Numbers
    ends: Numbers
    """Where the list of each row lies in *values*."""
    missing: NDArray[np.bool_] | None

    @classmethod
    def of(cls, values: pa.ListArray, column: Column) -> _Lists:
        refuse_missing(values.values, column)
        offsets = as_array(values.offsets)
        present = is_present(values)
        missing = None if present is None else ~present
        return cls(as_array(values.values), offsets[:-1], offsets[1:], missing)


_seen: WeakKeyDictionary[BatchColumns, dict[str, _Lists]] = WeakKeyDictionary()
"""What was made of record batches, as long as their cache holds them."""


def _parts(reader: RowReader, rows: Numbers, column: Column) -> Iterator[tuple[Group, _Lists]]:
    """The wanted rows by record batch, with the column of that batch."""
    wanted = list(groups(reader.starts, rows))
    for start in range(0, len(wanted), GROUPS_AT_ONCE):
        some = wanted[start : start + GROUPS_AT_ONCE]
        for group, batch in zip(some, reader.batches(some), strict=True):
            known = _seen.get(batch)
            if known is None:
                known = _seen[batch] = {}
            lists = known.get(column.name)
            if lists is None:
                lists = known[column.name] = _Lists.of(batch.arrow(column), column)
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
