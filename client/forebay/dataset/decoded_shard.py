"""Shards in formats that have to be decoded: their batches lie in this process's memory."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final

import pyarrow as pa

from forebay.dataset.schema import Column, Schema
from forebay.dataset.shard import BatchColumns, Bytes, ShardReader

DECODED_WEIGHT: Final = 512
"""A process may hold 512 times as many bytes of mapped files as of memory of its own, which is what
decoded columns lie in: each of their bytes counts so much."""


class DecodingReader(ShardReader):
    """Record batches of an open file that is no Arrow IPC file. Thread-safe."""

    is_columnar = False
    """Whether a column can be decoded without the others."""

    def __init__(
        self, blob: Bytes, schema: Schema, batch_rows: tuple[int, ...], where: str
    ) -> None:
        super().__init__(blob, schema, batch_rows, where)
        self._weight = DECODED_WEIGHT if getattr(blob, "maps_in_place", False) else 1

    def batch(self, index: int) -> BatchColumns:
        return DecodedColumns(self, index, self.decoded_bytes(index) * self._weight)

    def record_batch(self, index: int) -> pa.RecordBatch:
        return self.decode(index, self._schema)

    @abstractmethod
    def decode(self, index: int, schema: Schema) -> pa.RecordBatch:
        """The columns of *schema*, of record batch *index*: all columns unless the format
        :attr:`is_columnar`."""

    @abstractmethod
    def decoded_bytes(self, index: int) -> int:
        """About how much memory a record batch takes."""

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def batch_rows(self) -> tuple[int, ...]:
        return self._batch_rows


class DecodedColumns(BatchColumns):
    """The columns of one record batch, decoded at their first use."""

    def __init__(self, reader: DecodingReader, index: int, num_bytes: int) -> None:
        self._reader = reader
        self._index = index
        self._schema = reader.schema
        self._arrays: dict[str | tuple[str, str], Any] = {}
        self._decoded: dict[str, pa.Array] = {}
        self.num_rows = reader.batch_rows[index]
        self.num_bytes = num_bytes
        self.copied_bytes = 0
        self.on_copy = lambda columns, num_bytes: None

    def arrow(self, column: Column) -> pa.Array:
        found = self._decoded.get(column.name)
        if found is None:  # two threads may both do this once; both results are right
            own = self._schema[column.name]  # *column* may stand for another view of it
            schema = Schema((own,)) if self._reader.is_columnar else self._schema
            batch = self._reader.decode(self._index, schema)
            for name, values in zip(schema.names, batch.columns, strict=True):
                self._decoded.setdefault(name, values)
            found = self._decoded[column.name]
        return found
