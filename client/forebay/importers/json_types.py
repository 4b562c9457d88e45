"""Types of the values of JSON lines: whole numbers stay exact, texts that look like dates texts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

MAX_EXACT: Final = 2**53
"""Whole numbers up to here are kept by float64."""

Numbered = list[tuple[int, Any]]
"""Values, each with the number of its line."""


class Inexact(Exception):
    """A whole number that its column's type would round."""

    def __init__(self, line: int, column: str, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.column = column


def numbered_rows(lines: bytes) -> Numbered:
    """The objects in *lines*, by line from 0. ValueError if there is one that is no JSON."""
    return [
        (number, json.loads(line))
        for number, line in enumerate(lines.split(b"\n"))
        if line.strip(b" \t\r")
    ]


def sure_schema(found: pa.Schema, rows: Numbered, given: Collection[str]) -> pa.Schema:
    """*found* for *rows*, from which Arrow inferred it, with types that change no value; those of
    the columns *given* stay. :class:`Inexact` if there is no such type."""
    return pa.schema(
        one
        if one.name in given
        else pa.field(one.name, _sure(one.type, _of(rows, one.name), one.name))
        for one in found
    )


def check_exact(table: pa.Table, lines: bytes, given: Collection[str]) -> None:
    """:class:`Inexact` if a whole number in *lines* was rounded in *table*, except in the columns
    *given*."""
    suspects = [
        name
        for name, column in zip(table.column_names, table.columns, strict=True)
        if name not in given and any(_has_large_floats(chunk) for chunk in column.chunks)
    ]
    rows = numbered_rows(lines) if suspects else []
    for name in suspects:
        for line, value, path in _leaves(table.schema.field(name).type, _of(rows, name), name):
            if _is_large(value):
                raise _rounded(line, value, path)


def _sure(kind: pa.DataType, values: Numbered, path: str) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_floating(kind):
        return _sure_number(kind, values, path)
    if pa.types.is_struct(kind):
        return pa.struct(
            [
                pa.field(one.name, _sure(one.type, _of(values, one.name), f"{path}.{one.name}"))
                for one in kind
            ]
        )
    if pa.types.is_list(kind):
        return pa.list_(_sure(kind.value_type, _elements(values), path))
    return kind


def _sure_number(kind: pa.DataType, values: Numbered, path: str) -> pa.DataType:
    large = [(line, value) for line, value in values if _is_large(value)]
    if not large:
        return kind
    if any(isinstance(value, float) for _, value in values):
        raise _rounded(*large[0], path)
    has_negative = any(value < 0 for _, value in values)
    for line, value in large:
        if value < -(2**63) or value >= (2**63 if has_negative else 2**64):
            beside = " beside numbers below 0" if has_negative and 0 < value < 2**64 else ""
            raise Inexact(
                line,
                path,
                f"no integer type holds {value}{beside}: write such numbers as strings, or have "
                f"them rounded with --type {_column(path)}=float64",
            )
    return pa.int64() if has_negative else pa.uint64()


def _rounded(line: int, value: int, path: str) -> Inexact:
    return Inexact(
        line,
        path,
        f"float64, the type of a column that also holds fractions, would round {value}: write such "
        f"numbers as strings, or have them rounded with --type {_column(path)}=float64",
    )


def _is_large(value: Any) -> bool:
    return type(value) is int and abs(value) > MAX_EXACT


def _column(path: str) -> str:
    return path.partition(".")[0]


def _of(values: Numbered, key: str) -> Numbered:
    found = [(line, value.get(key)) for line, value in values if isinstance(value, dict)]
    return [(line, value) for line, value in found if value is not None]


def _elements(values: Numbered) -> Numbered:
    return [
        (line, one)
        for line, value in values
        if isinstance(value, list)
        for one in value
        if one is not None
    ]


def _leaves(kind: pa.DataType, values: Numbered, path: str) -> Iterator[tuple[int, Any, str]]:
    """Line, value and path of what is a float in *kind*."""
    if pa.types.is_struct(kind):
        for one in kind:
            yield from _leaves(one.type, _of(values, one.name), f"{path}.{one.name}")
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(kind.value_type, _elements(values), path)
    elif pa.types.is_floating(kind):
        yield from ((line, value, path) for line, value in values)


def _has_large_floats(values: pa.Array) -> bool:
    kind = values.type
    if pa.types.is_struct(kind):
        return any(_has_large_floats(one) for one in values.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_large_floats(values.flatten())
    if not pa.types.is_floating(kind):
        return False
    most = pc.max(pc.abs(values)).as_py()
    return most is not None and most >= MAX_EXACT
