"""Tiers that are away or dropped, sectors that cannot be read: what serves, and what comes back."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from forebay_server.catalog.queries_damage import mark_missing
from forebay_server.catalog.queries_jobs import COLLECT, RETURN, claim, enqueue
from forebay_server.locks import NamedLocks
from forebay_server.move.collect import Collector
from forebay_server.move.jobs import Progress
from forebay_server.move.returns import Returns
from forebay_server.serve.open import OpenedBlob, Opener
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_wire.errors import ForebayError, IntegrityError, StorageError

PIECES = [random_bytes(300_000, 1), random_bytes(200_000, 2)]
DATA = b"".join(PIECES)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[StorageNode]:
    async with StorageNode(tmp_path) as node:
        yield node


async def read_one(opener: Opener, blob: str) -> tuple[str, bytes]:
    """Tier and data of a blob."""
    [opened] = await opener.open("me", [blob])
    if isinstance(opened, ForebayError):
        raise opened
    assert isinstance(opened, OpenedBlob)
    with os.fdopen(opened.fd, "rb") as file:
        return opened.tier, file.read(opened.length)


async def job(node: StorageNode, kind: str, target: str) -> Progress:
    """A job that was queued and taken."""
    await node.catalog.write(lambda c: enqueue(c, kind, target))
    taken = await node.catalog.write(lambda c: claim(c, "me", 60, [kind]))
    assert taken is not None
    return Progress(taken, "me")


@pytest.fixture
def make_unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Has the kernel answer EIO for the data of a file, as for a bad sector."""

    def make(path: Path) -> None:
        inode, read = path.stat().st_ino, os.preadv

        def preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
            if os.fstat(descriptor).st_ino == inode and offset < 1000:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(descriptor, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)

    return make


# ----------------------------------------------------------------------------------- away, back


@pytest.mark.parametrize("is_mount_point", [False, True])
@pytest.mark.parametrize("tier", ["ssd", "object"])
async def test_a_tier_that_is_away_condemns_nothing(
    node: StorageNode, tier: str, is_mount_point: bool
) -> None:
    table = await node.add_blob(PIECES, tier)
    place, away = node.folder / tier, node.folder / "away"
    place.rename(away)
    if is_mount_point:
        place.mkdir()
    with pytest.raises(StorageError, match=f"tier {tier} .*is away"):
        await read_one(node.opener, table.blob_id)
    assert not await node.opener.report(table.blob_id, tier, 0, "gone")
    with pytest.raises(StorageError, match="is away"):
        node.tiers.get(tier).head(node.tiers.get(tier).blob_name("0" * 32))
    if is_mount_point:
        place.rmdir()
    away.rename(place)
    assert (await read_one(node.opener, table.blob_id))[1] == DATA


async def test_another_tier_serves_while_one_is_away(node: StorageNode) -> None:
    table = await node.add_blob(PIECES, "ssd", "hdd")
    assert (await read_one(node.opener, table.blob_id))[0] == "ssd"
    place, away = node.folder / "ssd", node.folder / "away"
    place.rename(away)
    assert await read_one(node.opener, table.blob_id) == ("hdd", DATA)
    away.rename(place)
    assert len((await node.locate(table.blob_id)).live()) == 2


async def test_a_good_quarantined_replica_serves_where_nothing_else_does(
    node: StorageNode,
) -> None:
    table = await node.add_blob(PIECES, "ssd")
    path = await node.path_of(table.blob_id, "ssd")
    path.rename(node.folder / "kept")
    with pytest.raises(IntegrityError, match="no undamaged replica"):
        await read_one(node.opener, table.blob_id)
    assert (await node.locate(table.blob_id)).live() == ()
    (node.folder / "kept").rename(path)
    assert await read_one(node.opener, table.blob_id) == ("ssd", DATA)
    assert len((await node.locate(table.blob_id)).live()) == 1


async def test_the_start_returns_what_is_good_and_only_that(node: StorageNode) -> None:
    good, bad = await node.add_blob(PIECES, "ssd"), await node.add_blob(PIECES[:1], "ssd")
    path = await node.path_of(bad.blob_id, "ssd")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    files = [(await node.locate(one.blob_id)).replicas[0].extents[0].file for one in (good, bad)]
    await node.catalog.write(lambda connection: mark_missing(connection, files, "gone"))
    await Returns(node.catalog, node.opener.return_good)(await job(node, RETURN, "quarantined"))
    assert len((await node.locate(good.blob_id)).live()) == 1
    assert (await node.locate(bad.blob_id)).live() == ()
    with pytest.raises(IntegrityError, match="no undamaged replica"):
        await read_one(node.opener, bad.blob_id)


# ----------------------------------------------------------------------------- unreadable sectors


async def test_an_unreadable_replica_is_damage_and_the_next_serves(
    node: StorageNode, make_unreadable: Callable[[Path], None]
) -> None:
    table = await node.add_blob(PIECES, "ssd", "hdd")
    assert (await read_one(node.opener, table.blob_id))[0] == "ssd"
    make_unreadable(await node.path_of(table.blob_id, "ssd"))
    assert not await node.opener.report(table.blob_id, "ssd", 0, "Input/output error")
    assert await read_one(node.opener, table.blob_id) == ("hdd", DATA)
    assert [one.tier for one in (await node.locate(table.blob_id)).live()] == ["hdd"]


async def test_without_another_replica_the_error_names_blob_and_tier(
    node: StorageNode, make_unreadable: Callable[[Path], None]
) -> None:
    table = await node.add_blob([b"short"], "ssd")
    make_unreadable(await node.path_of(table.blob_id, "ssd"))
    with pytest.raises(IntegrityError, match=rf"{table.blob_id}.*Input/output.*tier ssd"):
        await read_one(node.opener, table.blob_id)


# -------------------------------------------------------------------------------- dropped tiers


async def reopen(folder: Path) -> StorageNode:
    return StorageNode(folder, [DirectoryTier("ssd", "ssd", folder / "ssd", reserve_bytes=0)])


async def test_replicas_of_a_dropped_tier_are_passed_over(tmp_path: Path) -> None:
    async with StorageNode(tmp_path) as node:
        both = await node.add_blob(PIECES, "object", "hdd", "ssd")
        gone = await node.add_blob(PIECES[:1], "object")
    async with await reopen(tmp_path) as node:
        assert await read_one(node.opener, both.blob_id) == ("ssd", DATA)
        with pytest.raises(StorageError, match="tier object, which this daemon was started with"):
            await read_one(node.opener, gone.blob_id)
        assert len((await node.locate(both.blob_id)).live()) == 3


async def test_collecting_leaves_a_dropped_tiers_replicas_until_it_is_back(
    tmp_path: Path,
) -> None:
    async with StorageNode(tmp_path) as node:
        both = await node.add_blob(PIECES, "object", "ssd")
        await node.add_blob(PIECES[:1], "object")
        path = await node.path_of(both.blob_id, "object")
    async with await reopen(tmp_path) as node:
        collector = Collector(node.catalog, node.tiers, NamedLocks())
        await collector.collect(await job(node, COLLECT, "some"))
        assert node.tiers.get("ssd").space().num_files == 0
        assert [one.tier for one in (await node.locate(both.blob_id)).live()] == ["object"]
    assert path.exists()
    async with StorageNode(tmp_path) as node:
        collector = Collector(node.catalog, node.tiers, NamedLocks())
        await collector.collect(await job(node, COLLECT, "more"))
        assert not await node.catalog.locate([both.blob_id])
    assert not path.exists()
