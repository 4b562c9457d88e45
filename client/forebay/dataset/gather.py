"""Rows in any order, gathered from record batches into arrays: no Python loop over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.addresses import AddressTable, gather
from forebay.dataset.cache import ShardCache, ShardPlace
from forebay.dataset.schema import Column, Schema
from forebay.dataset.shard import BatchColumns
from forebay_wire.errors import InvalidRequest
from forebay_wire.limits import MAX_DESCRIPTORS_PER_MESSAGE
from forebay_wire.manifest import ShardRef

Indices = NDArray[np.int64] | slice

NUMBERS: Final = ("scalar", "array")
"""Kinds of columns that come as one array; the others come as lists."""

GROUPS_AT_ONCE: Final = MAX_DESCRIPTORS_PER_MESSAGE
"""Record batches that a read holds at a time: their shards open in a message or two, and a batch
over thousands of shards stays within the limit of open ones."""


class BatchIndex:
    """Which record batch of which shard holds a row of the version. Immutable."""

    def __init__(self, shards: Sequence[ShardRef]) -> None:
        counts = [shard.batch_rows for shard in shards]
        flat = np.fromiter(chain.from_iterable(counts), dtype=np.int64)
        self.starts = np.zeros(len(flat) + 1, dtype=np.int64)
        """First row of each record batch, and the number of rows last."""
        np.cumsum(flat, out=self.starts[1:])
        per_shard = np.fromiter(map(len, counts), dtype=np.int64, count=len(counts))
        self.shards = np.repeat(np.arange(len(counts)), per_shard)
        """Shard of each record batch."""
        self._first_of_shard = np.cumsum(per_shard) - per_shard
        self._rows_each = 0
        """Of every record batch but the last one; 0: they differ."""
        if len(flat) and (flat[:-1] == flat[0]).all() and 0 < flat[-1] <= flat[0]:
            self._rows_each = int(flat[0])

    def checked(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        """*rows* as whole numbers of 64 bits; IndexError for one that the version does not have.

        Addresses are computed from them.
        """
        wanted = np.asarray(rows)
        if wanted.dtype != np.int64:
            if wanted.size and wanted.dtype.kind not in "iu":
                raise InvalidRequest(f"rows are whole numbers, not {wanted.dtype}")
            wanted = wanted.astype(np.int64)
        num_rows = int(self.starts[-1])
        # As unsigned numbers, negative ones are large.
        if wanted.size and int(np.ascontiguousarray(wanted).view(np.uint64).max()) >= num_rows:
            raise IndexError(
                f"rows {wanted.min()} to {wanted.max()} are outside the {num_rows} of the version"
            )
        return wanted

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the record batch that each of *rows* is in."""
        if self._rows_each:
            return rows // self._rows_each
        return np.searchsorted(self.starts, rows, side="right") - 1

    def place(self, batch: int) -> tuple[int, int]:
        """(shard, record batch within it) of the version's record batch number *batch*."""
        shard = int(self.shards[batch])
        return shard, batch - int(self._first_of_shard[shard])


@dataclass(frozen=True)
class Group:
    """The wanted rows that lie in one record batch."""

    batch: int
    source: Indices
    """Rows within the record batch."""
    target: Indices
    """Where they go in the output."""


