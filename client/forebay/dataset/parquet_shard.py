"""Shards that are Parquet files, read in place: a row group is a record batch.

What is decoded of a row group is what is used of it: a column at its first use, by Arrow, from
bytes that were verified as those of any shard are. Values are those that an import writes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pyarrow as pa

from forebay.dataset.decoded_shard import DecodingReader
from forebay.dataset.schema import Schema
from forebay.dataset.shard import Bytes
from forebay.dataset.tables import conform
from forebay_wire.errors import IntegrityError, SchemaMismatch

if TYPE_CHECKING:
    import pyarrow.parquet as pq


class ParquetReader(DecodingReader):
    """Row groups of an open Parquet file. Thread-safe."""

    is_columnar = True

    def __init__(
        self, blob: Bytes, schema: Schema, batch_rows: tuple[int, ...], where: str
    ) -> None:
        super().__init__(blob, schema, batch_rows, where)
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None

    def decoded_bytes(self, index: int) -> int:
        with self._lock:
            group = self._opened().metadata.row_group(index)
        fixed = sum(column.fixed_bytes for column in self._schema.columns)
        return max(int(group.total_byte_size), fixed * int(group.num_rows))

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
