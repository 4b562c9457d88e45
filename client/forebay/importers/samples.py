"""Samples that come one by one, as dicts of Python values, turned into record batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from forebay.dataset.rows import RowBuffer
from forebay.dataset.schema import Column, Schema, infer
from forebay.importers.piece import Block, Options
from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.limits import MIB

BLOCK_BYTES: Final = 4 * MIB
FIRST_SAMPLES: Final = 256
"""Types are inferred from so many, or from as many as make a block."""

Sample = tuple[str, Mapping[str, Any], int]
"""Its name for messages, its columns, and the bytes of the piece that were read until its end."""

NOTHING: Final[Mapping[str, Any]] = {}


def blocks(
    samples: Iterable[Sample],
    schema: Schema | None,
    options: Options,
    where: str,
    hints: Mapping[str, Any] = NOTHING,
) -> Iterator[Block]:
    """*samples* as blocks; text, bytes and nested values that are missing are null.

    *hints* are types that the format tells. SchemaMismatch names *where*, sample and column.
    """
    if schema is None:
        first, samples = _ahead(samples)
        if not first:
            return
        schema = _inferred(first, {**hints, **options.types}, where)
    buffer = RowBuffer(schema, BLOCK_BYTES)
    nested = [column for column in schema.columns if column.kind == "arrow"]
    absent = {column.name: None for column in schema.columns if column.nullable}
    done = 0
    for number, (name, columns, until) in enumerate(samples, 1):
        try:
            for column in nested:
                _check_nested(columns.get(column.name), column)
            values, num_bytes = buffer.convert({**absent, **columns}, number)
        except SchemaMismatch as error:
            raise SchemaMismatch(f"{where}, sample {name}: {error.message}") from error
        if buffer.num_rows and buffer.num_bytes + num_bytes > BLOCK_BYTES:
            yield Block(buffer.batch(), done)
            buffer = RowBuffer(schema, BLOCK_BYTES)  # the block keeps the memory of the old one
        buffer.add(values, num_bytes)
        done = until
    if buffer.num_rows:
        yield Block(buffer.batch(), done)


def parse_json(data: bytes | memoryview, where: str) -> Any:
    """A JSON value; InvalidRequest naming *where*."""
    try:
        return json.loads(bytes(data))
    except ValueError as error:
        raise InvalidRequest(f"{where} is no JSON: {error}") from error


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


def _inferred(first: list[Sample], given: Mapping[str, Any], where: str) -> Schema:
    """The schema of the first samples: columns in the order in which they come up."""
    seen: dict[str, list[Any]] = {}
    for _, sample, _ in first:
        for name, value in sample.items():
            seen.setdefault(name, []).append(value)
    columns: list[Column] = []
    for name, values in seen.items():
        there = [value for value in values if value is not None]
        try:
            column = Schema.of({name: given.get(name) or _type_of(name, there)})[name]
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


def _check_nested(value: Any, column: Column) -> None:
    problem = _misfit(value, column.arrow_type)
    if problem:
        raise SchemaMismatch(
            f"column {column.name!r}: {problem}. It is {column.arrow_type}, as the first samples "
            f"say; --type {column.name}=string keeps the text as it is"
        )


def _misfit(value: Any, kind: pa.DataType) -> str:
    """Why *value* would lose something as *kind*; empty: it fits. Arrow drops unknown keys."""
    if value is None:
        return ""
    if pa.types.is_struct(kind) and isinstance(value, dict):
        known = {kind.field(index).name: kind.field(index).type for index in range(len(kind))}
        for key, inner in value.items():
            if key not in known:
                return f"the key {key!r} is new"
            problem = _misfit(inner, known[key])
            if problem:
                return f"{key}: {problem}"
        return ""
    if pa.types.is_list(kind) and isinstance(value, list):
        return next(filter(None, (_misfit(one, kind.value_type) for one in value)), "")
    if isinstance(value, (dict, list)) or pa.types.is_nested(kind):
        return f"{type(value).__name__} where {kind} was expected"
    if isinstance(value, str) != pa.types.is_string(kind):
        return f"{value!r:.60} where {kind} was expected"
    return ""
