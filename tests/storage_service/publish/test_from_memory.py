"""Sealed generations are read from their slots while they land, and never anything else."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from forebay_server.catalog.queries_checkpoints import find_pack
from forebay_server.catalog.queries_runs import GenerationInfo
from forebay_server.model.states import PackState
from forebay_server.publish.seal import PackSeal
from forebay_server.publish.session import Piece
from forebay_server.serve.open import OpenedBlob, Opener
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.faults import StallingTier
from forebay_server.testing.storage import UID
from forebay_wire.errors import DeadlineExceeded, ForebayError, NotFound, StorageError
from forebay_wire.ids import GenerationId
from forebay_wire.limits import KIB, MIB
from forebay_wire.manifest import GenerationManifest, parse
from forebay_wire.segments import SegmentTable

SLOT_SPARE = 64 * KIB
"""What the tests' slots have beside the pack."""


@dataclass
class Memory:
    """A node whose landings stall while the gate is closed, and a client that opens blobs."""

    node: CheckpointNode
    gate: threading.Event
    tiers: list[StallingTier]
    opener: Opener

    async def resolve(
        self, selector: str = "latest", durability: str = "ram", timeout: float = 10.0
    ) -> GenerationInfo:
        return await self.node.checkpoints.generations.resolve(
            RUN, selector, durability, (), timeout
        )

    def manifest(self, info: GenerationInfo) -> GenerationManifest:
        """The manifest of a generation in memory."""
        assert info.manifest is not None
        data = self.node.checkpoints.generations.manifest_in_memory(info.manifest)
        assert data is not None
        found = parse(data, "memory", info.manifest)
        assert isinstance(found, GenerationManifest)
        return found

    async def open(self, blob: str, client: str = "me") -> OpenedBlob:
        [opened] = await self.opener.open(client, [blob])
        if isinstance(opened, ForebayError):
            raise opened
        return opened

    async def read(self, info: GenerationInfo) -> list[bytes]:
        """All packs, opened, verified and released."""
        found = []
        for pack in self.manifest(info).packs:
            opened = await self.open(pack.blob)
            found.append(checked(opened))
            opened.close()
            self.opener.release("me", [pack.blob])
        return found

    def stop_landing(self) -> None:
        """As where a daemon's time to drain is over."""
        for landing in list(self.node.storage.uploads._landings.running):
            landing.cancel()

    def used_bytes(self) -> int:
        return self.node.storage.tiers.slots.space().used_bytes


def checked(opened: OpenedBlob) -> bytes:
    """The bytes of an opened blob, each segment checked against its table."""
    encoded = os.pread(opened.descriptors[-1], opened.table_length, opened.table_offset)
    table = SegmentTable.decode(encoded, "test", opened.blob)
    data = os.pread(opened.fd, opened.length, 0)
    borders = table.offsets.tolist()
    for index, start in enumerate(borders[:-1]):
        table.check_identity(index, data[start : borders[index + 1]], "test")
    return data


@asynccontextmanager
async def open_memory(folder: Path, **options: Any) -> AsyncIterator[Memory]:
    gate = threading.Event()
    gate.set()
    tiers: list[StallingTier] = []

    def wrap(tier: Any) -> StallingTier:
        tiers.append(StallingTier(tier, "publish", gate))
        return tiers[-1]

    async with open_checkpoints(folder, with_object=False, wrap=wrap, **options) as node:
        opener = Opener(node.storage.tiers, node.storage.catalog)
        try:
            yield Memory(node, gate, tiers, opener)
        finally:
            gate.set()
            await opener.close()


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[Memory]:
    async with open_memory(tmp_path) as opened:
        yield opened


def random_packs(num_ranks: int, num_bytes: int = 200 * KIB) -> list[bytes]:
    return [os.urandom(num_bytes + rank) for rank in range(num_ranks)]


