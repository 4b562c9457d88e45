"""Why readers wait: each reason with a real cause, and all of them together make up the wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager

import pytest

from forebay_server.serve.promote import KeepWhatFits
from forebay_server.serve.stream import NUM_BUFFERS
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier import registry
from forebay_server.tier.course import Course, begin_course
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.retry import Retrier
from forebay_server.tier.store_client import StoreFault
from forebay_server.tier.wrap import ThrottledTier, TierWrapper
from forebay_wire.limits import KIB, MIB

ENDLESS = 1e15
SIZE = 2 * MIB + 4096
"""Of a segment that fills a buffer by itself: two of them are too large."""
LATENCY = 0.05


class Told(KeepWhatFits):
    """Keeps what fits, and what readers waited."""

    def __init__(self, tiers) -> None:
        super().__init__(tiers)
        self.waits: list[Mapping[str, float]] = []

    def waited(self, plan, seconds) -> None:
        assert plan == "p"
        self.waits.append(dict(seconds))


class GatedTier(TierWrapper):
    """Every large read waits for the gate."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.is_reached = threading.Event()

    @contextmanager
    def around(self, operation, name, num_bytes):
        if operation == "read_into" and num_bytes > 64 * KIB:
            self.is_reached.set()
            assert self.gate.wait(60)
        yield


def node(folder, slow, ssd=None) -> StorageNode:
    ssd = ssd or DirectoryTier("ssd", "ssd", folder / "ssd", reserve_bytes=0)
    return StorageNode(folder, (ssd, slow))


def store(folder) -> RemoteTier:
    return RemoteTier("object", f"file://{folder}/object")


async def open_and_time(storage: StorageNode, told: Told, *blobs: str):
    """What the daemon says of one wait, after a look that it says how long that was."""
    began = time.monotonic()
    opened = await storage.opener.open("c", blobs, "p")
    took = time.monotonic() - began
    for one in opened:
        one.close()
    waits = told.waits[-1]
    assert sum(waits.values()) == pytest.approx(took, rel=0.1, abs=0.02)
    return waits


def follow(storage: StorageNode) -> Told:
    told = Told(storage.tiers)
    storage.opener.follow(told)
    return told


async def test_a_distant_store_is_waited_for_as_origin(tmp_path):
    async with node(tmp_path, ThrottledTier(store(tmp_path), LATENCY, ENDLESS)) as storage:
        table = await storage.add_blob([random_bytes(MIB, 1)], "object")
        waits = await open_and_time(storage, follow(storage), table.blob_id)
        assert waits["origin"] >= 2 * LATENCY  # opening and reading


async def test_a_slow_disk_is_waited_for_as_tier(tmp_path):
    ssd = DirectoryTier("ssd", "ssd", tmp_path / "ssd", reserve_bytes=0)
    slow = ThrottledTier(ssd, LATENCY, ENDLESS)
    async with node(tmp_path, store(tmp_path), slow) as storage:
        table = await storage.add_blob([random_bytes(MIB, 1)], "object")
        other = await storage.add_blob([random_bytes(MIB, 2)], "ssd")
        told = follow(storage)
        fetched = await open_and_time(storage, told, table.blob_id)
        assert fetched["tier"] >= 3 * LATENCY  # to create, write and publish the copy
        assert fetched["origin"] < fetched["tier"]
        found = await open_and_time(storage, told, other.blob_id)
        assert found["tier"] >= LATENCY
        assert found["origin"] == 0


async def test_a_narrow_link_holds_readers_back(tmp_path):
    slow = ThrottledTier(store(tmp_path), 0.0, 2 * MIB)
    async with node(tmp_path, slow) as storage:
        table = await storage.add_blob([random_bytes(64 * KIB, 1)] * 16, "object")
        waits = await open_and_time(storage, follow(storage), table.blob_id)
        assert waits["throttle"] >= 0.45
        assert waits["throttle"] > waits["origin"]


