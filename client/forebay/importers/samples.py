"""Samples that come one by one, as dicts of Python values, turned into record batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from forebay.dataset.rows import RowBuffer
from forebay.dataset.sample_rows import SampleRows
from forebay.dataset.schema import Column, Schema, infer
from forebay.importers.piece import Block, Options
from forebay_wire.errors import SchemaMismatch
from forebay_wire.limits import MIB

BLOCK_BYTES: Final = 4 * MIB
FIRST_SAMPLES: Final = 256
"""Types are inferred from so many, or from as many as make a block."""

Sample = tuple[str, Mapping[str, Any], int]
"""Its name for messages, its columns, and the bytes of the piece that were read until its end."""


def blocks(
    samples: Iterable[Sample],
    schema: Schema | None,
    options: Options,
    where: str,
    hint: Callable[[str], Any] = lambda name: None,
) -> Iterator[Block]:
    """*samples* as blocks; text, bytes and nested values that are missing are null.

    *hint* is the type of a column that the format tells, if it does. SchemaMismatch names
    *where*, sample and column.
    """
    if schema is None:
        first, samples = _ahead(samples)
        if not first:
            return
        schema = _inferred(first, lambda name: options.types.get(name) or hint(name), where)
    buffer = RowBuffer(schema, BLOCK_BYTES)
    rows = SampleRows(schema)
    done = 0
    for number, (name, columns, until) in enumerate(samples, 1):
        try:
            values, num_bytes = buffer.convert(rows.checked(columns), number)
        except SchemaMismatch as error:
            raise SchemaMismatch(f"{where}, sample {name}: {error.message}") from error
        if buffer.num_rows and buffer.num_bytes + num_bytes > BLOCK_BYTES:
            yield Block(buffer.batch(), done)
            buffer = RowBuffer(schema, BLOCK_BYTES)  # the block keeps the memory of the old one
        buffer.add(values, num_bytes)
        done = until
    if buffer.num_rows:
        yield Block(buffer.batch(), done)


def _ahead(samples: Iterable[Sample]) -> tuple[list[Sample], Iterator[Sample]]:
    """Some samples, and all of them."""
    remaining = iter(samples)
    first: list[Sample] = []
    for sample in remaining:
        first.append(sample)
        if len(first) >= FIRST_SAMPLES or sample[2] >= BLOCK_BYTES:
            break

    def both() -> Iterator[Sample]:
        yield from first
        yield from remaining

    return first, both()


def _inferred(first: list[Sample], given: Callable[[str], Any], where: str) -> Schema:
    """The schema of the first samples: columns in the order in which they come up."""
    seen: dict[str, list[Any]] = {}
    for _, sample, _ in first:
        for name, value in sample.items():
            seen.setdefault(name, []).append(value)
    columns: list[Column] = []
    for name, values in seen.items():
        there = [value for value in values if value is not None]
        try:
            column = Schema.of({name: given(name) or _type_of(name, there)})[name]
        except (pa.ArrowException, SchemaMismatch) as error:
            raise SchemaMismatch(
                f"{where}, column {name!r}: {error}; --type {name}=binary keeps its bytes"
            ) from error
        if column.kind in ("scalar", "array") and len(there) < len(first):
            raise SchemaMismatch(
                f"{where}, column {name!r}: only {len(there)} of the first {len(first)} samples "
                f"have it, and {column.text} cannot be missing"
            )
        columns.append(replace(column, nullable=column.kind not in ("scalar", "array")))
    return Schema(tuple(columns))


def _type_of(name: str, values: list[Any]) -> Any:
    if not values:
        raise SchemaMismatch(
            f"none of the first samples has a value: give its type (--type {name}=TYPE)"
        )
    value = values[0]
    if isinstance(value, np.ndarray) and value.ndim == 1 and _differ_in_length(values):
        return f"list[{value.dtype.name}]"
    if isinstance(value, (dict, list)):
        return pa.array(values).type
    return infer(name, value)


def _differ_in_length(values: list[Any]) -> bool:
    return len({value.shape for value in values if isinstance(value, np.ndarray)}) > 1
