"""Power lost at any moment: what was acknowledged is there, what is there is whole."""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy import select

import forebay
from forebay_server.catalog import tables
from forebay_server.publish.recovery import recover
from forebay_server.testing.checkpoints import CheckpointNode, open_checkpoints
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.power import How, Replay, parse, record
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import ForebayError

pytestmark = pytest.mark.needs("strace", package="strace")

RUN = "trained"


@dataclass
class Acknowledged:
    """What the daemon told its clients, and when they had it from it."""

    datasets: list[tuple[float, str]] = field(default_factory=list)
    asked_to_delete: list[tuple[float, str]] = field(default_factory=list)
    deleted: list[tuple[float, str]] = field(default_factory=list)
    local: list[tuple[float, int]] = field(default_factory=list)
    remote: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class Recording:
    """A daemon's life: its file operations and its promises."""

    data: Path
    trace: Path
    acknowledged: Acknowledged

    def replay(self) -> Replay:
        return Replay(self.data, parse(self.trace))


def write_dataset(client: forebay.Client, name: str) -> None:
    schema = {"row": "int64", "noise": forebay.Array("uint8", (1024,))}
    rng = np.random.default_rng(len(name))
    with client.create_dataset(
        name, schema=schema, shard_bytes=64 * 1024, batch_bytes=16 * 1024
    ) as writer:
        for row in range(100):
            writer.write(row=row, noise=rng.integers(0, 256, 1024, dtype=np.uint8))


def run_workload(client: forebay.Client, told: Acknowledged) -> None:
    for name in ("gone", "kept"):
        write_dataset(client, name)
        told.datasets.append((time.time(), name))
    with forebay.Checkpointer(client, run=RUN) as checkpointer:
        for step in (1, 2, 3):
            state = {"weight": torch.full((5000,), float(step)), "step": step}
            saved = checkpointer.save(step, state=state)
            saved.wait("local", timeout=60)
            told.local.append((time.time(), step))
            if step == 2:
                saved.wait("remote", timeout=60)
                told.remote.append((time.time(), step))
    told.asked_to_delete.append((time.time(), "gone"))
    client.delete_dataset("gone")
    told.deleted.append((time.time(), "gone"))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    folder = tmp_path_factory.mktemp("power").resolve()
    found = Recording(folder / "data", folder / "trace", Acknowledged())
    with DaemonProcess(found.data, prefix=record(found.trace)) as daemon:
        with forebay.connect(daemon.address()["rpc"]) as client:
            run_workload(client, found.acknowledged)
        daemon.kill()
        deadline = time.monotonic() + 60
        while not found.trace.read_text("ascii").rstrip().endswith("+++"):
            assert time.monotonic() < deadline, "the record has no end"
            time.sleep(0.05)
        yield found


async def check_manifests(node: CheckpointNode) -> None:
    """Every blob that anything names has a good copy."""
    blobs = await node.storage.catalog.read(
        lambda connection: connection.scalars(select(tables.manifest_blobs.c.blob)).all()
    )
    for blob in set(blobs):
        location = (await node.storage.catalog.locate([blob]))[blob]
        assert any(is_good(node, blob, replica) for replica in location.live()), blob


def is_good(node: CheckpointNode, blob, replica) -> bool:
    tier = node.storage.tiers.get(replica.tier)
    with suppress(ForebayError), tier.read(tier.blob_name(replica.extents[0].file)) as reader:
        verify_file(reader, blob)
        return True
    return False


async def check_state(folder: Path, told: Acknowledged, now: float) -> None:
    """A daemon's storage opens in *folder* and holds what was acknowledged before *now*."""
    async with open_checkpoints(folder, run_jobs=False) as node:
        await check_manifests(node)
        read = node.storage.catalog.read
        names = set(await read(lambda c: c.scalars(select(tables.versions.c.dataset)).all()))
        may_be_gone = {name for at, name in told.asked_to_delete if at <= now}
        assert {name for at, name in told.datasets if at <= now} - may_be_gone <= names
        assert not names & {name for at, name in told.deleted if at <= now}
        columns = tables.generations.c
        steps = await read(
            lambda c: c.scalars(select(columns.step).where(columns.state == "committed")).all()
        )
        assert {step for at, step in told.local if at <= now} <= set(steps)


async def check_recovery(folder: Path, told: Acknowledged, now: float) -> None:
    """What was acknowledged as remote before *now* comes back from the object tier alone."""
    if any(at <= now for at, _ in told.remote):
        found = await recover(f"file://{folder / 'object'}", folder.with_name("recovered"))
        assert found.num_generations >= 1


def check_all(recording: Recording, tmp_path: Path, moments: set[int], hows: list[How]) -> int:
    replay, told, num_checked = recording.replay(), recording.acknowledged, 0
    for number, call in enumerate(replay.steps()):
        if number not in moments:
            continue
        for how in hows:
            folder = tmp_path / f"{number}-{how}" / "data"
            replay.write_to(folder, how, seed=number)
            try:
                asyncio.run(check_state(folder, told, replay.now))
                asyncio.run(check_recovery(folder, told, replay.now))
            except BaseException as error:
                error.add_note(f"power lost after call {number}, {call.name}; unsynced: {how}")
                raise
            num_checked += 1
    return num_checked


def test_power_lost_at_some_moments(recording: Recording, tmp_path: Path) -> None:
    """Moments that stand for all: a sample, and the first after each promise."""
    replay = recording.replay()
    ends = [replay.now for _ in replay.steps()]
    moments = set(random.Random(5).sample(range(len(ends)), 12)) | {len(ends) - 1}
    told = recording.acknowledged
    for at, _ in [*told.datasets, *told.deleted, *told.local, *told.remote]:
        moments.add(max((n for n, end in enumerate(ends) if end <= at), default=0) + 1)
    assert check_all(recording, tmp_path, moments, ["none", "some"]) >= 30


@pytest.mark.slow
def test_power_lost_after_every_call(recording: Recording, tmp_path: Path) -> None:
    num_calls = sum(1 for _ in recording.replay().steps())
    hows: list[How] = ["none", "some", "all"]
    assert check_all(recording, tmp_path, set(range(num_calls)), hows) == 3 * num_calls


def test_a_daemon_serves_again_after_power_was_lost(recording: Recording, tmp_path: Path) -> None:
    replay = recording.replay()
    for _ in replay.steps():
        pass
    replay.write_to(tmp_path / "data", "none")
    with (
        DaemonProcess(tmp_path / "data") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        kept = client.dataset("kept")
        assert np.array_equal(kept.take(np.arange(100))["row"], np.arange(100))
        with forebay.Checkpointer(client, run=RUN) as checkpointer:
            resumed = checkpointer.restore("latest")
        assert resumed is not None
        assert resumed.step == 3
        assert resumed.state["weight"][0] == 3.0
