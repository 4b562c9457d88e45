"""Samples that cannot be read: found without losing their neighbours, masked, and counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.gather import NUMBERS
from forebay.dataset.layers import cell_starts
from forebay.dataset.lists import Lists
from forebay.dataset.schema import Column
from forebay.forking import watch
from forebay_wire.errors import (
    IntegrityError,
    InvalidRequest,
    NotFound,
    SchemaMismatch,
    StorageError,
    TooManyBadSamples,
)
from forebay_wire.manifest import DatasetManifest

logger = logging.getLogger(__name__)

ON_ERROR: Final = ("raise", "mask")

MAX_ERRORS: Final = 100
"""Bad samples that a loader masks unless told otherwise."""

LARGEST_MAX_ERRORS: Final = 1 << 20

NAMED_ROWS: Final = 20
"""Rows that a message names."""

READ_ERRORS: Final = (
    IntegrityError,
    NotFound,
    StorageError,
    SchemaMismatch,
    pa.ArrowException,
    UnicodeDecodeError,
)
"""What says that some samples are bad. A daemon that is away, no room, no permission and the like
are not the samples' fault: they are raised, whatever is asked for."""


class Hole(NamedTuple):
    """A sample that is not there."""

    position: int
    """In the batch."""
    row: int
    """Of the version."""
    reason: str


@runtime_checkable
class NamesParts(Protocol):
    """Rows whose parts are not shards."""

    def part_at(self, row: int) -> str:
        """Where *row* lies, for people; parts that were warned of are known by it."""
        ...


class Readable(Protocol):
    """What rows are read from: a dataset."""

    @property
    def manifest(self) -> DatasetManifest: ...

    def columns(self, names: Sequence[str] | None = None) -> tuple[Column, ...]: ...

    def read(self, rows: NDArray[np.int64], columns: Sequence[str] | None) -> dict[str, Any]: ...


def check_on_error(on_error: str, max_errors: int | None) -> int:
    """The budget of bad samples; -1 if the first one raises."""
    if on_error not in ON_ERROR:
        raise InvalidRequest(f'on_error={on_error!r}: "raise" or "mask"')
    if on_error == "raise":
        if max_errors is not None:
            raise InvalidRequest('max_errors belongs to on_error="mask"')
        return -1
    budget = MAX_ERRORS if max_errors is None else max_errors
    if type(budget) is not int or not 0 <= budget <= LARGEST_MAX_ERRORS:
        raise InvalidRequest(f"max_errors={max_errors!r}: a number from 0 to {LARGEST_MAX_ERRORS}")
    return budget


class HoleReader:
    """Reads rows of one dataset, and leaves out those that cannot be read. Thread-safe.

    Damage is found by record batch, which is what is verified as a whole. One that is bad is not
    tried again in the same epoch: each try asks the daemon for another copy.
    """

    def __init__(self) -> None:
        self._epoch = -1
        self._bad: dict[int, str] = {}
        self._starts: NDArray[np.int64] | None = None
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        watch(self)

    def forget_parent(self) -> None:
        """In a child of fork: another thread of the parent may have held it."""
        self._lock = threading.Lock()

    def read(
        self,
        dataset: Readable,
        rows: NDArray[np.int64],
        columns: Sequence[str] | None,
        epoch: int,
    ) -> tuple[dict[str, Any], list[Hole]]:
        """As ``dataset.read``, with zeros, or None, in the rows of the holes."""
        bad = self._known(epoch)
        if not bad:
            try:
                return dataset.read(rows, columns), []
            except READ_ERRORS:
                pass  # which of them it is takes a closer look
        if self._starts is None:
            names = [column.name for column in dataset.columns(columns)]
            self._starts = cell_starts(dataset.manifest, names)
        batch_of = np.searchsorted(self._starts, rows, side="right") - 1
        good = ~np.isin(batch_of, list(bad))
        try:
            arrays = _read_some(dataset, rows[good], columns)
        except READ_ERRORS:
            for batch in np.unique(batch_of[good]).tolist():
                reason = self._probe(dataset, batch, rows[batch_of == batch], columns)
                if reason:
                    bad[batch] = reason
            self._learn(epoch, bad)
            good = ~np.isin(batch_of, list(bad))
            arrays = _read_some(dataset, rows[good], columns)
        holes = [
            Hole(position, int(rows[position]), bad[int(batch_of[position])])
            for position in np.flatnonzero(~good).tolist()
        ]
        return _spread(arrays, good, dataset.columns(columns)), holes

    def _known(self, epoch: int) -> dict[int, str]:
        """The record batches that were bad in *epoch*, and why; a copy."""
        with self._lock:
            return dict(self._bad) if epoch == self._epoch else {}

    def _learn(self, epoch: int, bad: dict[int, str]) -> None:
        with self._lock:
            self._bad = {**self._bad, **bad} if epoch == self._epoch else dict(bad)
            self._epoch = epoch

    def _probe(
        self,
        dataset: Readable,
        batch: int,
        rows: NDArray[np.int64],
        columns: Sequence[str] | None,
    ) -> str:
        """Why the *rows* of one record batch cannot be read; empty if they can."""
        try:
            dataset.read(rows, columns)
        except READ_ERRORS as error:
            self._warn(dataset, batch, error)
            return f"{type(error).__name__}: {error}"
        return ""

    def _warn(self, dataset: Readable, batch: int, error: Exception) -> None:
        """Once for each shard."""
        assert self._starts is not None, "it was asked for the record batch"
        row = int(self._starts[batch])
        if isinstance(dataset, NamesParts):
            part = dataset.part_at(row)
        else:
            part = f"shard {_shard_at(dataset.manifest, row)}"
        with self._lock:
            is_known = part in self._warned
            self._warned.add(part)
        if not is_known:
            logger.warning(
                "samples of %s of dataset %s v%d cannot be read and are masked: %s",
                part,
                dataset.manifest.dataset,
                dataset.manifest.version,
                error,
            )

    def __reduce__(self) -> tuple[type[HoleReader], tuple[()]]:
        return HoleReader, ()  # another process finds out by itself


