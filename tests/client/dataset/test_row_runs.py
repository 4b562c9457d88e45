"""Rows of any order as runs of one shard: nothing lost, nothing reordered, bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dataset import row_runs
from forebay.dataset.row_runs import RunsAhead, runs_of_shards


def starts_of(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes], dtype=np.int64)


@given(st.lists(st.integers(0, 5), min_size=1).filter(any), st.integers(0, 9), st.data())
def test_runs_are_the_rows_in_order_each_in_its_shard(sizes, position, data):
    starts = starts_of(sizes)
    rows = data.draw(st.lists(st.integers(0, int(starts[-1]) - 1)))
    runs = runs_of_shards(starts, np.array(rows, dtype=np.int64), position)
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    told = [run.shard for run in runs for _ in range(run.start, run.stop)]
    assert told == [shard_of[row] for row in rows]
    assert all(run.start < run.stop for run in runs)
    edges = [position, *(run.stop for run in runs)]
    assert [run.start for run in runs] == edges[:-1]
    assert edges[-1] == position + len(rows)
    assert all(one.shard != other.shard for one, other in pairwise(runs))  # the longest ones


@dataclass
class Rows:
    """A split that reads a version backwards."""

    name: str = "d"
    num_rows: int = 20

    def rows_at(self, indices: np.ndarray) -> np.ndarray:
        return self.num_rows - 1 - indices


def take_all(ahead: RunsAhead) -> None:
    while ahead.has_room():
        ahead.append(*ahead.take())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(row_runs, "AHEAD_RUNS", 6)
    monkeypatch.setattr(row_runs, "AHEAD_ROWS", 16)
    monkeypatch.setattr(row_runs, "CHUNK_ROWS", 4)


@pytest.mark.parametrize("row_of", [lambda at: at % 20, lambda at: 0, lambda at: -1 - at % 20])
def test_an_endless_iterable_is_taken_as_reading_advances(small, row_of):
    taken = []

    def endless() -> Iterator[int]:
        for at in count():
            taken.append(at)
            yield row_of(at)

    ahead = RunsAhead(Rows(), starts_of([5, 5, 10]), endless())
    for position in range(200):
        take_all(ahead)
        assert ahead.row() == row_of(position)
        assert position < len(taken) == ahead.stop < position + 16 + 4
        assert len(ahead.runs) < 6 + 4
        assert ahead.runs[0].start <= position < ahead.runs[0].stop
        assert sum(len(chunk) for chunk in ahead._chunks) <= 16 + 2 * 4
        ahead.skip_to(position + 1)
    assert not ahead.is_whole


def test_the_end_is_found(small):
    ahead = RunsAhead(Rows(), starts_of([5, 5, 10]), range(8))
    take_all(ahead)
    assert ahead.is_whole
    assert [(run.start, run.stop, run.shard) for run in ahead.runs] == [(0, 4, 2), (4, 8, 2)]
    ahead.skip_to(8)
    assert ahead.row() is None
    assert not ahead.runs


def test_a_row_that_is_not_there_is_named_with_its_place(small):
    for wrong in (20, -21, 1 << 70):
        ahead = RunsAhead(Rows(), starts_of([20]), [0, 1, 2, 3, 4, wrong, 6])
        with pytest.raises(IndexError, match=f"row {wrong}, at position 5 of the plan.*'d' of 20"):
            take_all(ahead)
        assert ahead.is_whole
        assert ahead.stop == 4
    with pytest.raises(TypeError, match="float"):
        take_all(RunsAhead(Rows(), starts_of([20]), [1.5]))
