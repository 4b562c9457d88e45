"""Samples on their way into Arrow: checked one by one, collected by column, turned over at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.schema import Column, Schema, as_numpy, describe
from forebay_wire.errors import SchemaMismatch

MAX_ROWS_AHEAD: Final = 1 << 16
"""Rows of a buffer at its start; it doubles when narrow rows need more."""


class RowBuffer:
    """Collects samples for one record batch, copying each value once. Not thread-safe.

    Numbers and arrays go into one numpy array a column, which every batch uses again.
    """

    def __init__(self, schema: Schema, batch_bytes: int) -> None:
        self._schema = schema
        self._names = frozenset(schema.names)
        row_bytes = sum(column.fixed_bytes for column in schema.columns)
        rows = min(MAX_ROWS_AHEAD, batch_bytes // max(row_bytes, 1) + 1)
        self._stores = [make_store(column, rows) for column in schema.columns]
        self.num_rows = 0
        self.num_bytes = 0

    def convert(self, sample: Mapping[str, Any], number: int) -> tuple[list[Any], int]:
        """*sample* as values to :meth:`add`, in column order, and their bytes.

        Raises :class:`SchemaMismatch` naming sample *number*, the column, what came and what was
        expected; nothing is kept then.
        """
        if sample.keys() != self._names:
            raise SchemaMismatch(_wrong_names(number, set(sample), set(self._names)))
        values = []
        num_bytes = 0
        for store in self._stores:
            value = sample[store.column.name]
            try:
                value, size = store.convert(value)
            except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
                raise SchemaMismatch(
                    f"sample number {number}, column {store.column.name!r}: expected "
                    f"{store.column.text}, got {_describe(value)}; nothing of this sample was kept"
                ) from error
            values.append(value)
            num_bytes += size
        return values, num_bytes

    def add(self, values: list[Any], num_bytes: int) -> None:
        """Append one converted sample."""
        for store, value in zip(self._stores, values, strict=True):
            store.put(self.num_rows, value)
        self.num_rows += 1
        self.num_bytes += num_bytes

    def batch(self) -> pa.RecordBatch:
        """What was collected; valid until the next :meth:`add` after :meth:`clear`."""
        arrays = [store.arrow(self.num_rows) for store in self._stores]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema.arrow)

    def clear(self) -> None:
        """Forget the rows and keep the memory."""
        for store in self._stores:
            store.clear()
        self.num_rows = self.num_bytes = 0


def _wrong_names(number: int, came: set[str], expected: set[str]) -> str:
    problems = []
    if expected - came:
        problems.append(f"lacks {', '.join(sorted(map(repr, expected - came)))}")
    if came - expected:
        problems.append(f"has unknown {', '.join(sorted(map(repr, came - expected)))}")
    return (
        f"sample number {number} {' and '.join(problems)}; the schema's columns are "
        f"{', '.join(sorted(map(repr, expected)))}"
    )


def _describe(value: Any) -> str:
    try:
        return describe(value)
    except SchemaMismatch:
        return f"a tensor of {value.dtype}, which numpy does not have"


class _NumberStore:
    """Numbers and arrays of one shape: one numpy array."""

    def __init__(self, column: Column, rows: int) -> None:
        assert column.dtype is not None
        self.column = column
        self._dtype = column.dtype
        self._fixed_bytes = column.fixed_bytes
        self._bounds = (0, -1)
        if column.dtype.kind in "iu":
            bounds = np.iinfo(column.dtype)
            self._bounds = (int(bounds.min), int(bounds.max))
        self._values: NDArray[Any] = np.empty((rows, *column.shape), dtype=column.dtype)

    def convert(self, value: Any) -> tuple[Any, int]:
        if type(value) is np.ndarray or not isinstance(value, (bool, int, float, list, tuple)):
            value = as_numpy(value)
            if not isinstance(value, (np.ndarray, np.generic)):
                raise TypeError("not a number or an array")
            if value.shape != self.column.shape or not self._takes(value.dtype):
                raise TypeError("other shape or element type")
            return value, self._fixed_bytes
        return self._from_python(value), self._fixed_bytes

    def _takes(self, dtype: np.dtype[Any]) -> bool:
        """Arrays must have the very type; a single number may come in a narrower one."""
        if dtype == self._dtype:
            return True
        return not self.column.shape and np.can_cast(dtype, self._dtype, "safe")

    def _from_python(self, value: Any) -> Any:
        low, high = self._bounds
        if type(value) is int and not self.column.shape and low <= value <= high:
            return value
        natural = np.asarray(value)
        kind = self._dtype.kind
        if natural.shape != self.column.shape or natural.dtype.kind not in _FROM_PYTHON[kind]:
            raise TypeError("other shape or kind of number")
        if kind in "iu" and natural.size and (natural.min() < low or natural.max() > high):
            raise OverflowError("out of range")
        return natural.astype(self._dtype)

    def put(self, row: int, value: Any) -> None:
        if row == len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
        self._values[row] = value

    def arrow(self, num_rows: int) -> pa.Array:
        values = pa.array(self._values[:num_rows].reshape(-1))
        if self.column.kind == "scalar":
            return values
        size = int(np.prod(self.column.shape))
        storage = pa.FixedSizeListArray.from_arrays(values, size)
        return pa.ExtensionArray.from_storage(self.column.arrow_type, storage)

    def clear(self) -> None:
        pass


_FROM_PYTHON: Final = {"b": "b", "i": "iu", "u": "iu", "f": "fiu"}
"""Kind of column to the kinds of Python numbers that it takes (a bool is no number)."""


class _ObjectStore:
    """Values of varying size, kept as Python objects until the batch is made."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self._values: list[Any] = []

    def convert(self, value: Any) -> tuple[Any, int]:
        if value is None:
            if not self.column.nullable:
                raise TypeError("the column takes no missing values")
            return None, 0
        return self._convert(value)

    def _convert(self, value: Any) -> tuple[Any, int]:
        scalar = pa.array([value], type=self.column.arrow_type)
        return value, scalar.nbytes

    def put(self, row: int, value: Any) -> None:
        assert row == len(self._values)
        self._values.append(value)

    def arrow(self, num_rows: int) -> pa.Array:
        assert num_rows == len(self._values)
        return pa.array(self._values, type=self.column.arrow_type)

    def clear(self) -> None:
        self._values.clear()


