"""Reading blobs, by descriptors and by HTTP: the same bytes, the same rules."""

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest

import forebay
from forebay.testing.blobs import store_blob
from forebay.transfer import Blob
from forebay.transfer.local import LocalTransfer
from forebay_server.testing.daemon import DaemonProcess

CUTS = [1, 4096, 70_000, 4 << 20, 3, 65_536, 1 << 20, 17]
"""Uneven on purpose: borders inside pages, segments of one byte and of the largest size."""


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(sum(CUTS))


@pytest.fixture
def blob_id(client: forebay.Client, content: bytes) -> str:
    return store_blob(client, content, CUTS)


@pytest.fixture
def blob(client: forebay.Client, blob_id: str) -> Blob:
    [opened] = client.transfer.open([blob_id], "dataset d v1")
    return opened


def read(blob: Blob, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    blob.read_into(offset, buffer)
    return bytes(buffer)


def open_bytes(client: forebay.Client) -> int:
    return sum(tier.open_bytes for tier in client.status().tiers)


def test_environment_decides_the_way(client: forebay.Client, way: str) -> None:
    assert isinstance(client.transfer, LocalTransfer) == (way == "local")


def test_table_and_length_are_those_that_were_written(blob: Blob, content: bytes) -> None:
    assert blob.num_bytes == len(content)
    assert blob.table.entries["length"].tolist() == CUTS
    assert blob.table.blob_id == blob.id


def test_any_range_in_any_order(blob: Blob, content: bytes) -> None:
    rng = random.Random(1)
    borders = [sum(CUTS[:count]) for count in range(len(CUTS) + 1)]
    for _ in range(60):
        first, last = sorted(rng.choice(borders) + rng.randint(-2, 2) for _ in range(2))
        first, last = max(0, first), min(len(content), max(0, last))
        length = max(0, last - first)
        use: Callable[[int, int], bytes] = rng.choice(
            [lambda at, count: bytes(blob.map(at, count)), lambda at, count: read(blob, at, count)]
        )
        assert use(first, length) == content[first : first + length], (first, length)


def test_whole_blob_read_then_mapped(blob: Blob, content: bytes) -> None:
    assert read(blob, 0, len(content)) == content
    assert blob.map() == content


def test_whole_blob_mapped_then_read(blob: Blob, content: bytes) -> None:
    assert blob.map() == content
    assert read(blob, 0, len(content)) == content


def test_reading_into_an_array_of_another_type(blob: Blob, content: bytes) -> None:
    target = np.zeros((4, 8), np.float32)
    blob.read_into(5, target)
    assert target.tobytes() == content[5 : 5 + target.nbytes]


def test_views_are_read_only(blob: Blob) -> None:
    assert blob.map(0, 10).readonly


def test_views_outlive_blob_and_client(client: forebay.Client, blob: Blob, content: bytes) -> None:
    view = blob.map(10, 100_000)
    blob.close()
    client.close()
    assert view == content[10:100_010]


def test_empty_blob(client: forebay.Client) -> None:
    [empty] = client.transfer.open([store_blob(client, b"")])
    assert empty.num_bytes == 0
    assert empty.map() == b""
    empty.read_into(0, bytearray())


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, sum(CUTS) + 1), (sum(CUTS), 1)])
def test_outside_names_range_and_blob(blob: Blob, offset: int, length: int) -> None:
    with pytest.raises(forebay.InvalidRequest, match=rf"outside blob {blob.id}.*dataset d v1"):
        blob.map(offset, length)
    with pytest.raises(forebay.InvalidRequest, match="outside blob"):
        blob.read_into(offset, bytearray(length))


def test_closed_blob_says_so(blob: Blob) -> None:
    blob.close()
    blob.close()
    with pytest.raises(forebay.InvalidRequest, match=r"is closed: open it again"):
        blob.map(0, 1)


def test_many_blobs_in_one_call_keep_their_order(client: forebay.Client) -> None:
    contents = [number.to_bytes(4, "little") for number in range(150)]
    ids = [store_blob(client, content) for content in contents[:10]] * 15
    opened = client.transfer.open(ids)
    assert [bytes(one.map()) for one in opened] == contents[:10] * 15
    for one in opened:
        one.close()


def test_missing_blob_closes_the_others_and_names_the_context(
    client: forebay.Client, blob_id: str
) -> None:
    before = open_bytes(client)
    with pytest.raises(forebay.NotFound, match=r"dataset d v7"):
        client.transfer.open([blob_id, "0" * 64, blob_id], "dataset d v7")
    client.transfer.open([blob_id])[0].close()  # releases travel with the next request
    assert open_bytes(client) == before


def test_closing_releases_at_the_daemon(client: forebay.Client, blob_id: str) -> None:
    before = open_bytes(client)
    opened = client.transfer.open([blob_id, blob_id])
    assert open_bytes(client) > before
    for one in opened:
        one.close()
    assert open_bytes(client) == before


def test_forgotten_blobs_are_released(client: forebay.Client, blob_id: str) -> None:
    before = open_bytes(client)
    client.transfer.open([blob_id, blob_id])  # nobody keeps the answer
    client.transfer.open([blob_id])[0].close()
    assert open_bytes(client) == before


def test_threads_share_a_blob(blob: Blob, content: bytes) -> None:
    failures: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            offset = rng.randrange(len(content))
            length = rng.randrange(min(200_000, len(content) - offset))
            found = bytes(blob.map(offset, length)) if seed % 2 else read(blob, offset, length)
            if found != content[offset : offset + length]:
                failures.append((seed, offset, length))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_mapped_bytes_stay_readable_after_the_daemon_died(
    own_daemon: DaemonProcess, way: str, content: bytes
) -> None:
    with forebay.connect(own_daemon.address()["rpc"]) as client:
        [blob] = client.transfer.open([store_blob(client, content, CUTS)])
        view = blob.map()
        own_daemon.kill()
        assert view == content


def test_a_restarted_daemon_is_found_again(own_daemon: DaemonProcess, way: str) -> None:
    """Bytes are served from another HTTP port and by another process; readers need not know."""
    with forebay.connect(own_daemon.address()["rpc"]) as client:
        with client.create_dataset("d", {"x": "int64"}) as writer:
            writer.write(x=7)
        dataset = client.dataset("d")
        [shard] = dataset.manifest.shards
        transfer = client.transfer
        [before] = transfer.open([shard.blob])
        content = read(before, 0, before.num_bytes)
        own_daemon.kill()
        own_daemon.start()  # not waited for: the client does
        [after] = transfer.open([shard.blob])
        assert read(after, 0, after.num_bytes) == content
        assert read(before, 0, before.num_bytes) == content
        assert dataset[0]["x"] == 7
