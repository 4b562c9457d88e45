"""Versions whose columns lie in several places: each is read from the shards that have it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.cache import ShardCache
from forebay.dataset.gather import BatchIndex, RowReader
from forebay.dataset.schema import Column, Schema
from forebay_wire.errors import IntegrityError
from forebay_wire.manifest import ColumnShards, DatasetManifest

Rows = NDArray[np.int64]


class Reader(Protocol):
    """What reads the rows of a version. Thread-safe."""

    def of(self, column: Column) -> RowReader:
        """The reader of the shards that *column* is read from."""
        ...

    def iterate(self, columns: Sequence[Column]) -> Iterator[pa.RecordBatch]:
        """All rows in order, some at a time, over mapped memory; *columns* alone."""
        ...

    def sample(self, row: int, columns: Sequence[Column]) -> dict[str, Any]:
        """The *columns* of one row: what :meth:`read` gives for it, for less."""
        ...

    def read(self, rows: Rows, columns: Sequence[Column]) -> dict[str, Any]:
        """The *columns* of *rows*: see :meth:`RowReader.read`."""
        ...


def parse_schema(text: str, what: str) -> Schema:
    """The schema that a manifest holds as *text*, base64 of Arrow's. IntegrityError."""
    try:
        data = base64.b64decode(text, validate=True)
        return Schema.from_arrow(pa.ipc.read_schema(pa.py_buffer(data)))
    except (ValueError, OSError) as error:
        raise IntegrityError(
            f"the manifest of {what} holds no Arrow schema ({error}): write the version again"
        ) from error


def schemas_of(found: ColumnShards, what: str) -> Callable[[int], Schema]:
    """The schema of each of the shards, parsed once."""
    parse = cache(partial(parse_schema, what=what))
    return lambda number: parse(found.schema_of(number))


def reader_of(manifest: DatasetManifest, schema: Schema, cache: ShardCache) -> Reader:
    """A reader of a version whose columns are *schema*."""
    what = f"dataset {manifest.dataset} v{manifest.version}"
    if not manifest.layers and not manifest.shard_schemas:
        return RowReader(manifest.shards, lambda shard: schema, cache, what)
    readers = {}
    for layer in manifest.layers_of(schema.names):
        found = manifest.column_shards(layer)
        whose = f"{what}{columns_of(manifest, layer)}"
        readers[layer] = RowReader(found.shards, schemas_of(found, what), cache, whose)
    return LayeredReader(manifest, schema, readers)


def columns_of(manifest: DatasetManifest, layer: int | None) -> str:
    """The columns of *layer*, for messages; nothing of those that lie in none."""
    return "" if layer is None else f" (columns {', '.join(manifest.layers[layer].columns)})"


def cell_starts(manifest: DatasetManifest, columns: Sequence[str]) -> Rows:
    """The first row of each cell, and the number of rows last: the longest runs of rows of which
    each of *columns* lies in one record batch."""
    layers = manifest.layers_of(columns)
    return _cells([BatchIndex(manifest.column_shards(one).shards).starts for one in layers])


def _cells(starts: Sequence[Rows]) -> Rows:
    return starts[0] if len(starts) == 1 else np.unique(np.concatenate(starts))


class LayeredReader:
    """Reads rows of one version, each column from its own shards. Thread-safe."""

    def __init__(
        self, manifest: DatasetManifest, schema: Schema, readers: dict[int | None, RowReader]
    ) -> None:
        self._schema = schema
        self._readers = {name: readers[manifest.layer_of(name)] for name in schema.names}

    def of(self, column: Column) -> RowReader:
        """The reader of the shards that *column* is read from."""
        return self._readers[column.name]

    def iterate(self, columns: Sequence[Column]) -> Iterator[pa.RecordBatch]:
        """All rows in order, some at a time, over mapped memory; *columns* alone."""
        schema = Schema(tuple(columns)).arrow
        sides = [reader.iterate(own) for reader, own in self._shared_out(columns)]
        for batches in _side_by_side(sides):
            found = {name: batch.column(name) for batch in batches for name in batch.schema.names}
            yield pa.RecordBatch.from_arrays([found[name] for name in schema.names], schema=schema)

    def sample(self, row: int, columns: Sequence[Column]) -> dict[str, Any]:
        """The *columns* of one row."""
        return self._joined(columns, lambda reader, own: reader.sample(row, own))

    def read(self, rows: Rows, columns: Sequence[Column]) -> dict[str, Any]:
        """The *columns* of *rows*, in the order of *rows*: see :meth:`RowReader.read`."""
        return self._joined(columns, lambda reader, own: reader.read(rows, own))

    def _joined(
        self,
        columns: Sequence[Column],
        read: Callable[[RowReader, list[Column]], dict[str, Any]],
    ) -> dict[str, Any]:
        """What *read* gives of each reader's columns, in the order of *columns*."""
        found: dict[str, Any] = {}
        for reader, own in self._shared_out(columns):
            found |= read(reader, own)
        return {column.name: found[column.name] for column in columns}

    def _shared_out(self, columns: Sequence[Column]) -> Iterable[tuple[RowReader, list[Column]]]:
        """*columns* by the reader that has them."""
        by_reader: dict[RowReader, list[Column]] = {}
        for column in columns:
            by_reader.setdefault(self.of(column), []).append(column)
        return by_reader.items()


def _side_by_side(
    sides: Sequence[Iterator[pa.RecordBatch]],
) -> Iterator[list[pa.RecordBatch]]:
    """The same rows of each of *sides*, as many at a time as lie in one record batch of each."""
    heads: list[pa.RecordBatch] = []
    while True:
        for number, side in enumerate(sides):
            while number >= len(heads) or not heads[number].num_rows:
                fresh = next(side, None)
                if fresh is None:
                    return  # all have as many rows
                heads[number : number + 1] = [fresh]
        rows = min(head.num_rows for head in heads)
        yield [head.slice(0, rows) for head in heads]
        heads = [head.slice(rows) for head in heads]