class _TextStore(_ObjectStore):
    def _convert(self, value: Any) -> tuple[Any, int]:
        if not isinstance(value, str):
            raise TypeError("not text")
        return value, len(value.encode()) + 4


class _BytesStore(_ObjectStore):
    def _convert(self, value: Any) -> tuple[Any, int]:
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError("not bytes")
        kept = value if isinstance(value, bytes) else bytes(value)
        return kept, len(kept) + 4


class _ListStore(_ObjectStore):
    """Flat lists of numbers: kept as numpy arrays, joined at once."""

    def _convert(self, value: Any) -> tuple[Any, int]:
        dtype = self.column.dtype
        assert dtype is not None
        came = as_numpy(value)
        found = np.asarray(came)
        if isinstance(came, (list, tuple)):
            fits = not found.size or found.dtype.kind in _FROM_PYTHON[dtype.kind]
        else:
            fits = isinstance(came, np.ndarray) and np.can_cast(found.dtype, dtype, "safe")
        if found.ndim != 1 or not fits:
            raise TypeError("not a flat list of such numbers")
        if dtype.kind in "iu" and found.size and found.dtype != dtype:
            bounds = np.iinfo(dtype)
            if found.min() < bounds.min or found.max() > bounds.max:
                raise OverflowError("out of range")
        return np.array(found, dtype=dtype), found.size * dtype.itemsize + 4

    def arrow(self, num_rows: int) -> pa.Array:
        lengths = [0 if value is None else len(value) for value in self._values]
        offsets = np.zeros(num_rows + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        parts = [value for value in self._values if value is not None]
        joined = np.concatenate(parts) if parts else np.empty(0, dtype=self.column.dtype)
        mask = pa.array([value is None for value in self._values])
        return pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(joined), type=self.column.arrow_type, mask=mask
        )


def make_store(column: Column, rows: int) -> _NumberStore | _ObjectStore:
    """Where the values of *column* are collected: *rows* of them at first."""
    if column.kind in ("scalar", "array"):
        return _NumberStore(column, rows)
    kinds = {"string": _TextStore, "binary": _BytesStore, "list": _ListStore}
    return kinds.get(column.kind, _ObjectStore)(column)