async def test_what_is_read_from_memory_is_what_will_be_committed(memory: Memory) -> None:
    node, packs = memory.node, random_packs(3)
    await node.begin(num_ranks=3)
    memory.gate.clear()
    saved = await node.save(1, packs, metrics_json='{"loss": 0.5}')
    info = await memory.resolve()
    assert (info.id, info.state, info.durability) == (saved, "sealed", "ram")
    assert await memory.read(info) == packs
    assert (await memory.resolve("1")).manifest == info.manifest
    manifest = memory.manifest(info)
    memory.gate.set()
    committed = await node.wait(saved)
    assert committed.manifest == info.manifest
    assert await node.manifest(saved) == manifest
    assert node.checkpoints.generations.manifest_in_memory(manifest.encode()[0]) is None
    assert await memory.resolve() == committed


async def test_a_pack_that_has_landed_is_read_from_its_tier(memory: Memory) -> None:
    node, (first, second) = memory.node, random_packs(2)
    await node.begin(num_ranks=2)
    generation = GenerationId(RUN, 1, 1)
    grant = await node.plan(generation, len(first), num_ranks=2)
    await node.seal(grant, first)

    def has_landed(connection: Connection) -> bool | None:
        pack = find_pack(connection, grant.session)
        return True if pack is not None and pack.state is PackState.LANDED else None

    assert await node.storage.catalog.wait_until(has_landed, 10.0)
    memory.gate.clear()
    await node.seal(await node.plan(generation, len(second), rank=1, num_ranks=2), second)
    info = await memory.resolve()
    assert await memory.read(info) == [first, second]
    opened = [await memory.open(pack.blob) for pack in memory.manifest(info).packs]
    assert [one.tier for one in opened] == ["ssd", "ram"]
    for one in opened:
        one.close()


async def test_empty_and_equal_packs(memory: Memory) -> None:
    await memory.node.begin(num_ranks=3)
    memory.gate.clear()
    await memory.node.save(1, [b"", b"same", b"same"])
    assert await memory.read(await memory.resolve()) == [b"", b"same", b"same"]


async def test_a_slot_is_not_lent_again_while_it_is_read(memory: Memory) -> None:
    node, (data,) = memory.node, random_packs(1)
    await node.begin()
    memory.gate.clear()
    grant = await node.plan(GenerationId(RUN, 1, 1), len(data))
    read = node.storage.uploads.slot(grant.session, UID)
    await node.seal(grant, data)
    (pack,) = memory.manifest(await memory.resolve()).packs
    opened = await memory.open(pack.blob)
    again = await memory.open(pack.blob, "another client")
    memory.gate.set()
    await node.wait(GenerationId(RUN, 1, 1))

    async def is_lent(count: int) -> bool:
        """Whether one of as many uploads gets the slot; they write all over theirs."""
        owner, size = f"run {RUN} attempt 1 rank 0", len(data)
        plans = [await node.storage.uploads.begin(UID, owner, size, size) for _ in range(count)]
        slots = [node.storage.uploads.slot(plan.session, UID) for plan in plans]
        for slot, plan in zip(slots, plans, strict=True):
            slot.view[:] = b"x" * len(slot.view)
            await node.storage.uploads.abort(plan.session, UID)
        return read in slots

    assert not await is_lent(1)
    assert checked(opened) == data
    opened.close()
    memory.opener.release("me", [pack.blob])
    assert not await is_lent(2)
    assert checked(again) == data
    again.close()
    memory.opener.close_client("another client")
    assert await is_lent(3)  # all that the owner has warm


async def test_a_landing_that_fails_leaves_readers_what_they_opened(memory: Memory) -> None:
    node, (older, data) = memory.node, random_packs(2)
    await node.begin()
    await node.wait(await node.save(1, [older]))
    memory.gate.clear()
    failing = await node.save(2, [data])
    info = await memory.resolve()
    (pack,) = memory.manifest(info).packs
    opened = await memory.open(pack.blob)
    await node.begin((1, 2))  # it was restored: the next attempt stands on it
    for tier in memory.tiers:
        tier.fail("publish")
    memory.gate.set()
    with pytest.raises(StorageError, match="run@1/2 failed"):
        await node.wait(failing)
    await node.checkpoints.close()
    assert checked(opened) == data
    assert memory.used_bytes() >= len(data)  # it counts as long as it is read
    with pytest.raises(NotFound):
        await memory.open(pack.blob)
    assert info.manifest is not None
    assert node.checkpoints.generations.manifest_in_memory(info.manifest) is None
    assert (await memory.resolve()).id.step == 1
    opened.close()
    memory.opener.close_client("me")
    assert memory.used_bytes() == 0


