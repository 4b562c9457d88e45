"""Each limit at its edge, where the client enforces it: before anything is sent or mapped."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forebay
from forebay.checkpoint import manifest
from forebay.checkpoint.manifest import Description, TensorEntry
from forebay.dataset import write
from forebay.dataset.uploads import Upload, Uploads
from forebay.dataset.write import DatasetWriter
from forebay.methods import Blobs, Datasets
from forebay.testing.blobs import store_blob
from forebay.transfer import replica
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire import limits
from forebay_wire.limits import KIB, MIB
from forebay_wire.v1 import blobs_pb2, datasets_pb2


@pytest.fixture
def local_client(client: forebay.Client, way: str) -> forebay.Client:
    if way == "http":
        pytest.skip("nothing is mapped over HTTP")
    return client


def test_mappings(local_client: forebay.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [os.urandom(KIB) for _ in range(3)]
    names = [store_blob(local_client, one, [KIB]) for one in data]
    first, second, third = local_client.transfer.open(names)
    monkeypatch.setattr(replica, "MAX_MAPS_PER_CLIENT", replica._maps.number + 2)
    views = [blob.map(0, KIB) for blob in (first, second)]
    with pytest.raises(forebay.ResourceExhausted, match="let go of batches"):
        third.map(0, KIB)
    first.close()
    with pytest.raises(forebay.ResourceExhausted):  # a view of it still lives
        third.map(0, KIB)
    del views[0]
    assert third.map(0, KIB) == data[2]
    assert views == data[1:2]
    second.close()
    third.close()


def test_the_default_of_mappings_leaves_most_to_others() -> None:
    assert limits.MAX_OPEN_BLOBS_PER_CLIENT < limits.MAX_MAPS_PER_CLIENT < 65530 // 2


def test_more_writers_than_memory_take_turns(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with DaemonProcess(data, "--ram-bytes", "12MiB"), forebay.connect(data) as client:
        row = np.zeros(2 * MIB, np.uint8)

        def write(name: str) -> int:
            with client.create_dataset(name, shard_bytes=8 * MIB) as writer:
                for number in range(12):
                    writer.write(x=row + number)
            return client.dataset(name).num_rows

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(write, "abcd")) == [12] * 4


def test_shards_are_as_small_as_the_room_that_is_left(tmp_path: Path) -> None:
    data = tmp_path / "data"
    limits_of_tiers = ("--ssd-bytes", "40MiB", "--hdd-path", "none", "--object-url", "none")
    with DaemonProcess(data, *limits_of_tiers), forebay.connect(data) as client:
        rows = [np.full(MIB, number, np.uint8) for number in range(26)]

        def write(name: str) -> None:
            with client.create_dataset(name) as writer:
                for row in rows:
                    writer.write(x=row, name=name)

        write("first")
        found = client.dataset("first").take(range(26))["x"]
        assert np.array_equal(np.asarray(found), np.stack(rows))
        with pytest.raises(forebay.ResourceExhausted, match=r"tier ssd .* bytes needed"):
            write("second")


def fill(writer: DatasetWriter, num_shards: int) -> None:
    """Write *num_shards* shards of one row each."""
    with writer:
        for _ in range(num_shards):
            writer.write(x=os.urandom(40 * KIB))


def create(client: forebay.Client, name: str) -> DatasetWriter:
    return client.create_dataset(name, {"x": "binary"}, shard_bytes=64 * KIB)


def test_shards_of_a_version(client: forebay.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"shards-{os.urandom(4).hex()}"
    monkeypatch.setattr(write, "MAX_SHARDS_PER_VERSION", 3)
    sealed: list[Upload] = []
    real = Uploads.seal

    def seal(self: Uploads, upload: Upload, *arguments: Any) -> blobs_pb2.SealedBlob:
        sealed.append(upload)
        return real(self, upload, *arguments)

    monkeypatch.setattr(Uploads, "seal", seal)
    fill(create(client, name), 2)
    fill(client.append_dataset(name, shard_bytes=64 * KIB), 1)
    with pytest.raises(forebay.LimitExceeded, match=r"shards of a version: 4 is .* of 3"):
        fill(client.append_dataset(name, shard_bytes=64 * KIB), 1)
    assert len(sealed) == 3, "what no commit can name is not uploaded"
    assert client.dataset(name).version == 2


def test_bytes_of_a_commit(client: forebay.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    each = write.SHARD_COMMIT_BYTES + write.BATCH_COMMIT_BYTES
    monkeypatch.setattr(write, "MAX_COMMIT_BYTES", 2 * MIB + 2 * each)
    fill(create(client, f"commit-{os.urandom(4).hex()}"), 2)
    with pytest.raises(forebay.LimitExceeded, match="append the rest as another version"):
        fill(create(client, f"commit-{os.urandom(4).hex()}"), 3)


def test_what_a_shard_is_counted_with_is_enough() -> None:
    number = 100_000
    largest = (1 << 42, 1 << 32)
    commit = datasets_pb2.CommitVersionRequest(
        shards=[
            datasets_pb2.ShardCommit(
                session="f" * 32,
                blob="f" * 64,
                num_bytes=largest[0],
                num_rows=largest[1],
                batch_rows=np.full(number, (1 << 32) - 1).tolist(),
            )
        ]
    )
    assert commit.ByteSize() <= write.SHARD_COMMIT_BYTES + number * write.BATCH_COMMIT_BYTES


def test_bytes_of_a_message(client: forebay.Client) -> None:
    request = blobs_pb2.BeginUploadRequest(owner="o" * limits.MAX_MESSAGE_BYTES)
    with pytest.raises(forebay.LimitExceeded, match=r"bytes of Blobs\.BeginUpload"):
        client.channel.call(Blobs.BeginUpload, request)
    request.owner = "o" * (limits.MAX_MESSAGE_BYTES - 5)
    assert request.ByteSize() == limits.MAX_MESSAGE_BYTES
    with pytest.raises(forebay.InvalidRequest, match="owner"):  # it came as far as the daemon
        client.channel.call(Blobs.BeginUpload, request)
    assert Datasets.CommitVersion.max_request_bytes == limits.MAX_COMMIT_BYTES


def test_tensors_and_description_of_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = TensorEntry("t", torch.float32, (1,), (0,), (1,), 0)
    most = Description((entry,) * limits.MAX_TENSORS_PER_PACK, {})
    size = len(most.encode())
    with pytest.raises(forebay.LimitExceeded, match="tensors of a pack"):
        replace(most, tensors=(*most.tensors, entry)).encode()
    monkeypatch.setattr(manifest, "MAX_DESCRIPTION_BYTES", size)
    most.encode()
    monkeypatch.setattr(manifest, "MAX_DESCRIPTION_BYTES", size - 1)
    with pytest.raises(forebay.LimitExceeded, match="bytes of a pack's description"):
        most.encode()
