"""What the columns of a dataset hold: counts, extremes, means, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forebay.dataset.schema import Column

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset


@dataclass
class ColumnStatistics:
    """One column. Numbers are those of all elements of arrays; of text, bytes and lists they are
    of the lengths (characters, bytes, elements)."""

    of: str
    """"values", "lengths", or "nothing" for columns of other types."""
    num_rows: int = 0
    num_missing: int = 0
    """Nulls, and values that are no number (NaN)."""
    num_values: int = 0
    """What the following are of: elements, or lengths."""
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    """Of the population."""
    _sum_squares: float = 0.0
    """Of the distances from the mean."""

    def add(self, values: NDArray[Any]) -> None:
        """Take more *values* in (method of Chan, Golub and LeVeque, 1979)."""
        if not len(values):
            return
        low, high = values.min().item(), values.max().item()
        self.min = low if self.min is None else min(self.min, low)
        self.max = high if self.max is None else max(self.max, high)
        numbers = values.astype(np.float64, copy=False)
        mean = float(numbers.mean())
        squares = float(np.square(numbers - mean).sum())
        before, total = self.num_values, self.num_values + len(values)
        distance = mean - (self.mean or 0.0)
        self.mean = (self.mean or 0.0) + distance * len(values) / total
        self._sum_squares += squares + distance**2 * before * len(values) / total
        self.num_values = total
        self.std = math.sqrt(self._sum_squares / total)

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def statistics(
    dataset: Dataset,
    columns: Sequence[str] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, ColumnStatistics]:
    """Of *columns* (default: all) of all rows of a version or split, a record batch at a time."""
    wanted = dataset.columns(columns)
    found = {column.name: ColumnStatistics(_what(column)) for column in wanted}
    done = 0
    for batch in _batches(dataset):
        for column in wanted:
            _take(found[column.name], batch.column(column.name), column)
        done += batch.num_rows
        progress(done, len(dataset))
    return found


def _batches(dataset: Dataset) -> Iterator[Any]:
    if dataset.selection is None:
        yield from dataset.iter_batches()
        return
    rows = dataset.rows_at(np.arange(len(dataset), dtype=np.int64))
    rows = np.sort(rows)
    start = 0
    for batch in dataset.whole().iter_batches():
        first, last = np.searchsorted(rows, [start, start + batch.num_rows])
        if last > first:
            yield batch.take(pa.array(rows[first:last] - start))
        start += batch.num_rows


def _what(column: Column) -> str:
    if column.kind in ("scalar", "array"):
        return "values"
    return "lengths" if column.kind in ("string", "binary", "list") else "nothing"


def _take(found: ColumnStatistics, values: pa.Array, column: Column) -> None:
    found.num_rows += len(values)
    found.num_missing += values.null_count
    if found.of == "nothing":
        return
    values = values.drop_null()
    if column.kind == "string":
        values = pc.utf8_length(values)
    elif column.kind == "binary":
        values = pc.binary_length(values)
    elif column.kind == "list":
        values = pc.list_value_length(values)
    elif column.kind == "array":
        values = values.storage.flatten()
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind == "f":
        is_number = ~np.isnan(numbers)
        found.num_missing += int(len(numbers) - np.count_nonzero(is_number))
        numbers = numbers[is_number]
    found.add(numbers.astype(np.uint8) if numbers.dtype.kind == "b" else numbers)