async def test_a_run_that_is_deleted_goes_once_nobody_reads_it(memory: Memory) -> None:
    node, (data,) = memory.node, random_packs(1)
    await node.begin()
    memory.gate.clear()
    await node.save(1, [data])
    (pack,) = memory.manifest(await memory.resolve()).packs
    opened = await memory.open(pack.blob)
    await node.checkpoints.delete_run(RUN)
    memory.gate.set()
    await node.storage.uploads.drain(10.0)
    await node.checkpoints.close()
    assert checked(opened) == data
    opened.close()
    memory.opener.close_client("me")
    with pytest.raises(NotFound):
        await memory.open(pack.blob)
    assert memory.used_bytes() == 0


async def test_a_slot_that_its_client_changed_is_not_opened_again(memory: Memory) -> None:
    node, (data,) = memory.node, random_packs(1)
    await node.begin()
    memory.gate.clear()
    grant = await node.plan(GenerationId(RUN, 1, 1), len(data))
    slot = node.storage.uploads.slot(grant.session, UID)
    await node.seal(grant, data)
    info = await memory.resolve()
    (pack,) = memory.manifest(info).packs
    assert await memory.opener.report(pack.blob, "ram", 0, "test")
    slot.view[1000] ^= 1
    assert not await memory.opener.report(pack.blob, "ram", 0, "test")
    with pytest.raises(NotFound):
        await memory.open(pack.blob)
    # Asked anew, the daemon offers what is there by now, under its own digests.
    now = await memory.resolve()
    assert now.manifest != info.manifest
    assert await memory.read(now) == [bytes(slot.view[: len(data)])]


async def test_a_pack_that_went_piece_by_piece_is_waited_for(memory: Memory) -> None:
    node = memory.node
    await node.begin()
    await node.wait(await node.save(1, random_packs(1)))
    memory.gate.clear()
    grant = await node.plan(GenerationId(RUN, 1, 2), 2 * KIB)
    slot = node.storage.uploads.slot(grant.session, UID)
    slot.view[:KIB] = os.urandom(KIB)
    await node.storage.uploads.append(grant.session, UID, Piece(0, KIB, (KIB,)))
    await seal_second_piece(node, grant.session)
    assert (await memory.resolve(timeout=0.0)).id.step == 1
    with pytest.raises(DeadlineExceeded, match="still landing"):
        await memory.resolve(timeout=0.05)
    waiting = asyncio.create_task(memory.resolve())
    memory.gate.set()
    info = await waiting
    assert (info.id.step, info.state) == (2, "committed")


async def seal_second_piece(node: CheckpointNode, session: str) -> None:
    slot = node.storage.uploads.slot(session, UID)
    slot.view[KIB : KIB + 2] = b"{}"
    await node.checkpoints.seal_pack(UID, PackSeal(session, 1, KIB, (KIB,), 2, "", ""))


async def test_no_memory_for_the_digests_means_to_wait(tmp_path: Path) -> None:
    num_bytes = MIB - SLOT_SPARE
    async with open_memory(tmp_path, ram_bytes=MIB) as memory:
        await memory.node.begin()
        memory.gate.clear()
        await memory.node.save(1, random_packs(1, num_bytes))
        assert memory.used_bytes() == MIB
        with pytest.raises(DeadlineExceeded, match="still landing"):
            await memory.resolve(timeout=0.05)
        memory.gate.set()
        assert (await memory.resolve()).state == "committed"


async def test_nothing_is_in_memory_after_a_restart(tmp_path: Path) -> None:
    async with open_memory(tmp_path) as memory:
        await memory.node.begin()
        await memory.node.wait(await memory.node.save(1, random_packs(1)))
        memory.gate.clear()
        await memory.node.save(2, random_packs(1))
        assert (await memory.resolve()).id.step == 2
        memory.stop_landing()
    async with open_memory(tmp_path) as memory:
        assert (await memory.resolve()).id.step == 1
        with pytest.raises(NotFound):
            await memory.resolve("1/2")
