"""Open shards and parsed batches stay within their bounds, and what falls out comes back."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import forebay
from forebay.dataset.cache import MAX_OPEN_SHARDS, ShardCache, shard_cache
from forebay.dataset.layers import reader_of
from forebay.testing.numbered import NUM_SAMPLES
from forebay_wire.limits import KIB, MAX_OPEN_BLOBS_PER_CLIENT

BATCH_BYTES = 30_000
"""Three of the record batches of the numbered dataset."""


def small_cache(client) -> ShardCache:
    return ShardCache(client.transfer, batch_bytes=BATCH_BYTES, max_shards=1)


def read_random(dataset, cache, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, NUM_SAMPLES, 40)
    reader = reader_of(dataset.manifest, dataset.schema, cache)
    found = reader.read(rows, dataset.columns(["number", "image", "text"]))
    assert found["number"].tolist() == rows.tolist()
    assert found["image"][:, 3, 3].tolist() == (rows % 256).tolist()
    assert found["text"] == [f"sample {row}" for row in rows]


def test_a_small_cache_reads_everything_and_stays_small(client, numbered):
    assert len(numbered.manifest.shards) > 1
    cache = small_cache(client)
    for seed in range(20):
        read_random(numbered, cache, seed)
        assert cache.num_shards == 1
        assert cache.held_bytes <= BATCH_BYTES


def test_threads_may_share_a_cache_that_is_too_small_for_them(client, numbered):
    cache = small_cache(client)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: read_random(numbered, cache, seed), range(60)))
    assert cache.num_shards == 1


def test_datasets_of_one_daemon_share_a_cache(numbered, train):
    assert shard_cache(numbered.endpoint) is shard_cache(train.endpoint)
    numbered.take(range(NUM_SAMPLES))
    train.take(range(len(train)))
    assert shard_cache(numbered.endpoint).num_shards == len(numbered.manifest.shards)


@pytest.mark.slow
def test_one_batch_over_more_shards_than_may_be_open(client, name):
    num_shards = MAX_OPEN_BLOBS_PER_CLIENT + 30
    with client.create_dataset(name, schema={"x": "binary"}, shard_bytes=64 * KIB) as writer:
        for number in range(num_shards):
            writer.write(x=number.to_bytes(40 * KIB, "little"))
    dataset = client.dataset(name)
    assert len(dataset.manifest.shards) == num_shards
    rows = np.random.default_rng(0).permutation(num_shards)
    found = dataset.take(rows)["x"]
    assert [int.from_bytes(x[:8], "little") for x in found] == rows.tolist()
    assert shard_cache(dataset.endpoint).num_shards == MAX_OPEN_SHARDS


def test_what_is_unpacked_counts_against_the_memory_of_the_process(client, name, monkeypatch):
    num_rows, width = 64, 1 << 16
    with client.create_dataset(
        name, schema={"mask": forebay.Array("bool", (width,))}, batch_bytes=32 * KIB
    ) as writer:
        for row in range(num_rows):
            writer.write(mask=np.arange(width) % (row + 2) == 0)
    dataset = client.dataset(name)
    cache = ShardCache(client.transfer, batch_bytes=1 << 30)
    reader = reader_of(dataset.manifest, dataset.schema, cache)
    assert reader.num_batches > 8
    monkeypatch.setattr("forebay.dataset.cache._fetched_bytes", 4 * 4 * width)
    for _ in range(2):
        found = reader.read(np.arange(num_rows), dataset.columns())["mask"]
        for row in range(num_rows):
            assert (found[row] == (np.arange(width) % (row + 2) == 0)).all()
        assert 0 < cache._copied_bytes <= 4 * 4 * width
