"""Shards that are Parquet files, read in place: a row group is a record batch.

What is decoded of a row group is what is used of it: a column at its first use, by Arrow, from
bytes that were verified as those of any shard are. Values are those that an import writes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from forebay.dataset.schema import Column, Schema
from forebay.dataset.shard import BatchColumns, Bytes, ShardReader
from forebay.dataset.tables import conform
from forebay_wire.errors import IntegrityError, SchemaMismatch

if TYPE_CHECKING:
    import pyarrow.parquet as pq

FORMAT: Final = "parquet"
"""As a manifest calls it."""

DECODED_WEIGHT: Final = 512
"""A process may hold 512 times as many bytes of mapped files as of memory of its own, which is what
decoded columns lie in: each of their bytes counts so much."""


def open_shard(
    blob: Bytes, schema: Schema, batch_rows: tuple[int, ...], where: str, format: str
) -> ShardReader:
    """A reader of *blob*, which is in *format* (empty: an Arrow IPC file)."""
    if not format:
        return ShardReader(blob, schema, batch_rows, where)
    if format != FORMAT:
        raise SchemaMismatch(f"{where} is in the format {format!r}, which this version cannot read")
    return ParquetReader(blob, schema, batch_rows, where)


class ParquetReader(ShardReader):
    """Row groups of an open Parquet file. Thread-safe."""

    def __init__(
        self, blob: Bytes, schema: Schema, batch_rows: tuple[int, ...], where: str
    ) -> None:
        super().__init__(blob, schema, batch_rows, where)
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._weight = DECODED_WEIGHT if getattr(blob, "maps_in_place", False) else 1

    def batch(self, index: int) -> BatchColumns:
        with self._lock:
            metadata = self._opened().metadata.row_group(index)
        columns = [metadata.column(number) for number in range(metadata.num_columns)]
        encoded = sum(int(column.total_uncompressed_size) for column in columns)
        fixed = sum(column.fixed_bytes for column in self._schema.columns) * metadata.num_rows
        return ParquetColumns(self, index, max(encoded, fixed) * self._weight)

    def record_batch(self, index: int) -> pa.RecordBatch:
        return self.decode(index, self._schema)

    def decode(self, index: int, schema: Schema) -> pa.RecordBatch:
        """The columns of *schema*, of row group *index*."""
        import pyarrow.parquet as pq

        try:
            with self._lock:  # one reader is for one thread
                opened = self._opened()
                table = opened.read_row_group(index, columns=schema.names, use_threads=False)
        except (pa.ArrowException, pq.ParquetException, OSError) as error:
            if isinstance(error, IntegrityError):
                raise
            raise self._damaged(f"row group {index} cannot be read: {error}") from error
        if table.num_rows != self._batch_rows[index]:
            raise self._damaged(
                f"row group {index} has {table.num_rows} rows, not {self._batch_rows[index]}"
            )
        try:
            fitting = conform(table.select(schema.names), schema)
        except SchemaMismatch as error:
            raise SchemaMismatch(f"{self._where}, row group {index}: {error.message}") from error
        arrays = [_joined(column) for column in fitting.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=schema.arrow)

    def columns(self) -> tuple[Schema, tuple[int, ...]]:
        """Of the dataset, and the rows of each row group."""
        return self._schema, self._batch_rows

    def _opened(self) -> pq.ParquetFile:
        if self._file is None:
            import pyarrow.parquet as pq

            try:
                file = pa.PythonFile(_BlobFile(self._blob), mode="r")
                self._file = pq.ParquetFile(file, pre_buffer=False)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, IntegrityError):
                    raise
                raise self._damaged(f"its footer cannot be read: {error}") from error
            if self._file.metadata.num_row_groups != len(self._batch_rows):
                raise self._damaged("it has another number of row groups")
        return self._file


class ParquetColumns(BatchColumns):
    """The columns of one row group, each decoded at its first use."""

    def __init__(self, reader: ParquetReader, index: int, num_bytes: int) -> None:
        self._reader = reader
        self._index = index
        self._schema, rows = reader.columns()
        self._arrays: dict[str, Any] = {}
        self._decoded: dict[str, pa.Array] = {}
        self.num_rows = rows[index]
        self.num_bytes = num_bytes

    def _arrow(self, column: Column) -> pa.Array:
        found = self._decoded.get(column.name)
        if found is None:  # two threads may both do this once; both results are right
            batch = self._reader.decode(self._index, Schema((column,)))
            found = self._decoded.setdefault(column.name, batch.column(0))
        return found


class _BlobFile:
    """A blob as Arrow reads a file of Python's: each range is verified at its first use."""

    closed = False

    def __init__(self, blob: Bytes) -> None:
        self._blob = blob
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        left = self._blob.num_bytes - self._position
        length = left if size < 0 else min(size, left)
        data = bytes(self._blob.map(self._position, length))
        self._position += length
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        starts = (0, self._position, self._blob.num_bytes)
        self._position = starts[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        """The blob belongs to the cache."""


def _joined(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found.chunk(0) if isinstance(found, pa.ChunkedArray) else found