def test_a_store_that_is_busy_holds_readers_back():
    course, tries = begin_course(Course()), []

    def call() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise StoreFault("busy", "503 Slow Down")

    began = time.monotonic()
    Retrier("tier object").run("reading", call)
    took = time.monotonic() - began
    told = course.so_far()
    assert told["throttle"] > 0.9 * took > 0
    assert sum(told.values()) == pytest.approx(took, rel=0.1, abs=0.02)


async def test_who_stands_behind_others_waits_in_the_queue(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.THREADS, "object", 1)
    slow = ThrottledTier(store(tmp_path), LATENCY, ENDLESS)
    async with node(tmp_path, slow) as storage:
        tables = [await storage.add_blob([random_bytes(MIB, n)], "object") for n in range(3)]
        told = follow(storage)
        await asyncio.gather(*(storage.opener.open("c", [one.blob_id], "p") for one in tables))
        first, *others = sorted(told.waits, key=lambda waits: waits["queue"])
        assert first["origin"] >= 2 * LATENCY
        for number, waits in enumerate(others, 1):
            assert waits["queue"] >= 0.8 * number * 2 * LATENCY
            assert waits["queue"] > first["queue"]


async def test_who_comes_late_to_a_fetch_waits_for_the_rest_of_it(tmp_path):
    slow = GatedTier(store(tmp_path))
    async with node(tmp_path, slow) as storage:
        table = await storage.add_blob([random_bytes(MIB, 1)], "object")
        told = follow(storage)
        early = asyncio.create_task(storage.opener.open("c", [table.blob_id], "p"))
        assert await asyncio.to_thread(slow.is_reached.wait, 60)
        await asyncio.sleep(0.3)
        late = asyncio.create_task(open_and_time(storage, told, table.blob_id))
        await asyncio.sleep(0.1)
        slow.gate.set()
        waits = await late
        [opened] = await early
        opened.close()
        [longer] = [one for one in told.waits if one != waits]
        assert longer["origin"] >= 0.35
        assert 0.05 <= waits["origin"] < longer["origin"] - 0.2


async def test_of_many_blobs_the_slowest_is_what_was_waited_for(tmp_path):
    async with node(tmp_path, ThrottledTier(store(tmp_path), LATENCY, ENDLESS)) as storage:
        tables = [await storage.add_blob([random_bytes(MIB, n)], "object") for n in range(3)]
        here = await storage.add_blob([random_bytes(MIB, 9)], "ssd")
        blobs = [one.blob_id for one in (*tables, here)]
        told = follow(storage)
        waits = await open_and_time(storage, told, *blobs)
        assert waits["origin"] >= 2 * LATENCY
        assert len(told.waits) == 1


async def test_a_stream_without_a_free_buffer_waits_in_the_queue(tmp_path):
    slow = store(tmp_path)
    ssd = DirectoryTier("ssd", "ssd", tmp_path / "ssd", limit_bytes=MIB, reserve_bytes=0)
    async with node(tmp_path, slow, ssd) as storage:
        table = await storage.add_blob(
            [random_bytes(SIZE, n) for n in range(NUM_BUFFERS + 1)], "object"
        )
        [opened] = await storage.opener.open("c", [table.blob_id], can_stream=True)
        assert opened.stream is not None
        streams = storage.opener.streams
        *first, last = opened.stream.parts(0, table.total_bytes)
        assert len(first) == NUM_BUFFERS
        held = [streams.part(opened.stream, part) for part in first]
        for one in held:
            await one.__aenter__()

        async def wait() -> tuple[float, dict[str, float]]:
            course, began = begin_course(Course()), time.monotonic()
            async with streams.part(opened.stream, last):
                return time.monotonic() - began, course.so_far()

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.3)
        for one in held:
            await one.__aexit__(None, None, None)
        took, told = await waiting
        assert told["queue"] >= 0.25
        assert sum(told.values()) == pytest.approx(took, rel=0.1, abs=0.02)
