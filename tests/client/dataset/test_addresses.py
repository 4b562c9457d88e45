"""Rows of any size are copied from anywhere in memory, and what is let go of is not looked at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dataset.addresses import LARGEST_PIECE, gather
from forebay.dataset.cache import ShardCache
from forebay.dataset.layers import reader_of
from forebay.dataset.shard import ShardReader

BATCH_BYTES = 30_000
"""Three of the record batches of the numbered dataset."""

sizes = st.sampled_from(
    [0, 1, 2, 3, 8, 15, 16, 17, 3072, LARGEST_PIECE, LARGEST_PIECE + 1, 40_009, 150_528, 1 << 20]
)


@given(sizes, st.lists(st.integers(0, 99), max_size=20))
def test_the_bytes_from_each_address_on(num_bytes, places):
    memory = np.frombuffer(np.random.default_rng(0).bytes(num_bytes + 100), dtype=np.uint8)
    begin = memory.__array_interface__["data"][0]
    found = gather(begin + np.array(places, dtype=np.int64), num_bytes)
    assert found.shape == (len(places), num_bytes)
    assert found.flags.c_contiguous
    for row, place in zip(found, places, strict=True):
        assert row.tobytes() == memory[place : place + num_bytes].tobytes()


def rows_of_batch(reader, number: int) -> np.ndarray:
    starts = reader._index.starts
    return np.arange(starts[number], starts[number + 1])


@pytest.fixture
def parsed(monkeypatch) -> list[tuple[str, int]]:
    """The record batches that are parsed from here on."""
    found = []
    parse = ShardReader.batch

    def batch(self, index):
        found.append((self._where, index))
        return parse(self, index)

    monkeypatch.setattr(ShardReader, "batch", batch)
    return found


def test_what_is_copied_without_asking_the_cache_counts_as_used(client, numbered, parsed):
    columns = numbered.columns(["number"])
    cache = ShardCache(client.transfer, batch_bytes=BATCH_BYTES)
    reader = reader_of(numbered.manifest, numbered.schema, cache)
    for number in range(3):
        reader.read(rows_of_batch(reader, number), columns)
    assert len(parsed) == 3
    reader.read(rows_of_batch(reader, 0), columns)  # the first one is not the least used any more
    reader.read(rows_of_batch(reader, 3), columns)
    reader.read(rows_of_batch(reader, 0), columns)
    assert len(parsed) == 4
    reader.read(rows_of_batch(reader, 1), columns)
    assert len(parsed) == 5


def test_shards_that_are_given_back_are_opened_again(client, numbered, parsed):
    cache = ShardCache(client.transfer, batch_bytes=1 << 30)
    reader = reader_of(numbered.manifest, numbered.schema, cache)
    rows, columns = np.arange(numbered.num_rows), numbered.columns(["number", "image"])
    for _ in range(2):
        before = len(parsed)
        assert reader.read(rows, columns)["number"].tolist() == rows.tolist()
        assert len(parsed) == before + reader.num_batches
        reader.read(rows, columns)
        assert len(parsed) == before + reader.num_batches
        cache.give_back([shard.blob for shard in numbered.manifest.shards])
        assert cache.held_bytes == cache.num_shards == 0
