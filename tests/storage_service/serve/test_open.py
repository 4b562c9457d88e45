"""Opening blobs: the best good copy, promotion, windows, caps, damage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_server.catalog.queries_blobs import remove_replica
from forebay_server.serve.holds import Holds
from forebay_server.serve.open import OpenedBlob, Opener
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_wire.errors import (
    ForebayError,
    IntegrityError,
    LimitExceeded,
    NotFound,
    ResourceExhausted,
)
from forebay_wire.segments import SegmentTable

PIECES = [random_bytes(300_000, 1), random_bytes(200_000, 2)]
DATA = b"".join(PIECES)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[StorageNode]:
    async with StorageNode(tmp_path) as node:
        yield node


async def open_one(opener: Opener, blob: str, client: str = "me") -> OpenedBlob:
    [opened] = await opener.open(client, [blob])
    if isinstance(opened, ForebayError):
        raise opened
    return opened


def read_and_close(opened: OpenedBlob) -> bytes:
    """The data of an opened blob, after a look at its table."""
    with os.fdopen(opened.fd, "rb") as file:
        content = file.read()
    end = opened.table_offset + opened.table_length
    SegmentTable.decode(content[opened.table_offset : end], "test", opened.blob)
    [(blob_offset, _, file_offset, length)] = opened.extents
    assert (blob_offset, length) == (0, opened.length)
    return content[file_offset : file_offset + length]


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


async def test_the_fastest_tier_serves(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "object", "hdd", "ssd")
    opened = await open_one(node.opener, table.blob_id)
    assert opened.tier == "ssd"
    assert read_and_close(opened) == DATA


async def test_an_opened_descriptor_cannot_be_written(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd")
    opened = await open_one(node.opener, table.blob_id)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(opened.fd, b"x", 0)
    os.close(opened.fd)


async def test_the_empty_blob_opens(node: StorageNode) -> None:
    table = await node.add_blob([], "ssd")
    opened = await open_one(node.opener, table.blob_id)
    os.close(opened.fd)
    assert (opened.length, opened.extents) == (0, ())


async def test_an_unknown_blob_is_not_found_beside_good_ones(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd")
    good, bad = await node.opener.open("me", [table.blob_id, "0" * 64])
    assert isinstance(good, OpenedBlob)
    assert isinstance(bad, NotFound)
    os.close(good.fd)


async def test_the_second_open_needs_no_catalog(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd")
    assert node.opener.open_cached("me", [table.blob_id]) is None
    os.close((await open_one(node.opener, table.blob_id)).fd)
    cached = node.opener.open_cached("me", [table.blob_id])
    assert cached is not None
    assert read_and_close(cached[0]) == DATA
    node.opener.forget(table.blob_id)
    assert node.opener.open_cached("me", [table.blob_id]) is None


async def test_a_replica_that_moved_is_found_again(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd", "hdd")
    os.close((await open_one(node.opener, table.blob_id)).fd)
    [replica] = [one for one in (await node.locate(table.blob_id)).live() if one.tier == "ssd"]
    [gone] = await node.catalog.write(
        lambda connection: remove_replica(connection, replica.replica_id)
    )
    node.tiers.get("ssd").delete(gone.file)
    opened = await open_one(node.opener, table.blob_id)
    assert opened.tier == "hdd"
    assert read_and_close(opened) == DATA


# -------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("is_remembered", [False, True])
async def test_a_truncated_replica_is_quarantined_and_the_next_serves(
    node: StorageNode, is_remembered: bool
) -> None:
    table = await node.add_blob(PIECES, "ssd", "hdd")
    if is_remembered:
        os.close((await open_one(node.opener, table.blob_id)).fd)
    path = await node.path_of(table.blob_id, "ssd")
    os.truncate(path, path.stat().st_size - 1)
    opened = await open_one(node.opener, table.blob_id)
    assert opened.tier == "hdd"
    assert read_and_close(opened) == DATA
    live = (await node.locate(table.blob_id)).live()
    assert [replica.tier for replica in live] == ["hdd"]


async def test_a_damaged_segment_table_is_never_handed_over(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd")
    flip_bit(await node.path_of(table.blob_id, "ssd"), len(DATA) + 40)
    with pytest.raises(IntegrityError, match=table.blob_id):
        await open_one(node.opener, table.blob_id)
    with pytest.raises(IntegrityError, match="quarantined"):
        await open_one(node.opener, table.blob_id)


async def test_a_deleted_file_is_quarantined_and_the_next_serves(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd", "hdd")
    (await node.path_of(table.blob_id, "ssd")).unlink()
    opened = await open_one(node.opener, table.blob_id)
    assert read_and_close(opened) == DATA
    assert opened.tier == "hdd"


async def test_a_true_report_quarantines_and_a_false_one_does_not(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd", "hdd")
    assert await node.opener.report(table.blob_id, "ssd", 0, "looks bad")
    flip_bit(await node.path_of(table.blob_id, "ssd"), 10)
    reports = [node.opener.report(table.blob_id, "ssd", 0, "looks bad") for _ in range(5)]
    assert await asyncio.gather(*reports) == [False] * 5
    assert not await node.opener.report(table.blob_id, "ssd", 0, "still bad")
    opened = await open_one(node.opener, table.blob_id)
    assert opened.tier == "hdd"
    os.close(opened.fd)


# ----------------------------------------------------------------------------------- promotion


async def test_a_blob_of_the_object_tier_is_fetched_once_for_all(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "object")
    opens = [open_one(node.opener, table.blob_id, f"client {number}") for number in range(20)]
    for opened in await asyncio.gather(*opens):
        assert opened.tier == "ssd"
        assert read_and_close(opened) == DATA
    await node.opener.settle()
    live = (await node.locate(table.blob_id)).live()
    assert sorted(replica.tier for replica in live) == ["object", "ssd"]
    assert node.tiers.get("ssd").space().num_files == 1


async def test_a_damaged_object_is_not_promoted(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "object")
    flip_bit(await node.path_of(table.blob_id, "object"), 300_001)
    with pytest.raises(IntegrityError, match="segment 1"):
        await open_one(node.opener, table.blob_id)
    assert node.tiers.get("ssd").space().num_files == 0


async def test_a_promoted_copy_replaces_a_damaged_one(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd", "object")
    flip_bit(await node.path_of(table.blob_id, "ssd"), 5)
    assert not await node.opener.report(table.blob_id, "ssd", 0, "bad")
    opened = await open_one(node.opener, table.blob_id)
    assert opened.tier == "ssd"
    assert read_and_close(opened) == DATA


async def test_an_interrupted_open_leaves_the_fetch_to_the_others(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "object")
    impatient = asyncio.create_task(node.opener.open("impatient", [table.blob_id]))
    patient = asyncio.create_task(node.opener.open("patient", [table.blob_id]))
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    [opened] = await patient
    assert isinstance(opened, OpenedBlob)
    assert read_and_close(opened) == DATA


# ------------------------------------------------------------------------------------- windows


@pytest.fixture
async def full_node(tmp_path: Path) -> AsyncIterator[StorageNode]:
    """A node whose only landing tier takes nothing."""
    tiers = [
        DirectoryTier("ssd", "ssd", tmp_path / "ssd", limit_bytes=4096, reserve_bytes=0),
        RemoteTier("object", f"file://{tmp_path}/object"),
    ]
    async with StorageNode(tmp_path, tiers) as node:
        yield node


async def test_without_room_a_window_in_memory_serves(full_node: StorageNode) -> None:
    table = await full_node.add_blob(PIECES, "object")
    opens = [open_one(full_node.opener, table.blob_id, f"client {n}") for n in range(5)]
    for opened in await asyncio.gather(*opens):
        assert opened.tier == "ram"
        with pytest.raises(OSError, match=r"Bad file descriptor|not permitted"):
            os.pwrite(opened.fd, b"x", 0)
        assert read_and_close(opened) == DATA
    cached = full_node.opener.open_cached("late", [table.blob_id])
    assert cached is not None
    assert cached[0].tier == "ram"
    os.close(cached[0].fd)
    assert full_node.opener.open_bytes() == {"ram": 6 * len(DATA)}
    assert full_node.slots.space().used_bytes >= len(DATA)


async def test_a_window_goes_with_its_last_holder(full_node: StorageNode) -> None:
    table = await full_node.add_blob(PIECES, "object")
    for client in ("one", "two"):
        os.close((await open_one(full_node.opener, table.blob_id, client)).fd)
    full_node.opener.release("one", [table.blob_id])
    assert full_node.opener.open_cached("three", [table.blob_id])
    full_node.opener.close_client("three")
    assert full_node.slots.space().used_bytes > 0
    full_node.opener.close_client("two")
    assert full_node.slots.space().used_bytes == 0
    assert full_node.opener.open_cached("four", [table.blob_id]) is None


async def test_without_room_and_memory_the_error_has_numbers(full_node: StorageNode) -> None:
    slot = full_node.slots.acquire("0:busy", 64 << 20, 64 << 20)
    table = await full_node.add_blob(PIECES, "object")
    with pytest.raises(ResourceExhausted, match=r"\d+ bytes needed, 0 free"):
        await open_one(full_node.opener, table.blob_id)
    full_node.slots.release(slot)
    full_node.slots.drop_owner("0:busy")
    os.close((await open_one(full_node.opener, table.blob_id)).fd)


# ---------------------------------------------------------------------------------- open counts


async def test_open_bytes_count_until_released_or_closed(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd")
    for client in ("one", "one", "two"):
        os.close((await open_one(node.opener, table.blob_id, client)).fd)
    assert node.opener.open_bytes() == {"ssd": 3 * len(DATA)}
    node.opener.release("one", [table.blob_id, "0" * 64])
    assert node.opener.open_bytes() == {"ssd": 2 * len(DATA)}
    node.opener.close_client("one")
    assert node.opener.is_open(table.blob_id)
    node.opener.release("two", [table.blob_id])
    assert not node.opener.is_open(table.blob_id)
    assert node.opener.open_bytes() == {}


async def test_one_client_may_not_hold_too_much(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd")
    by_count = Opener(node.tiers, node.catalog, Holds(max_blobs=2))
    by_bytes = Opener(node.tiers, node.catalog, Holds(max_bytes=2 * len(DATA)))
    for opener in (by_count, by_bytes):
        for _ in range(2):
            os.close((await open_one(opener, table.blob_id)).fd)
        with pytest.raises(LimitExceeded, match="close some first"):
            await open_one(opener, table.blob_id)
        os.close((await open_one(opener, table.blob_id, "another client")).fd)
        opener.release("me", [table.blob_id])
        os.close((await open_one(opener, table.blob_id)).fd)


async def test_no_descriptor_leaks(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd", "object")
    opener = Opener(node.tiers, node.catalog, Holds(max_blobs=1))
    os.close((await open_one(opener, table.blob_id)).fd)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(LimitExceeded):
            opener.open_cached("me", [table.blob_id] * 2)
        assert opener.open_cached("other", [table.blob_id, "0" * 64]) is None
    assert len(os.listdir("/proc/self/fd")) == before
