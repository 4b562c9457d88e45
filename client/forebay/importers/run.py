"""An import: the parts of a source, written into one version by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from forebay.dataset.parallel import WriteSession
from forebay.dataset.schema import Column, Schema
from forebay.dataset.tables import conform
from forebay.importers.crew import Crew
from forebay.importers.piece import Options, Part, Piece
from forebay_wire.errors import SchemaMismatch

Progress = Callable[[int, int], object]
"""Is told how many bytes of a source are done, and how many there are."""


@dataclass(frozen=True)
class PartWork:
    """Writes parts by number; picklable."""

    session: WriteSession
    parts: tuple[Part, ...]
    schema: Schema
    options: Options

    def __call__(self, number: int, report: Callable[[int], None]) -> None:
        part = self.parts[number]
        before = 0
        with self.session.part(part.name) as writer:
            for piece in part.pieces:
                row = 0
                for block in piece.read(self.schema, self.options):
                    batch = self._fitting(piece, block.batch, row)
                    try:
                        writer.write_table(batch)
                    except SchemaMismatch as error:
                        raise _blamed(
                            piece, row, batch, self.schema, self.options, error
                        ) from error
                    row += batch.num_rows
                    report(before + min(block.done_bytes, piece.num_bytes))
                before += piece.num_bytes
        report(part.num_bytes)

    def _fitting(self, piece: Piece, batch: pa.RecordBatch, row: int) -> pa.RecordBatch:
        """*batch* with the types that the user asked for."""
        for name in self.options.types:
            index = batch.schema.get_field_index(name)
            wanted = self.schema[name].arrow_type
            if index < 0 or batch.column(index).type == wanted:
                continue
            try:
                column = batch.column(index).cast(wanted)
            except pa.ArrowException as error:
                last = row + batch.num_rows - 1
                raise SchemaMismatch(
                    f"{piece.name}, rows {row} to {last} of it, column {name!r}: {error}"
                ) from error
            batch = batch.set_column(index, name, column)
        return batch


def write_parts(
    session: WriteSession,
    parts: Sequence[Part],
    schema: Schema,
    options: Options,
    *,
    jobs: int,
    progress: Progress | None = None,
) -> int:
    """Write those of *parts* that do not count yet; how many counted already.

    The caller commits. Raises what the first part that fails raises.
    """
    work = PartWork(session, tuple(parts), schema, options)
    counted = session.parts()
    missing = [number for number, part in enumerate(parts) if part.name not in counted]
    total = sum(part.num_bytes for part in parts)
    before = total - sum(parts[number].num_bytes for number in missing)
    tell: Any = progress or (lambda done_bytes, total_bytes: None)
    tell(before, total)
    if jobs > 1 and len(missing) > 1:
        crew = Crew(work, min(jobs, len(missing)), len(parts))
        for _ in crew.run(missing):
            tell(before + crew.done_bytes, total)
    else:
        for number in missing:
            work(number, partial(_tell, tell, before, total))
            before += parts[number].num_bytes
    tell(total, total)
    return len(parts) - len(missing)


def _tell(tell: Progress, before: int, total: int, done: int) -> None:
    tell(before + done, total)


def _blamed(
    piece: Piece,
    row: int,
    batch: pa.RecordBatch,
    schema: Schema,
    options: Options,
    error: SchemaMismatch,
) -> SchemaMismatch:
    """*error* with the row that is to blame, of *batch*, which begins at *row* of the piece."""
    table = pa.Table.from_batches([batch])
    if _fits(table.slice(0, 0), schema):
        low, high = 0, batch.num_rows  # the first so many rows fit; so many do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _fits(table.slice(0, middle), schema) else (low, middle)
        where = _place(piece, row + high - 1, options)
        last = table.slice(high - 1, 1)
        for name in schema.names:
            advice = _about_missing(last, schema[name])
            if advice:
                return SchemaMismatch(f"{where}, column {name!r}: {advice}")
        try:
            conform(last, schema)
        except SchemaMismatch as found:
            reason = found.message.removeprefix("write_table, ").replace(": row 0 is", ": it is")
            return SchemaMismatch(f"{where}: {reason}")
        return SchemaMismatch(f"{where}: {error.message}")
    return SchemaMismatch(f"{piece.name}: {error.message.removeprefix('write_table, ')}")


def _place(piece: Piece, row: int, options: Options) -> str:
    """Where a row of *piece* is: in its own words, if it has any."""
    own: Callable[[int, Options], str] | None = getattr(piece, "where", None)
    return f"{piece.name}, row {row} of it" if own is None else own(row, options)


def _about_missing(row: pa.Table, column: Column) -> str:
    """What is missing in the only row of *row*, and what to do; empty: nothing."""
    if column.nullable or column.name not in row.column_names:
        return ""
    if not row.column(column.name).null_count or _takes_missing(column):
        return ""
    advice = "leave such rows out, or write a value"
    if column.kind == "scalar" and column.dtype is not None and column.dtype.kind in "iu":
        advice = f"give --type {column.name}=float64, where it becomes NaN, or a value"
    return f"the value is missing, which {column.text} has no room for: {advice}"


def _takes_missing(column: Column) -> bool:
    return column.kind == "scalar" and column.dtype is not None and column.dtype.kind == "f"


def _fits(table: pa.Table, schema: Schema) -> bool:
    try:
        conform(table, schema)
    except SchemaMismatch:
        return False
    return True
