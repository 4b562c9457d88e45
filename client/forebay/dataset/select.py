"""Chosen rows on their way into a stored selection: runs of rows, or the rows themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from blake3 import blake3
from numpy.typing import NDArray

from forebay.dataset.stored_rows import MAX_SHORT_ROW, rows_of_runs, schema_of
from forebay.dataset.write import DatasetWriter
from forebay_wire.limits import KIB, MIB
from forebay_wire.selection import POSITION, ROW, ROWS, RUNS
from forebay_wire.v1 import datasets_pb2

if TYPE_CHECKING:
    from forebay.dataset.dataset import Control, Dataset

BLOB_BYTES: Final = 16 * MIB
"""Row numbers of one blob, which is one record batch: a reader that jumps about in 10^8 rows looks
into 25 of them."""

OVERHEAD_BYTES: Final = 64 * KIB
"""Room for the rest of an Arrow IPC file of two columns."""

MAX_RUNS: Final = 1 << 20
"""Readers hold all runs of a selection: 16 MiB. With more it is stored row by row."""

RUN_BYTES: Final = 16

BLOCK_ROWS: Final = 1 << 20
"""Rows that are looked at at once."""


class RowsWriter(DatasetWriter):
    """Writes the blobs of one stored selection; whoever defines it names them."""

    def __init__(self, control: Control, of: Dataset, encoding: str, num_bytes: int) -> None:
        """*num_bytes*: of all rows or runs, or more."""
        batch_bytes = max(1, min(BLOB_BYTES, num_bytes))
        super().__init__(
            control.channel,
            control.transfer,
            of.name,
            schema=schema_of(encoding, of.num_rows),
            shard_bytes=batch_bytes + OVERHEAD_BYTES,
            batch_bytes=batch_bytes,
        )

    def seal(self) -> list[datasets_pb2.ShardCommit]:
        """The blobs, durable, in sessions that live until :meth:`abort`."""
        self._seal_all()
        return self._commits

    def end(self, version: int) -> None:
        """Let go; the sessions are named by a selection of *version*."""
        self.version = version
        self.abort()


@dataclass(frozen=True)
class Chosen:
    """A selection whose rows are sealed, with the writer that holds their sessions."""

    writer: RowsWriter
    message: datasets_pb2.NewSelection


class RowsBuilder:
    """Takes rows in ascending order, in pieces. Not thread-safe.

    Holds at most :data:`MAX_RUNS` runs or one blob's worth of rows, however many come.
    """

    def __init__(self, control: Control, of: Dataset, name: str) -> None:
        self.name = name
        self.num_rows = 0
        self._control = control
        self._of = of
        self._shard_stops = of.shard_starts[1:]
        self._counts: NDArray[np.int64] = np.zeros(len(self._shard_stops), dtype=np.int64)
        self._digest = blake3()
        self._runs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        """First positions and first rows."""
        self._num_runs = 0
        self._next_row = -1
        self._width = 4 if of.num_rows <= MAX_SHORT_ROW else 8
        self._writer: RowsWriter | None = None
        """Of rows, once there are too many runs."""
        self._pending: list[NDArray[np.int64]] = []

    @property
    def digest(self) -> str:
        """BLAKE3 of the rows so far, as u64."""
        return self._digest.hexdigest()

    def add(self, rows: NDArray[np.int64]) -> None:
        """Choose *rows*, each above all before it."""
        for start in range(0, len(rows), BLOCK_ROWS):
            self._add_block(rows[start : start + BLOCK_ROWS])

    def _add_block(self, rows: NDArray[np.int64]) -> None:
        self._digest.update(rows.astype("<u8").tobytes())
        shards = np.searchsorted(self._shard_stops, rows, side="right")
        first = int(shards[0])
        counted = np.bincount(shards - first)
        self._counts[first : first + len(counted)] += counted
        if self._writer is None:
            self._add_runs(rows)
        else:
            self._write(self._writer, rows)
        self.num_rows += len(rows)
        if self._writer is None and self._num_runs > MAX_RUNS:
            self._writer = self._write_rows(self._of.num_rows)

    def _add_runs(self, rows: NDArray[np.int64]) -> None:
        before = np.concatenate(([self._next_row - 1], rows[:-1]))
        firsts = np.flatnonzero(rows - before != 1)
        self._runs.append((firsts + self.num_rows, rows[firsts]))
        self._num_runs += len(firsts)
        self._next_row = int(rows[-1]) + 1

    def finish(self, definition_json: str) -> Chosen:
        """Seal the rows: durable on return. There is at least one."""
        encoding = ROWS
        if self._writer is not None:
            writer = self._writer
            self._flush(writer, 1)
        elif self._num_runs * RUN_BYTES < self.num_rows * self._width:
            encoding, writer = RUNS, self._write_runs()
        else:
            writer = self._write_rows(self.num_rows)
            self._flush(writer, 1)
        self._writer = writer
        return Chosen(
            writer,
            datasets_pb2.NewSelection(
                name=self.name,
                num_rows=self.num_rows,
                encoding=encoding,
                shards=writer.seal(),
                counts=self._counts.tolist(),
                digest=self.digest,
                definition_json=definition_json,
            ),
        )

    def abort(self) -> None:
        """Drop what was uploaded. Idempotent."""
        if self._writer is not None:
            self._writer.abort()

    # Into blobs.

    def _joined_runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        positions = np.concatenate([one for one, _ in self._runs])
        return positions, np.concatenate([rows for _, rows in self._runs])

    def _write_runs(self) -> RowsWriter:
        positions, first_rows = self._joined_runs()
        writer = RowsWriter(self._control, self._of, RUNS, len(positions) * RUN_BYTES)
        _write_columns(writer, {POSITION: positions, ROW: first_rows})
        return writer

    def _write_rows(self, most: int) -> RowsWriter:
        """A writer that was given all rows so far; there will be *most* at most."""
        positions, first_rows = self._joined_runs()
        self._runs.clear()
        writer = RowsWriter(self._control, self._of, ROWS, most * self._width)
        for start in range(0, self.num_rows, BLOCK_ROWS):
            places = np.arange(start, min(start + BLOCK_ROWS, self.num_rows), dtype=np.int64)
            self._write(writer, rows_of_runs(positions, first_rows, places))
        return writer

    def _write(self, writer: RowsWriter, rows: NDArray[np.int64]) -> None:
        self._pending.append(rows)
        self._flush(writer, BLOB_BYTES // self._width)

    def _flush(self, writer: RowsWriter, least: int) -> None:
        """Write whole blobs, and with *least* 1 what remains as well."""
        while (there := sum(len(rows) for rows in self._pending)) >= least:
            joined = np.concatenate(self._pending)
            size = min(there, BLOB_BYTES // self._width)
            _write_columns(writer, {ROW: joined[:size]})
            self._pending = [joined[size:]]


def _write_columns(writer: RowsWriter, columns: Mapping[str, NDArray[Any]]) -> None:
    assert writer.schema is not None
    schema = writer.schema.arrow
    arrays = [
        pa.array(columns[field.name].astype(field.type.to_pandas_dtype())) for field in schema
    ]
    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
