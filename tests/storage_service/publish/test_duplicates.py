"""Bytes that the node has already: dropped only where the copy that stays is good."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_server.testing.storage import Storage, open_storage
from forebay_server.tier.verify import verify_file
from forebay_wire.limits import MIB


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Storage]:
    async with open_storage(tmp_path) as opened:
        yield opened


async def replica_files(node: Storage, blob: str) -> dict[str, str]:
    """State to file of the blob's replicas."""
    located = (await node.catalog.locate([blob]))[blob]
    return {one.state: one.extents[0].file for one in located.replicas}


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
async def test_a_bad_copy_does_not_swallow_the_good_bytes(
    node: Storage, tmp_path: Path, damage: str
) -> None:
    data = os.urandom(3 * MIB)
    first = await node.upload(data)
    file = (await replica_files(node, first.blob))["live"]
    path = tmp_path / "ssd" / "files" / file[:2] / file
    if damage == "flipped":
        with path.open("r+b") as stored:
            stored.seek(2 * MIB)
            stored.write(bytes([data[2 * MIB] ^ 1]))
    elif damage == "cut":
        os.truncate(path, MIB)
    else:
        path.unlink()
    second = await node.upload(data)
    assert second.blob == first.blob
    files = await replica_files(node, first.blob)
    assert files["quarantined"] == file
    with node.tiers.get("ssd").read(files["live"]) as reader:
        verify_file(reader, first.blob)


async def test_a_good_copy_is_the_only_one_also_of_uploads_at_once(node: Storage) -> None:
    data = os.urandom(MIB)
    landed = await asyncio.gather(*(node.upload(data, owner=f"dataset {n}") for n in range(4)))
    assert len({one.blob for one in landed}) == 1
    assert list(await replica_files(node, landed[0].blob)) == ["live"]
    assert len(node.files()) == 1
