"""The keys and values of one version of a zarr store: where each lies, read without the store.

A version that was committed has a row for each key that was set since the first version, and last a
row with an index of all keys. One that was registered in place has a file for each key instead. A
commit over that appends rows to it, so a version may have both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from forebay.dataset.cache import ShardCache, ShardPlace, shard_cache
from forebay.dataset.dataset import Dataset
from forebay.dataset.shard import ShardReader
from forebay.dataset.zarr_file import ZarrFileReader
from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.limits import MAX_BLOBS_PER_OPEN

KEY: Final = "key"
VALUE: Final = "value"
SCHEMA: Final = {KEY: "string", VALUE: "binary"}

INDEX_KEY: Final = ""
"""The key of a version's last row: an Arrow stream of all keys, in order, with row and size."""

METADATA: Final = {"zarr": 3}

FORMAT: Final = "zarr"
"""Of shards that are files in place; behind a colon their key follows, as JSON."""

INDEX_SCHEMA: Final = pa.schema(
    [pa.field(KEY, pa.string()), pa.field("row", pa.int64()), pa.field("size", pa.int64())]
)


@dataclass(frozen=True)
class Place:
    """Where the value of a key lies."""

    row: int
    size: int


class Version:
    """The keys and values of a version. Thread-safe, picklable, and safe to use after a fork."""

    def __init__(self, dataset: Dataset | None) -> None:
        """None: there is no such dataset yet. InvalidRequest if it is no zarr store."""
        self._dataset = dataset
        self._open: tuple[int, ShardCache] | None = None
        if dataset is not None:
            _check(dataset)

    @property
    def dataset(self) -> Dataset:
        assert self._dataset is not None, "there is no such dataset yet"
        return self._dataset

    @property
    def number(self) -> int:
        """0: there is no such dataset yet."""
        return 0 if self._dataset is None else self._dataset.version

    @property
    def manifest(self) -> str:
        """Its manifest's id."""
        return "" if self._dataset is None else self._dataset.manifest_id

    @property
    def num_rows(self) -> int:
        return 0 if self._dataset is None else self._dataset.num_rows

    @lazy
    def places(self) -> dict[str, Place]:
        """Of all keys. Reads the index; InvalidRequest where there is none."""
        return {} if self._dataset is None else _places_of(self._dataset)

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds *row*."""
        return int(np.searchsorted(self.dataset.shard_starts, row, side="right")) - 1

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview | None:
        """The value of *key*, or a part of it, over mapped memory; None if there is none."""
        place = self.places.get(key)
        if place is None:
            return None
        stop = place.size if stop is None else min(stop, place.size)
        start = min(start, stop)
        number = self.shard_of(place.row)
        if self.dataset.manifest.shards[number].format:
            (file,) = self._opened([number])
            assert isinstance(file, ZarrFileReader), "its format was checked"
            return file.part(start, stop)
        value = self.dataset.value(place.row, VALUE)
        return None if value is None else value[start:stop]

    def open(self, keys: Iterable[str]) -> None:
        """Open all that holds values of *keys*, many at a time: reading does so one by one."""
        places = self.places
        rows = [places[key].row for key in keys if key in places]
        numbers = sorted({self.shard_of(row) for row in rows})
        for first in range(0, len(numbers), MAX_BLOBS_PER_OPEN):
            self._opened(numbers[first : first + MAX_BLOBS_PER_OPEN])

    def _opened(self, numbers: list[int]) -> list[ShardReader]:
        dataset = self.dataset
        places = [
            ShardPlace(
                dataset.manifest.shards[number],
                dataset.schema,
                f"dataset {dataset.name} v{dataset.version}, shard {number}",
            )
            for number in numbers
        ]
        return self._cache.open(places)

    @property
    def _cache(self) -> ShardCache:
        pid = os.getpid()
        if self._open is None or self._open[0] != pid:
            self._open = (pid, shard_cache(self.dataset.endpoint))
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset, "_open": None}  # the index is read again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _check(dataset: Dataset) -> None:
    columns = dataset.schema.names
    what = f"dataset {dataset.name!r} v{dataset.version} is no zarr store"
    if columns != list(SCHEMA):
        raise InvalidRequest(
            f"{what}: it has the columns {', '.join(columns)}, and none was committed by "
            "ForebayStore"
        )
    if dataset.selection is not None:
        raise InvalidRequest(f"{what}, but its split {dataset.split!r}: open the whole version")
    if dataset.manifest.metadata.get("zarr") != METADATA["zarr"] or not dataset.num_rows:
        raise InvalidRequest(f"{what}: it was not committed by ForebayStore")


def _places_of(dataset: Dataset) -> dict[str, Place]:
    shards = dataset.manifest.shards
    if shards[-1].format:
        keys = [key_of(shard.format) for shard in shards]
        return {
            key: Place(row, shard.num_bytes)
            for row, (key, shard) in enumerate(zip(keys, shards, strict=True))
        }
    last = dataset.num_rows - 1
    if bytes(dataset.value(last, KEY) or b"") != INDEX_KEY.encode():
        raise InvalidRequest(
            f"dataset {dataset.name!r} v{dataset.version} is no zarr store: rows were appended to "
            "it by other means than ForebayStore"
        )
    table = pa.ipc.open_stream(pa.py_buffer(dataset.value(last, VALUE))).read_all()
    keys, rows, sizes = (table.column(field.name).to_pylist() for field in INDEX_SCHEMA)
    return {key: Place(row, size) for key, row, size in zip(keys, rows, sizes, strict=True)}


def index_of(places: Mapping[str, Place]) -> bytes:
    """The value of :data:`INDEX_KEY`."""
    keys = sorted(places)
    columns = [keys, [places[key].row for key in keys], [places[key].size for key in keys]]
    table = pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, INDEX_SCHEMA, strict=True)],
        schema=INDEX_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def format_of(key: str) -> str:
    """As a manifest names the format of the file that is the value of *key*."""
    return f"{FORMAT}:{json.dumps(key)}"


def key_of(format: str) -> str:
    """The inverse. InvalidRequest for another format."""
    name, _, detail = format.partition(":")
    if name != FORMAT:
        raise InvalidRequest(f"a file in format {name!r} is no value of a zarr store")
    key = json.loads(detail)
    assert isinstance(key, str), "format_of() made it"
    return key
