"""The trash: names are free at once, what was deleted comes back whole or not at all."""

import os
from pathlib import Path

import pytest

from forebay_server.catalog.queries_history import list_events
from forebay_server.catalog.queries_jobs import COLLECT, DELETE, FLUSH, TOMBSTONE
from forebay_server.catalog.queries_trash import EXPIRED, empty_trash
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.recovery import recover
from forebay_server.publish.shards import ShardCommit
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.storage import UID
from forebay_wire.errors import AlreadyExists, Conflict, NotFound
from forebay_wire.ids import GenerationId, new_random_name

HOUR = 3600.0


def names(folder: Path, kind: str) -> set[str]:
    return {path.name for path in (folder / "object" / kind).glob("*")}


def datasets_of(node: CheckpointNode, trash_seconds: float = HOUR) -> Datasets:
    storage = node.storage
    return Datasets(storage.catalog, storage.uploads, node.jobs, trash_seconds=trash_seconds)


async def commit(datasets: Datasets, node: CheckpointNode, name: str, data: bytes) -> None:
    landed = await node.storage.upload(data, owner=f"dataset {name}")
    shard = ShardCommit(landed.session, landed.blob, len(data), 1, (1,))
    await datasets.commit_version(
        VersionCommit(name, 0, b"schema", (shard,), new_random_name(), ""), UID
    )


async def save_remote(node: CheckpointNode, step: int, data: bytes) -> GenerationId:
    saved = await node.save(step, [data])
    assert (await node.wait(saved, "remote")).durability == "remote"
    return saved


async def test_a_deleted_dataset_is_gone_at_once_and_comes_back_whole(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        datasets = datasets_of(node)
        await commit(datasets, node, "d", os.urandom(1000))
        before = await datasets.define_splits("d", 0, {"train": 0.5, "test": 0.5}, 1)
        await node.settle(FLUSH)
        assert await datasets.delete("d")
        assert not await datasets.delete("d")
        with pytest.raises(NotFound):
            await datasets.get("d")
        (entry,) = await node.trash.list()
        assert (entry.target, entry.num_manifests) == ("dataset d", 3)
        assert 3000 < entry.expires_unix - entry.deleted_unix < 4000
        assert len(node.storage.files()) == 1
        assert names(tmp_path, "trash") == names(tmp_path, "manifests")
        assert (await node.trash.restore("dataset d")).deletion == entry.deletion
        found = await datasets.get("d")
        assert [one.manifest for one in found.versions] == [one.manifest for one in before.versions]
        assert found.selections == before.selections
        assert await node.trash.list() == []
        await node.settle(TOMBSTONE)
        assert names(tmp_path, "trash") == set()
        events = await node.storage.catalog.read(lambda c: list_events(c, ["dataset d"], 10))
        assert [one.event for one in events] == ["restored", "trashed"]


async def test_a_taken_name_is_not_restored_over(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        datasets = datasets_of(node)
        await commit(datasets, node, "d", b"old")
        (oldest,) = (await datasets.get("d")).versions
        await datasets.delete("d")
        await commit(datasets, node, "d", b"new")
        with pytest.raises(AlreadyExists, match="there is another one of that name"):
            await node.trash.restore("dataset d")
        await datasets.delete("d")
        newer, older = await node.trash.list()
        assert (await node.trash.restore("d")).deletion == newer.deletion
        await datasets.delete("d")
        again, still = await node.trash.list()
        assert still.deletion == older.deletion
        await node.trash.restore(older.deletion)
        assert (await datasets.get("d")).versions[0].manifest == oldest.manifest
        assert [one.deletion for one in await node.trash.list()] == [again.deletion]


async def test_a_name_that_may_mean_two_things_brings_back_none(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, trash_seconds=HOUR) as node:
        datasets = datasets_of(node)
        await commit(datasets, node, RUN, b"data")
        await datasets.delete(RUN)
        await node.begin()
        await save_remote(node, 1, os.urandom(1000))
        await node.checkpoints.delete_run(RUN)
        for call in (node.trash.restore, node.trash.empty):
            with pytest.raises(Conflict, match=f"any of 'dataset {RUN}', 'run {RUN}'"):
                await call(RUN)
        assert len(await node.trash.list()) == 2
        assert (await node.trash.restore(f"run {RUN}")).target == f"run {RUN}"
        assert (await node.trash.restore(RUN)).target == f"dataset {RUN}"


async def test_the_same_content_can_be_committed_again_while_it_lies_in_the_trash(
    tmp_path: Path,
) -> None:
    async with open_checkpoints(tmp_path) as node:
        datasets = datasets_of(node)
        await commit(datasets, node, "d", b"same")
        await node.settle(FLUSH)
        await datasets.delete("d")
        await commit(datasets, node, "d", b"same")
        assert await node.trash.list() == []
        await node.settle(FLUSH, TOMBSTONE)
        assert names(tmp_path, "trash") == set()
        assert (await datasets.get("d")).versions[0].durability == "remote"
    found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "recovered")
    assert (found.num_datasets, found.left_out) == (1, [])


async def test_an_emptied_trash_leaves_nothing_anywhere(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, trash_seconds=HOUR) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(1000))
        await save_remote(node, 2, os.urandom(1000))
        assert await node.checkpoints.delete_generation(GenerationId(RUN, 1, 1)) == 1
        await node.settle(TOMBSTONE, COLLECT)
        assert len(node.storage.files()) == 2
        assert await node.trash.empty() == 1
        await node.settle(DELETE, COLLECT)
        assert len(node.storage.files()) == 1
        assert names(tmp_path, "trash") == set()
        assert len(names(tmp_path, "manifests")) == len(names(tmp_path, "data")) == 1
        with pytest.raises(NotFound, match="the trash has no"):
            await node.trash.empty(f"generation {RUN}@1/1")


