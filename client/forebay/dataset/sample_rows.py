"""Samples of other formats as rows of a schema: nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from forebay.dataset.schema import Column, Schema
from forebay_wire.errors import SchemaMismatch


class SampleRows:
    """Makes samples fit a schema."""

    def __init__(self, schema: Schema) -> None:
        self._nested = [column for column in schema.columns if column.kind == "arrow"]
        self._absent = {column.name: None for column in schema.columns if column.nullable}

    def checked(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """*columns* with null for those that may be missing. SchemaMismatch for a nested value of
        which Arrow would drop something."""
        for column in self._nested:
            _check_nested(columns.get(column.name), column)
        return {**self._absent, **columns}


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