def groups(starts: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[Group]:
    """*rows* by record batch, in the order of the batches. Runs become slices (plain copies)."""
    if len(rows) == 0:
        return
    batch_of = np.searchsorted(starts, rows, side="right") - 1
    targets = np.argsort(batch_of, kind="stable")
    batch_of = batch_of[targets]
    borders = np.flatnonzero(batch_of[1:] != batch_of[:-1]) + 1
    edges = [0, *borders.tolist(), len(rows)]
    for first, last in pairwise(edges):
        target = targets[first:last]
        batch = int(batch_of[first])
        yield Group(batch, as_run(rows[target] - starts[batch]), as_run(target))


def as_run(indices: NDArray[np.int64]) -> Indices:
    """*indices* as a slice if they are consecutive and ascending."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first == len(indices) - 1 and bool(np.all(indices[1:] - indices[:-1] == 1)):
        return slice(first, last + 1)
    return indices


class RowReader:
    """Reads rows of one version from shards that have all columns. Thread-safe."""

    def __init__(
        self,
        shards: Sequence[ShardRef],
        schema_of: Callable[[int], Schema],
        cache: ShardCache,
        what: str,
    ) -> None:
        """*schema_of*: what the shard of that number was written with. *what*: whose rows, for
        messages."""
        self._index = BatchIndex(shards)
        self._table = AddressTable(self._index.starts)
        self._cache = cache
        self._shards = shards
        self._schema_of = schema_of
        self._what = what
        self._places: dict[int, ShardPlace] = {}
        """Of the shards that were read."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first row of each record batch, and the number of rows last."""
        return self._index.starts

    @property
    def num_batches(self) -> int:
        return len(self._index.shards)

    def of(self, column: Column) -> RowReader:
        """The reader of the shards that *column* is read from."""
        return self

    def record_batch(self, number: int) -> Any:
        """Record batch *number* of the version as a ``pyarrow.RecordBatch`` over mapped memory."""
        shard, index = self._index.place(number)
        return self._cache.open([self._place(shard)])[0].record_batch(index)

    def iterate(self, columns: Sequence[Column]) -> Iterator[pa.RecordBatch]:
        """All rows in order, a record batch at a time over mapped memory; *columns* alone."""
        schema = Schema(tuple(columns)).arrow
        names = frozenset(schema.names)
        for number in range(self.num_batches):
            shard, _ = self._index.place(number)
            if names == frozenset(self._schema_of(shard).names):  # decoded at once, if it has to be
                batch = self.record_batch(number)
                arrays = [batch.column(column.name) for column in columns]
            else:
                (found,) = self.batches([Group(number, slice(0), slice(0))])
                arrays = [found.arrow(column) for column in columns]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    def value(self, row: int, column: Column) -> memoryview | None:
        """One value of a column of bytes or text, over mapped memory."""
        batch = int(np.searchsorted(self._index.starts, row, side="right")) - 1
        (columns,) = self.batches([Group(batch, slice(0), slice(0))])
        return columns.value(column, row - int(self._index.starts[batch]))

    def sample(self, row: int, columns: Sequence[Column]) -> dict[str, Any]:
        """The *columns* of one row: what :meth:`read` gives for it, for less."""
        starts = self._index.starts
        number = int(starts.searchsorted(row, side="right")) - 1
        batch = self._table.use(number, self._cache.now())
        if batch is None:
            (batch,) = self.batches([Group(number, slice(0), slice(0))])
        place = row - int(starts[number])
        return {
            column.name: batch.numbers(column)[place].copy()
            if column.kind in NUMBERS
            else batch.objects(column, np.array([place]))[0]
            for column in columns
        }

    def read(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[Column],
    ) -> dict[str, Any]:
        """The *columns* of *rows*, in the order of *rows*.

        Numbers and arrays come as one array ``(len(rows), *shape)``, the others as lists.
        Raises IndexError, IntegrityError, NotFound, DaemonUnavailable.
        """
        rows = self._index.checked(rows)
        found = self._gathered(rows, [column for column in columns if column.kind in NUMBERS])
        others = [column for column in columns if column.name not in found]
        if others:
            found |= self._grouped(rows, others)
        return {column.name: found[column.name] for column in columns}

    def _gathered(self, rows: NDArray[np.int64], columns: Sequence[Column]) -> dict[str, Any]:
        """The *columns* of numbers by one call each; empty if not all that they need is held."""
        found = self._held(rows, columns) if columns else None
        return {} if found is None else found[1]

    def held(
        self, rows: NDArray[np.int64], columns: Sequence[Column]
    ) -> tuple[Any, dict[str, NDArray[Any]]] | None:
        """The *columns* of numbers, and what keeps the memory that they came from. None if not all
        record batches are held."""
        return self._held(self._index.checked(rows), columns)

    def _held(
        self, rows: NDArray[np.int64], columns: Sequence[Column]
    ) -> tuple[Any, dict[str, NDArray[Any]]] | None:
        batches = self._index.of(rows)
        looked = self._table.look(batches, columns, self._cache.now())
        if looked is None:
            return None
        held, origins = looked  # held keeps the memory until all is copied
        found = {}
        for column, begins in zip(columns, origins, strict=True):
            assert column.dtype is not None
            values = gather(begins + rows * column.fixed_bytes, column.fixed_bytes)
            found[column.name] = values.view(column.dtype).reshape(len(rows), *column.shape)
        return held, found

    def _grouped(self, rows: NDArray[np.int64], columns: Sequence[Column]) -> dict[str, Any]:
        """The *columns*, record batch by record batch."""
        outputs = {column: _make_output(column, len(rows)) for column in columns}
        wanted = list(groups(self._index.starts, rows))
        for start in range(0, len(wanted), GROUPS_AT_ONCE):
            some = wanted[start : start + GROUPS_AT_ONCE]
            for group, batch in zip(some, self.batches(some), strict=True):
                for column, output in outputs.items():
                    _fill(column, output, group, batch)
        return {
            column.name: output if column.kind in NUMBERS else output.tolist()
            for column, output in outputs.items()
        }

    def _place(self, shard: int) -> ShardPlace:
        place = self._places.get(shard)
        if place is None:
            where = f"{self._what}, shard {shard}"
            place = ShardPlace(self._shards[shard], self._schema_of(shard), where)
            self._places[shard] = place
        return place

    def batches(self, wanted: Sequence[Group]) -> list[BatchColumns]:
        """The record batch of each of *wanted*."""
        places = [self._index.place(group.batch) for group in wanted]
        shards = sorted({shard for shard, _ in places})
        opened = dict(
            zip(shards, self._cache.open([self._place(shard) for shard in shards]), strict=True)
        )
        return [
            self._cache.batch(
                self._place(shard).ref.blob, opened[shard], index, self._table, group.batch
            )
            for group, (shard, index) in zip(wanted, places, strict=True)
        ]


def _make_output(column: Column, num_rows: int) -> NDArray[Any]:
    if column.kind not in NUMBERS:
        return np.empty(num_rows, dtype=object)
    assert column.dtype is not None
    return np.empty((num_rows, *column.shape), column.dtype)


def _fill(column: Column, output: NDArray[Any], group: Group, batch: BatchColumns) -> None:
    """Put the group's rows of one column where they belong."""
    if column.kind in NUMBERS:
        output[group.target] = batch.numbers(column)[group.source]
        return
    source = group.source
    if isinstance(source, slice):
        source = np.arange(source.start, source.stop)
    values = batch.objects(column, source)
    # fromiter, because an assignment from a list would try to unpack lists of equal length.
    output[group.target] = np.fromiter(values, dtype=object, count=len(values))