async def test_what_is_past_its_time_goes_and_nothing_before(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, trash_seconds=HOUR) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(1000))
        await node.checkpoints.delete_run(RUN)
        write = node.storage.catalog.write
        assert await write(lambda c: empty_trash(c, reason=EXPIRED)) == 0
        assert len(await node.trash.list()) == 1
    async with open_checkpoints(tmp_path / "short", trash_seconds=0.001) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(1000))
        await node.checkpoints.delete_run(RUN)
        await node.settle(TOMBSTONE)
        assert await node.storage.catalog.write(lambda c: empty_trash(c, reason=EXPIRED)) == 1
        node.jobs.wake()
        await node.settle(DELETE, COLLECT)
        assert node.storage.files() == []


async def test_a_run_comes_back_with_its_attempts_and_bytes(tmp_path: Path) -> None:
    data = [os.urandom(1000), os.urandom(500)]
    async with open_checkpoints(tmp_path, trash_seconds=HOUR) as node:
        await node.begin()
        first = await save_remote(node, 1, data[0])
        await node.begin((1, 1))
        second = await node.save(2, [data[1]], attempt=2, metrics_json='{"loss": 1.5}')
        before = await node.wait(second)
        assert await node.checkpoints.delete_run(RUN) == 2
        assert (await node.begin()).attempt == 3  # a name is used once
        with pytest.raises(AlreadyExists, match="another one of that name"):
            await node.trash.restore(f"run {RUN}")
        await node.checkpoints.delete_run_now(RUN)
        await node.trash.restore(f"run {RUN}")
        assert await node.restore(first) == [data[0]]
        assert await node.restore(second) == [data[1]]
        found = await node.checkpoints.generations.look(second)
        assert (found.metrics_json, found.parent) == (before.metrics_json, before.parent)
        assert (await node.begin()).attempt == 4
        assert (await node.wait(second, "remote")).durability == "remote"


async def test_one_generation_comes_back_to_its_own_run_only(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, trash_seconds=HOUR) as node:
        await node.begin()
        first = await save_remote(node, 1, os.urandom(100))
        await save_remote(node, 2, os.urandom(100))
        await node.checkpoints.delete_generation(first)
        await node.trash.restore(f"generation {first}")
        assert len(await node.restore(first)) == 1
        await node.checkpoints.delete_generation(first)
        await node.checkpoints.delete_run_now(RUN)
        with pytest.raises(Conflict, match="its run is gone"):
            await node.trash.restore(f"generation {first}")
        await node.begin()
        with pytest.raises(Conflict, match="is another one by now"):
            await node.trash.restore(f"generation {first}")


async def test_a_recovery_keeps_what_lies_in_the_trash_there(tmp_path: Path) -> None:
    data = os.urandom(1000)
    async with open_checkpoints(tmp_path, trash_seconds=HOUR) as node:
        await node.begin()
        kept = await save_remote(node, 1, os.urandom(100))
        deleted = await save_remote(node, 2, data)
        await node.checkpoints.delete_generation(deleted)
        await node.settle(TOMBSTONE)
    recovered = tmp_path / "recovered"
    found = await recover(f"file://{tmp_path / 'object'}", recovered)
    assert (found.num_generations, found.num_trashed, found.left_out) == (1, 1, [])
    (tmp_path / "object").rename(recovered / "object")
    async with open_checkpoints(recovered, trash_seconds=HOUR) as node:
        assert await node.latest() == "1/1"
        (entry,) = await node.trash.list()
        assert entry.target == f"generation {deleted}"
        await node.trash.restore(entry.deletion)
        assert await node.restore(deleted) == [data]
        assert await node.latest() == "1/2"
        assert len(await node.restore(kept)) == 1
