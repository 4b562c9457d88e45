"""Shards that are files of a zarr store, read in place: each is one row, the value of one key."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from forebay.dataset.schema import Schema
from forebay.dataset.shard import Bytes, ShardReader
from forebay_wire.errors import InvalidRequest


class ZarrFileReader(ShardReader):
    """A file as it lies: nothing is decoded. Thread-safe."""

    def __init__(
        self, blob: Bytes, schema: Schema, batch_rows: tuple[int, ...], where: str, key: str
    ) -> None:
        super().__init__(blob, schema, batch_rows, where)
        self._key = key

    def part(self, start: int, stop: int) -> memoryview:
        """Some bytes of the value: nothing else is verified for them, or fetched."""
        return self._blob.map(start, stop - start)

    def record_batch(self, index: int) -> pa.RecordBatch:
        view = self._blob.map()
        if len(view) > np.iinfo(np.int32).max:
            raise InvalidRequest(
                f"the value of key {self._key!r} has {len(view)} bytes, which no row holds: read "
                f"it with zarr ({self._where})"
            )
        columns = [_one(pa.string(), self._key.encode()), _one(pa.binary(), view)]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema.arrow)


def _one(kind: pa.DataType, value: bytes | memoryview) -> pa.Array:
    """An array of one value, over its memory."""
    ends = np.array([0, len(value)], dtype=np.int32)
    return pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(ends), pa.py_buffer(value)])