def _shard_at(manifest: DatasetManifest, row: int) -> int:
    ends = np.cumsum([shard.num_rows for shard in manifest.shards])
    return int(np.searchsorted(ends, row, side="right"))


def _read_some(
    dataset: Readable,
    rows: NDArray[np.int64],
    columns: Sequence[str] | None,
) -> dict[str, Any]:
    """Nothing at all if there are no *rows*."""
    return dataset.read(rows, columns) if len(rows) else {}


def _spread(
    arrays: dict[str, Any],
    good: NDArray[np.bool_],
    columns: Iterable[Column],
) -> dict[str, Any]:
    """*arrays* of the *good* rows as those of all rows."""
    found: dict[str, Any] = {}
    for column in columns:
        if column.kind in NUMBERS:
            assert column.dtype is not None
            whole = np.empty((len(good), *column.shape), column.dtype)
            whole[~good] = 0
            if column.name in arrays:
                whole[good] = arrays[column.name]
            found[column.name] = whole
        elif isinstance(arrays.get(column.name), Lists):
            found[column.name] = arrays[column.name].among(good)
        else:
            rest = iter(arrays.get(column.name, ()))
            found[column.name] = [next(rest) if there else None for there in good.tolist()]
    return found


class ErrorBudget:
    """The bad samples of a loader: counted each once, whoever reads them, and however often.

    Rows lie in a table of fixed size with open addressing, so that processes can share it without
    a lock: a row that is there is never taken out. If two write at the same moment, one of them
    looks again; that both find what they wrote is the only way that a row is missed.
    """

    def __init__(self, max_errors: int, where: str, table: NDArray[np.int64] | None = None) -> None:
        """*table*: of :func:`table_size` rows, all -1, or as others filled it."""
        self.max_errors = max_errors
        self._where = where
        self._table = np.full(table_size(max_errors), -1, np.int64) if table is None else table

    @property
    def rows(self) -> tuple[int, ...]:
        """The bad samples so far."""
        return tuple(sorted(self._table[self._table >= 0].tolist()))

    def spend(self, holes: Iterable[Hole]) -> None:
        """Count *holes*; TooManyBadSamples if there are more than the budget now."""
        for hole in holes:
            if not self._note(hole.row):
                raise self._exceeded(hole)

    def _note(self, row: int) -> bool:
        table, size = self._table, len(self._table)
        place = row * 0x9E3779B97F4A7C15 % (1 << 64) * size >> 64
        for _ in range(size):
            if table[place] == -1:
                table[place] = row
                if table[place] == row:
                    return int((table >= 0).sum()) <= self.max_errors
            if table[place] == row:
                return True
            place = (place + 1) % size
        return False

    def _exceeded(self, last: Hole) -> TooManyBadSamples:
        rows = self.rows
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        named = ", ".join(str(row) for row in rows[:NAMED_ROWS])
        return TooManyBadSamples(
            f"{len(rows)} samples of {self._where} cannot be read, and max_errors="
            f"{self.max_errors}: rows {named}{more}; the last one, row {last.row}: {last.reason}"
        )


def table_size(max_errors: int) -> int:
    """Rows of an :class:`ErrorBudget`'s table."""
    return 2 * (max_errors + 8)
