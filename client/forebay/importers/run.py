"""An import: the parts of a source, written into one version by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from forebay.dataset.parallel import WriteSession
from forebay.dataset.schema import Schema
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
                        raise SchemaMismatch(_where(piece, row, batch, error.message)) from error
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
                reason = f"column {name!r}: {error}"
                raise SchemaMismatch(_where(piece, row, batch, reason)) from error
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


def _where(piece: Piece, row: int, batch: pa.RecordBatch, message: str) -> str:
    """*message* counts rows from *row* of the piece on."""
    last = row + batch.num_rows - 1
    return f"{piece.name}, rows {row} to {last} of it: {message.removeprefix('write_table, ')}"
