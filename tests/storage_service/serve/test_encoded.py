"""Encoded replicas: served decoded, copied, checked and condemned like raw ones."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from forebay_server.catalog.queries_blobs import known_files, remove_replica
from forebay_server.serve.open import OpenedBlob
from forebay_server.serve.promote import Place, places_of
from forebay_server.testing.node import StorageNode
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_wire.errors import ForebayError, IntegrityError
from forebay_wire.limits import MIB

PIECES = [np.arange(start, start + 75_000, dtype="<u4").tobytes() for start in (0, 1 << 20)]
DATA = b"".join(PIECES)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[StorageNode]:
    """A node whose slow tiers encode, with an ssd tier of 16 MiB."""
    tiers = (
        DirectoryTier("ssd", "ssd", tmp_path / "ssd", reserve_bytes=0, limit_bytes=16 * MIB),
        DirectoryTier("hdd", "hdd", tmp_path / "hdd", reserve_bytes=0),
        RemoteTier("object", f"file://{tmp_path}/object"),
    )
    for tier in tiers[1:]:
        tier.encoding = "auto"
    async with StorageNode(tmp_path, tiers) as node:
        yield node


async def add_encoded(node: StorageNode, *, only: bool = True) -> tuple[str, Place]:
    """A blob with an encoded replica in the hdd tier, and none elsewhere if *only*."""
    table = await node.add_blob(PIECES, "ssd")
    [source] = places_of(await node.locate(table.blob_id))
    assert await node.opener.bringer.bring(
        table.blob_id, "hdd", lambda tier, num_bytes: None, lambda connection: None
    )
    copied = await in_hdd(node, table.blob_id)
    if only:
        await drop(node, source)
    return table.blob_id, copied


async def in_hdd(node: StorageNode, blob: str) -> Place:
    [found] = [one for one in places_of(await node.locate(blob)) if one.tier == "hdd"]
    return found


async def drop(node: StorageNode, place: Place) -> None:
    [gone] = await node.catalog.write(
        lambda connection: remove_replica(connection, place.replica_id)
    )
    tier = node.tiers.get(place.tier)
    tier.delete(tier.blob_name(gone.file))
    node.opener.forget(place.blob)


async def read(node: StorageNode, blob: str) -> tuple[str, bytes]:
    """The tier that serves *blob*, and its bytes."""
    [opened] = await node.opener.open("me", [blob])
    if isinstance(opened, ForebayError):
        raise opened
    assert isinstance(opened, OpenedBlob)
    with os.fdopen(opened.fd, "rb") as file:
        return opened.tier, file.read(opened.length)


async def test_a_copy_into_a_tier_that_encodes_is_encoded(node: StorageNode) -> None:
    blob, copied = await add_encoded(node, only=False)
    assert (copied.tier, copied.encoding) == ("hdd", "shuffle-lz4")
    size = (await node.path_of(blob, "hdd")).stat().st_size
    assert node.tiers.get("hdd").head(copied.file) == size < len(DATA) / 2
    # What a start compares with the file.
    assert await node.catalog.read(lambda connection: known_files(connection, "hdd")) == {
        copied.file: size
    }


async def test_an_encoded_replica_is_promoted_raw(node: StorageNode) -> None:
    blob, _ = await add_encoded(node)
    assert await read(node, blob) == ("ssd", DATA)
    await node.opener.settle()
    places = {place.tier: place.encoding for place in places_of(await node.locate(blob))}
    assert places == {"ssd": "raw", "hdd": "shuffle-lz4"}


async def test_without_room_to_promote_it_is_served_from_memory(node: StorageNode) -> None:
    blob, _ = await add_encoded(node)
    ssd = node.tiers.get("ssd")
    with ssd.create("f" * 32, ssd.space().free_bytes):
        assert await read(node, blob) == ("ram", DATA)
    assert [place.tier for place in places_of(await node.locate(blob))] == ["hdd"]


async def test_a_raw_replica_beside_it_serves_as_it_is(node: StorageNode) -> None:
    blob, _ = await add_encoded(node, only=False)
    assert await read(node, blob) == ("ssd", DATA)


async def test_a_damaged_encoded_replica_is_found_and_never_served(node: StorageNode) -> None:
    blob, copied = await add_encoded(node)
    path = await node.path_of(blob, "hdd")
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="does not match"):
        await read(node, blob)
    [replica] = (await node.locate(blob)).replicas
    assert (replica.replica_id, replica.state) == (copied.replica_id, "quarantined")


async def test_a_report_of_a_good_encoded_replica_leaves_it_alone(node: StorageNode) -> None:
    blob, _ = await add_encoded(node)
    assert await node.opener.report(blob, "hdd", 0, "test")
    [replica] = (await node.locate(blob)).replicas
    assert replica.state == "live"


async def test_a_quarantined_encoded_replica_that_is_good_comes_back(node: StorageNode) -> None:
    blob, copied = await add_encoded(node)
    path = await node.path_of(blob, "hdd")
    path.rename(path.with_suffix(".away"))
    with pytest.raises(IntegrityError):
        await read(node, blob)
    path.with_suffix(".away").rename(path)
    assert await read(node, blob) == ("ssd", DATA)
    replicas = {one.replica_id: one.state for one in (await node.locate(blob)).replicas}
    assert replicas[copied.replica_id] == "live"
