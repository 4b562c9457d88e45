"""Statistics are kept as long as their version is: through recovery and the trash, not beyond."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from sqlalchemy import update

from forebay_server.catalog.queries_jobs import DELETE, FLUSH, TOMBSTONE
from forebay_server.catalog.tables import manifests
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.recovery import recover
from forebay_server.publish.shards import ShardCommit
from forebay_server.publish.statistics import MAX_STATISTICS_BYTES, KeptStatistics, Subject
from forebay_server.testing.checkpoints import CheckpointNode, open_checkpoints
from forebay_server.testing.storage import UID
from forebay_wire.errors import InvalidRequest, LimitExceeded, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.manifest import StatisticsManifest, parse


class Node:
    """A node with datasets and their statistics."""

    def __init__(self, node: CheckpointNode, trash_seconds: float = 0.0) -> None:
        self.node = node
        storage = node.storage
        self.datasets = Datasets(
            storage.catalog, storage.uploads, node.jobs, trash_seconds=trash_seconds
        )
        self.statistics = KeptStatistics(storage.catalog, node.jobs)

    async def commit(self, name: str) -> Subject:
        data = os.urandom(1000)
        landed = await self.node.storage.upload(data, owner=f"dataset {name}")
        shard = ShardCommit(landed.session, landed.blob, len(data), 10, (10,))
        commit = VersionCommit(name, 0, b"schema", (shard,), new_random_name())
        made = await self.datasets.commit_version(commit, UID)
        return Subject(name, made.version, made.manifest)

    async def store(self, of: Subject, replaces: bool = False, **columns: object) -> dict:
        figures = {name: {"mean": value} for name, value in columns.items()}
        records = await self.statistics.store(of, json.dumps(figures), replaces=replaces)
        return read(records)

    async def get(self, of: Subject) -> dict:
        return read(await self.statistics.get(of))


def read(records: list[tuple[str, bytes]]) -> dict:
    found: dict = {}
    for name, data in records:
        manifest = parse(data, "test", name)
        assert isinstance(manifest, StatisticsManifest)
        found.update({column: one["mean"] for column, one in manifest.columns.items()})
    return found


def published(folder: Path) -> int:
    return len(list((folder / "object" / "manifests").glob("*")))


async def test_the_first_one_wins_and_splits_have_their_own(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as opened:
        node = Node(opened)
        of = await node.commit("d")
        assert await node.get(of) == {}
        both = await asyncio.gather(node.store(of, x=1, y=2), node.store(of, y=3, z=4))
        last = await node.get(of)
        assert last in both
        assert (last["x"], last["z"]) == (1, 4)
        assert last["y"] in (2, 3)
        assert await node.store(of, replaces=True, y=5) == {**last, "y": 5}
        defined = await node.datasets.define_splits("d", 1, {"train": 0.5}, 0)
        train = Subject("d", 1, of.manifest, defined.selections[0].manifest)
        assert await node.get(train) == {}
        assert await node.store(train, x=9) == {"x": 9}
        assert (await node.get(of))["x"] == 1


async def test_what_is_not_there_or_too_much_is_refused(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as opened:
        node = Node(opened)
        of = await node.commit("d")
        for wrong in (
            Subject("d", 2, of.manifest),
            Subject("d", 1, "0" * 64),
            Subject("d", 1, of.manifest, "1" * 64),
        ):
            with pytest.raises(NotFound):
                await node.store(wrong, x=1)
        for text in ("[]", "{", '{"x": 1}'):
            with pytest.raises(InvalidRequest):
                await node.statistics.store(of, text, replaces=False)
        half = "x" * (MAX_STATISTICS_BYTES // 2)
        await node.store(of, x=half)
        with pytest.raises(LimitExceeded):
            await node.store(of, y=half)
        assert await node.get(of) == {"x": half}


async def test_they_come_back_from_the_object_tier(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as opened:
        node = Node(opened)
        of = await node.commit("d")
        defined = await node.datasets.define_splits("d", 1, {"train": 0.5}, 0)
        train = Subject("d", 1, of.manifest, defined.selections[0].manifest)
        await node.store(of, x=1)
        await node.store(train, x=2)
        await node.store(train, y=3)
        await opened.settle(FLUSH)
        assert published(tmp_path) == 5
    found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "new")
    assert (found.num_selections, found.num_statistics, found.left_out) == (1, 3, [])
    shutil.move(tmp_path / "object", tmp_path / "new" / "object")
    async with open_checkpoints(tmp_path / "new") as opened:
        node = Node(opened)
        assert (await node.get(of), await node.get(train)) == ({"x": 1}, {"x": 2, "y": 3})
        assert await node.datasets.delete("d")
        await opened.settle(DELETE)
        assert published(tmp_path / "new") == 0


async def test_those_of_a_version_that_is_lost_are_left_out(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as opened:
        node = Node(opened)
        of = await node.commit("d")
        await node.store(of, x=1)
        await opened.settle(FLUSH)
    (tmp_path / "object" / "manifests" / of.manifest).unlink()
    found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "new")
    assert found.num_statistics == 0
    assert [one.what for one in found.left_out] == ["statistics of version 1 of dataset d"]


async def test_they_go_with_their_dataset_and_come_back_with_it(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as opened:
        node = Node(opened, trash_seconds=3600)
        of = await node.commit("d")
        await node.store(of, x=1)
        assert await node.datasets.delete("d")
        with pytest.raises(NotFound):
            await node.get(of)
        again = await node.commit("d")
        assert await node.get(again) == {}
        assert await node.datasets.delete_now("d")
        await opened.trash.restore("dataset d")
        await opened.settle(TOMBSTONE)
        assert await node.get(of) == {"x": 1}


async def test_a_damaged_record_gives_way(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as opened:
        node = Node(opened)
        of = await node.commit("d")
        await node.store(of, x=1)
        ((name, data),) = await node.statistics.get(of)
        for columns in ({"x": 1}, {"y": 2}):
            damaged = data[:-3] + b"?" + data[-2:]
            await opened.storage.catalog.write(
                lambda connection, damaged=damaged: connection.execute(
                    update(manifests).where(manifests.c.manifest == name).values(data=damaged)
                )
            )
            assert await node.statistics.get(of) == [(name, damaged)]
            assert await node.store(of, **columns) == columns
            assert await node.get(of) == columns
