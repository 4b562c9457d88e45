"""What a reader is going to read, row by row, as runs of rows of one shard: bounded, lazily."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import index
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

AHEAD_RUNS: Final = 1 << 14
"""So many are known ahead of the position: the daemon looks at about as many."""

AHEAD_ROWS: Final = 1 << 20
"""Or so many rows, where runs are long: 8 MiB of numbers."""

CHUNK_ROWS: Final = 1 << 13
"""Rows taken from the iterable at a time."""


@dataclass(frozen=True)
class Run:
    """Positions [start, stop) of a plan, which all lie in one shard."""

    start: int
    stop: int
    shard: int


class Rows(Protocol):
    """The dataset that row numbers are of."""

    @property
    def name(self) -> str: ...

    @property
    def num_rows(self) -> int: ...

    def rows_at(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the version behind row numbers of the split."""


def runs_of_shards(
    shard_starts: NDArray[np.int64], rows: NDArray[np.int64], position: int
) -> list[Run]:
    """*rows* of a version, in the order of reading, as the longest runs that stay in one shard.

    *shard_starts*: the first row of each shard and, last, the number of rows. *position*: of the
    first of *rows*. A shard without rows has no run.
    """
    if len(rows) == 0:
        return []
    shards = np.searchsorted(shard_starts, rows, side="right") - 1
    firsts = np.flatnonzero(np.concatenate(([True], shards[1:] != shards[:-1])))
    starts = (firsts + position).tolist()
    stops = [*starts[1:], position + len(rows)]
    return [
        Run(start, stop, shard)
        for start, stop, shard in zip(starts, stops, shards[firsts].tolist(), strict=True)
    ]


class RunsAhead:
    """Rows of a reader from its position on, as far as they were taken from its iterable.

    Positions count rows from 0. Not thread-safe; holds at most :data:`AHEAD_RUNS` runs or
    :data:`AHEAD_ROWS` rows, and a chunk.
    """

    def __init__(
        self, dataset: Rows, shard_starts: NDArray[np.int64], indices: Iterable[int]
    ) -> None:
        self._dataset = dataset
        self._shard_starts = shard_starts
        self._indices: Iterator[int] | None = iter(indices)
        self._chunks: deque[NDArray[np.int64]] = deque()
        """Row numbers as they were given; the last ends at :attr:`stop`."""
        self._chunks_start = 0
        self.position = 0
        self.stop = 0
        """Positions before it are known."""
        self.runs: deque[Run] = deque()
        """From that of :attr:`position` on."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing comes after :attr:`stop`."""
        return self._indices is None

    def row(self) -> int | None:
        """The row number at the position, as it was given; None at the end."""
        if self.position == self.stop:
            return None
        return int(self._chunks[0][self.position - self._chunks_start])

    def skip_to(self, position: int) -> None:
        """Forget all before *position*, which must not lie behind :attr:`stop`."""
        self.position = position
        while self.runs and self.runs[0].stop <= position:
            self.runs.popleft()
        while self._chunks and self._chunks_start + len(self._chunks[0]) <= position:
            self._chunks_start += len(self._chunks.popleft())

    def has_room(self) -> bool:
        """Whether a chunk more would be known by now."""
        rows_ahead = self.stop - self.position
        return not self.is_whole and len(self.runs) < AHEAD_RUNS and rows_ahead < AHEAD_ROWS

    def take(self) -> tuple[NDArray[np.int64], list[Run]]:
        """The next chunk of the iterable, not yet one of those ahead: see :meth:`append`.

        Raises what the iterable raises, TypeError for what is no number, and IndexError for a row
        that is none of the dataset's; there the plan ends.
        """
        if self._indices is None:
            return np.empty(0, np.int64), []
        indices, self._indices = self._indices, None  # it stays so if anything is wrong
        given = list(islice(indices, CHUNK_ROWS))
        numbers = self._checked([index(one) for one in given])
        rows = self._dataset.rows_at(
            np.where(numbers < 0, numbers + self._dataset.num_rows, numbers)
        )
        found = runs_of_shards(self._shard_starts, rows, self.stop)
        if len(given) == CHUNK_ROWS:
            self._indices = indices
        return numbers, found

    def append(self, numbers: NDArray[np.int64], runs: list[Run]) -> None:
        """Know what was taken."""
        if len(numbers):
            self._chunks.append(numbers)
        self.runs.extend(runs)
        self.stop += len(numbers)

    def _checked(self, numbers: list[int]) -> NDArray[np.int64]:
        limit = self._dataset.num_rows
        if numbers and not -limit <= min(numbers) <= max(numbers) < limit:
            place = next(at for at, one in enumerate(numbers) if not -limit <= one < limit)
            raise IndexError(
                f"row {numbers[place]}, at position {self.stop + place} of the plan, is outside "
                f"dataset {self._dataset.name!r} of {limit} rows"
            )
        return np.array(numbers, dtype=np.int64)
