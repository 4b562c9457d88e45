"""Rows by record batch: every row once, to its place, runs as slices."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forebay.dataset.gather import BatchIndex, as_run, groups
from forebay_wire.manifest import ShardRef

batch_rows = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(batch_rows, st.data())
def test_every_wanted_row_comes_from_its_batch_to_its_place(sizes, data):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    total = int(starts[-1])
    rows = np.array(data.draw(st.lists(st.integers(0, total - 1), max_size=40)), dtype=np.int64)
    output = np.full(len(rows), -1)
    for group in groups(starts, rows):
        in_batch = np.arange(starts[group.batch], starts[group.batch + 1])
        output[group.target] = in_batch[group.source]
    assert output.tolist() == rows.tolist()


@given(batch_rows)
def test_a_scan_is_made_of_slices(sizes):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    found = list(groups(starts, np.arange(starts[-1])))
    assert len(found) == len(sizes)
    assert all(isinstance(group.source, slice) for group in found)
    assert all(isinstance(group.target, slice) for group in found)


def test_only_ascending_neighbours_are_a_run():
    assert as_run(np.array([4])) == slice(4, 5)
    assert as_run(np.array([4, 5, 6])) == slice(4, 7)
    for indices in ([5, 4], [4, 6], [4, 4], [4, 6, 5, 7], [4, 4, 6, 7]):
        assert not isinstance(as_run(np.array(indices)), slice)


def test_a_batch_number_leads_to_its_shard():
    shards = tuple(
        ShardRef("ab" * 32, 1, sum(rows), rows) for rows in [(3, 4), (5,), (), (1, 1, 1)]
    )
    index = BatchIndex(shards)
    assert index.starts.tolist() == [0, 3, 7, 12, 13, 14, 15]
    assert [index.place(batch) for batch in range(6)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (3, 0),
        (3, 1),
        (3, 2),
    ]
