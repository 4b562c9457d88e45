"""What lies encoded in the object tier is what was written, bit for bit, for whoever reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import forebay
from forebay_server.model.extents import ObjectBlob
from forebay_server.publish.recovery import recover
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.tier.encode import open_plain
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.verify import verify_file

NUM_ROWS = 4000


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "weight": torch.randn(256, 1024, generator=generator) * 0.02,
        "half": (torch.randn(256, 1024, generator=generator) * 0.02).to(torch.bfloat16),
        "counts": torch.arange(50_000),
    }


def tokens(row: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.random.default_rng(row).zipf(1.3, 64).clip(0, 50_000).astype(np.int32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that holds a dataset and a generation, both remote; its daemon has ended."""
    data = tmp_path_factory.mktemp("encodings") / "data"
    with DaemonProcess(data) as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        with client.create_dataset("d", schema={"ids": forebay.Array("int32", (64,))}) as writer:
            for row in range(NUM_ROWS):
                writer.write(ids=tokens(row))
        with forebay.Checkpointer(client, run="r") as checkpointer:
            checkpointer.save(1, state=state()).wait("remote", timeout=60)
        client.wait_version("d", 1, "remote", timeout=60)
        daemon.terminate()
        daemon.wait_exit()
    return data


def listed(tier: RemoteTier) -> dict[str, ObjectBlob]:
    """Every blob of the object tier, by its extent lists alone."""
    blobs = [info.name.removeprefix("blobs/") for info in tier.list("blobs/")]
    return {blob: ObjectBlob.decode(tier.get(f"blobs/{blob}"), "here", blob) for blob in blobs}


def test_both_are_stored_smaller_and_read_back_as_they_landed(written: Path) -> None:
    """A second-hand reader: no daemon, no catalog, only the object tier."""
    tier = RemoteTier("object", f"file://{written / 'object'}")
    tier.open()
    landed = {path.read_bytes() for path in (written / "ssd" / "files").glob("*/*")}
    found = listed(tier)
    assert {one.encoding for one in found.values()} == {"shuffle-lz4"}
    for blob, one in found.items():
        [extent] = one.extents
        assert extent.file_bytes < one.table.total_bytes * 15 / 16
        with open_plain(
            tier, extent.file, one.encoding, blob, stored_bytes=extent.file_bytes
        ) as reader:
            assert verify_file(reader, blob).encoded == one.table.encoded
            image = bytearray(reader.size_bytes)
            reader.read_into(0, image)
        assert bytes(image) in landed
    tier.close()


@pytest.mark.parametrize("transport", ["local", "http"])
async def test_both_are_recovered_from_there(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    shutil.copytree(written / "object", tmp_path / "object")
    report = await recover(f"file://{tmp_path / 'object'}", tmp_path / "new")
    assert report.left_out == []
    if transport == "http":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    with (
        DaemonProcess(tmp_path / "new") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        [copy] = client.why("dataset d").copies
        assert (copy.tier, copy.encoding) == ("object", "shuffle-lz4")
        assert copy.stored_bytes < copy.num_bytes * 15 / 16
        (tier,) = [one for one in client.status().tiers if one.name == "object"]
        assert copy.num_bytes < tier.plain_bytes
        assert tier.used_bytes < tier.plain_bytes
        rows = client.dataset("d").take(np.arange(NUM_ROWS))["ids"]
        assert all(np.array_equal(rows[row], tokens(row)) for row in range(NUM_ROWS))
        with forebay.Checkpointer(client, run="r") as checkpointer:
            restored = checkpointer.restore("latest").state
    assert all(torch.equal(restored[name], value) for name, value in state().items())


async def test_a_flipped_bit_there_is_found_when_it_is_read(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "object", tmp_path / "object")
    for file in (tmp_path / "object" / "data").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 0x20
        file.write_bytes(content)
    await recover(f"file://{tmp_path / 'object'}", tmp_path / "new")
    with (
        DaemonProcess(tmp_path / "new") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        pytest.raises(forebay.IntegrityError, match="does not match"),
    ):
        client.dataset("d").take(np.arange(NUM_ROWS))
