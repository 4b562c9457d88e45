"""Reading ahead from a disk: one file after the other, each in order, in runs through the disk."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from forebay_server.ahead import Ahead
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.disk_place import disk_position
from forebay_server.tier.wrap import TierWrapper
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB, MIB

NUM_BLOBS = 32


class Disk(TierWrapper):
    """Writes down each read of data, and lets through as many as are allowed."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.reads: list[tuple[str, bool]] = []
        """The file, and whether a read began or ended."""
        self.allowed = threading.Semaphore(1_000_000)

    @contextmanager
    def around(self, operation, name, num_bytes):
        if operation != "read_into" or num_bytes < 64 * KIB:
            yield
            return
        self.reads.append((name, True))
        assert self.allowed.acquire(timeout=60)
        yield
        self.reads.append((name, False))

    @property
    def files(self) -> list[str]:
        """One after the other, as they were read."""
        return [name for name, _ in groupby(name for name, _ in self.reads)]


@asynccontextmanager
async def reading_ahead(folder: Path) -> AsyncIterator[tuple[StorageNode, Disk, Ahead]]:
    disk = Disk(DirectoryTier("hdd", "hdd", folder / "hdd", reserve_bytes=0))
    ssd = DirectoryTier("ssd", "ssd", folder / "ssd", reserve_bytes=0)
    async with StorageNode(folder, (ssd, disk)) as node:
        ahead = Ahead(node.tiers, node.catalog, node.opener)
        running = asyncio.create_task(ahead.run())
        try:
            yield node, disk, ahead
        finally:
            disk.allowed.release(1_000_000)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def plan(ahead: Ahead, blobs: Sequence[str]) -> None:
    name = new_random_name()
    await ahead.plans.register(name, "a test", None, 0, 0)
    ahead.plans.add_ranges(name, 0, [(1, [one]) for one in blobs])


async def wait_for(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def shuffled_blobs(node: StorageNode, size: int = 256 * KIB) -> dict[str, int]:
    """Blob to where it lies on the disk, in no order."""
    found = {}
    for seed in range(NUM_BLOBS):
        table = await node.add_blob([random_bytes(size, seed)], "hdd")
        path = await node.path_of(table.blob_id, "hdd")
        descriptor = os.open(path, os.O_RDONLY)
        found[table.blob_id] = disk_position(descriptor)
        os.close(descriptor)
    blobs = list(found)
    random.Random(7).shuffle(blobs)
    return {blob: found[blob] for blob in blobs}


def num_jumps_back(positions: Sequence[int]) -> int:
    return sum(after < before for before, after in pairwise(positions))


async def test_a_disk_is_read_in_runs_one_file_at_a_time(tmp_path):
    async with reading_ahead(tmp_path) as (node, disk, ahead):
        positions = await shuffled_blobs(node)
        by_file = {(await node.path_of(blob, "hdd")).name: at for blob, at in positions.items()}
        assert num_jumps_back(list(positions.values())) > 10  # in order of need
        await plan(ahead, list(positions))
        await wait_for(lambda: ahead.prefetcher.num_fetched == NUM_BLOBS)
        assert len(disk.files) == NUM_BLOBS
        assert num_jumps_back([by_file[name] for name in disk.files]) <= 5


async def test_what_is_needed_first_does_not_wait_for_the_end_of_the_disk(tmp_path):
    """It lies last there, and is late: so at most those come before it that a sweep passes in the
    time that it may be later still."""
    async with reading_ahead(tmp_path) as (node, disk, ahead):
        positions = await shuffled_blobs(node, MIB)
        disk.allowed = threading.Semaphore(0)
        *many, urgent = sorted(positions, key=lambda blob: positions[blob])
        await plan(ahead, many)
        await wait_for(lambda: disk.reads)
        await plan(ahead, [urgent])
        disk.allowed.release(1_000_000)
        await wait_for(lambda: ahead.prefetcher.num_fetched == NUM_BLOBS)
        file = (await node.path_of(urgent, "hdd")).name
        assert disk.files.index(file) < NUM_BLOBS / 2


async def test_a_large_blob_is_read_whole_and_in_order(tmp_path):
    async with reading_ahead(tmp_path) as (node, disk, ahead):
        pieces = [random_bytes(512 * KIB, seed) for seed in range(20)]
        large = [await node.add_blob(pieces[:number], "hdd") for number in (20, 19, 18)]
        assert all(one.total_bytes > 8 * MIB for one in large)
        await plan(ahead, [one.blob_id for one in large])
        await wait_for(lambda: ahead.prefetcher.num_fetched == len(large))
        assert len(disk.files) == len(large)
        assert all(  # each read ends before the next one begins
            (before[1], after[1]) in ((True, False), (False, True))
            for before, after in pairwise(disk.reads)
        )


def test_a_place_on_the_disk_grows_along_a_folder_or_is_an_inode(tmp_path):
    found = []
    for number in range(3):
        path = tmp_path / str(number)
        path.write_bytes(os.urandom(64 * KIB))
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        found.append(disk_position(descriptor))
        os.close(descriptor)
    assert len(set(found)) == 3
    assert all(at > 0 for at in found)


def test_what_the_kernel_tells_of_a_file_that_has_no_place():
    memory = os.memfd_create("x")
    try:
        assert disk_position(memory) == os.fstat(memory).st_ino
    finally:
        os.close(memory)
    with pytest.raises(OSError):
        disk_position(memory)
