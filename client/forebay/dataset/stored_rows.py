"""Which row of the version stands where in a stored selection: its blobs, mapped and searched."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.cache import ShardCache
from forebay.dataset.gather import RowReader
from forebay.dataset.schema import Schema
from forebay_wire.lazy import lazy
from forebay_wire.manifest import SelectionManifest
from forebay_wire.selection import POSITION, ROW, ROWS, stored_rule

MAX_SHORT_ROW: Final = 1 << 32
"""Row numbers of a version with no more rows take four bytes each."""


def schema_of(encoding: str, num_version_rows: int) -> Schema:
    """The columns of the blobs of a stored selection in *encoding*."""
    row = pa.uint32() if num_version_rows <= MAX_SHORT_ROW else pa.int64()
    if encoding == ROWS:
        return Schema.of(pa.schema({ROW: row}))
    return Schema.of(pa.schema({POSITION: pa.int64(), ROW: pa.int64()}))


class StoredRows:
    """The rows of one stored selection, read where they are needed. Thread-safe."""

    def __init__(
        self, selection: SelectionManifest, num_version_rows: int, cache: ShardCache
    ) -> None:
        name = f"dataset {selection.dataset} v{selection.version}, selection {selection.name}"
        encoding = stored_rule(selection.rule)["encoding"]
        schema = schema_of(encoding, num_version_rows)
        self._schema = schema
        self._is_plain = encoding == ROWS
        self._num_entries = sum(shard.num_rows for shard in selection.shards)
        self._reader = RowReader(selection.shards, lambda shard: schema, cache, name)

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the version at these places of what is stored."""
        if self._is_plain:
            rows: NDArray[np.int64] = self._read(places)[ROW].astype(np.int64)
            return rows
        positions, first_rows = self._runs
        return rows_of_runs(positions, first_rows, places)

    @lazy
    def _runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First position and first row of each run; a writer made few of them."""
        found = self._read(np.arange(self._num_entries, dtype=np.int64))
        return found[POSITION], found[ROW]

    def _read(self, entries: NDArray[np.int64]) -> dict[str, Any]:
        return self._reader.read(entries, self._schema.columns)


def rows_of_runs(
    positions: NDArray[np.int64], first_rows: NDArray[np.int64], places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rows at *places*, of runs that begin at *positions* with *first_rows*."""
    runs = np.searchsorted(positions, places, side="right") - 1
    found: NDArray[np.int64] = first_rows[runs] + (places - positions[runs])
    return found
