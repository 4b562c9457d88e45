"""Arrow tables on their way into a dataset: made to fit its schema, or refused by column."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebay.dataset.schema import Column, Schema
from forebay_wire.errors import SchemaMismatch


def conform(table: pa.Table, schema: Schema) -> pa.Table:
    """*table* with exactly the columns and types of *schema*, without a copy where they agree.

    Dictionaries are decoded, narrower numbers widened, missing floats become NaN. Raises
    :class:`SchemaMismatch` naming the column for everything else.
    """
    came, expected = set(table.column_names), set(schema.names)
    if came != expected or len(table.column_names) != len(came):
        raise SchemaMismatch(
            f"write_table: the table's columns are {', '.join(sorted(table.column_names))}; the "
            f"dataset's are {', '.join(sorted(expected))}"
        )
    columns = [_conform(table.column(column.name), column) for column in schema.columns]
    return pa.Table.from_arrays(columns, schema=schema.arrow)


def _conform(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    try:
        values = _CONVERSIONS[column.kind](values, column)
    except pa.ArrowException as error:
        raise _mismatch(values, column, str(error)) from error
    if values.null_count and not column.nullable:
        row = int(pc.index(values.is_null(), True).as_py())
        raise _missing(column, f"row {row} is missing, and the type takes no missing values")
    return values


def _mismatch(values: pa.ChunkedArray, column: Column, reason: str) -> SchemaMismatch:
    return SchemaMismatch(
        f"write_table, column {column.name!r}: expected {column.text}, got {values.type}: {reason}"
    )


def _missing(column: Column, reason: str) -> SchemaMismatch:
    return SchemaMismatch(f"write_table, column {column.name!r} ({column.text}): {reason}")


def _numbers(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    if not _widens(values.type, column):
        raise _mismatch(values, column, "cast the column first")
    values = values.cast(column.arrow_type)
    if values.null_count and column.dtype is not None and column.dtype.kind == "f":
        missing = pa.scalar(np.array(np.nan, dtype=column.dtype)[()], type=column.arrow_type)
        values = pc.fill_null(values, missing)
    return values


def _widens(kind: pa.DataType, column: Column) -> bool:
    if kind == column.arrow_type or pa.types.is_null(kind):
        return True
    if pa.types.is_boolean(kind) or column.dtype is None or column.dtype.kind == "b":
        return False
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return numeric and np.can_cast(np.dtype(kind.to_pandas_dtype()), column.dtype, "safe")


def _arrays(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    if values.type == column.arrow_type:
        return values
    kind = values.type
    if isinstance(kind, pa.BaseExtensionType):
        raise _mismatch(values, column, "other shape or element type")
    if not hasattr(kind, "value_type") or kind.value_type != column.arrow_type.value_type:
        raise _mismatch(values, column, "other element type")
    storage = column.arrow_type.storage_type
    chunks = [
        pa.ExtensionArray.from_storage(column.arrow_type, chunk.cast(storage))
        for chunk in values.chunks
    ]
    return pa.chunked_array(chunks, type=column.arrow_type)


def _varying(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    same_family = {
        "string": ("string", "large_string", "string_view"),
        "binary": ("binary", "large_binary", "binary_view", "fixed_size_binary"),
        "list": ("list", "large_list", "fixed_size_list"),
    }[column.kind]
    if not any(getattr(pa.types, f"is_{name}")(values.type) for name in (*same_family, "null")):
        raise _mismatch(values, column, "another kind of value")
    values = values.cast(column.arrow_type)
    if column.kind == "list" and any(chunk.flatten().null_count for chunk in values.chunks):
        raise _missing(column, "an element of a list is missing")
    return values


def _same(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    return values.cast(column.arrow_type)


_CONVERSIONS = {
    "scalar": _numbers,
    "array": _arrays,
    "string": _varying,
    "binary": _varying,
    "list": _varying,
    "arrow": _same,
}
