"""Recovery where a name was deleted and used again, with the old one's manifests left behind."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from forebay_server.catalog.queries_jobs import COLLECT, DELETE, FLUSH
from forebay_server.catalog.queries_settings import LAST_MOMENT, pass_moment, put_setting
from forebay_server.catalog.tables import attempts, history, settings
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.recovery import Recovered, recover
from forebay_server.publish.shards import ShardCommit
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.storage import UID
from forebay_wire.ids import GenerationId, new_random_name
from forebay_wire.limits import KIB
from forebay_wire.manifest import read_stamp


def datasets_of(node: CheckpointNode) -> Datasets:
    return Datasets(node.storage.catalog, node.storage.uploads, node.jobs)


async def write(node: CheckpointNode, base: int, data: bytes | None = None) -> str:
    """Create or append to dataset d; the manifest."""
    data = os.urandom(KIB) if data is None else data
    landed = await node.storage.upload(data)
    shard = ShardCommit(landed.session, landed.blob, len(data), 10, (10,))
    commit = VersionCommit("d", base, b"schema", (shard,), new_random_name())
    return (await datasets_of(node).commit_version(commit, UID)).manifest


async def split(node: CheckpointNode, fraction: float) -> str:
    found = await datasets_of(node).define_splits("d", 0, {"train": fraction}, 0)
    return found.selections[-1].manifest


class Tier:
    """The object tier of a folder, with what a deletion that did not reach it leaves there."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "object"
        self._copy = folder / "copy"

    def remember(self) -> None:
        shutil.copytree(self.place, self._copy)

    def bring_back(self) -> None:
        """Put the objects back that were there then, unless something has their names now."""
        for old in self._copy.rglob("*"):
            new = self.place / old.relative_to(self._copy)
            if old.is_file() and not new.exists():
                shutil.copy(old, new)

    def manifest(self, name: str) -> Path:
        return self.place / "manifests" / name


async def rebuild(tier: Tier, target: Path) -> Recovered:
    found = await recover(f"file://{tier.place}", target)
    shutil.move(tier.place, target / "object")
    return found


async def versions_in(folder: Path) -> list[str]:
    async with open_checkpoints(folder) as node:
        return [one.manifest for one in (await datasets_of(node).get("d")).versions]


# Ids are random: with several rounds an order by id is wrong in one of them.
@pytest.mark.parametrize("number", range(4))
async def test_of_two_datasets_with_one_name_the_newer_one_comes_back(
    tmp_path: Path, number: int
) -> None:
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        for base in (0, 1, 2):
            await write(node, base)
        await split(node, 0.9)
        await node.settle(FLUSH)
        tier.remember()
        await datasets_of(node).delete("d")
        new = [await write(node, base) for base in (0, 1)]
        selection = await split(node, 0.5)
        await node.settle(FLUSH)
    tier.bring_back()
    found = await rebuild(tier, tmp_path / "new")
    assert (found.num_datasets, found.num_versions, found.num_selections) == (1, 2, 1)
    assert sorted(one.what for one in found.left_out) == [
        "selection train of version 3 of dataset d",
        *(f"version {number} of dataset d" for number in (1, 2, 3)),
    ]
    assert {one.reason for one in found.left_out} == {
        "it belongs to an older dataset d: that was deleted, and made again later"
    }
    async with open_checkpoints(tmp_path / "new") as node:
        info = await datasets_of(node).get("d")
        assert [one.manifest for one in info.versions] == new
        assert [one.manifest for one in info.selections] == [selection]
        assert await write(node, 2)


async def test_equal_content_has_an_equal_id_and_the_old_rest_stays_away(tmp_path: Path) -> None:
    first, second = os.urandom(KIB), os.urandom(KIB)
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        old = [await write(node, 0, first), await write(node, 1, second), await write(node, 2)]
        await split(node, 0.9)
        await node.settle(FLUSH)
        tier.remember()
        await datasets_of(node).delete("d")
        await node.settle(DELETE, COLLECT)
        new = [await write(node, 0, first), await write(node, 1, second)]
        assert new == old[:2]
        await node.settle(FLUSH)
    tier.bring_back()
    found = await rebuild(tier, tmp_path / "new")
    assert (found.num_versions, found.num_selections, len(found.left_out)) == (2, 0, 2)
    assert await versions_in(tmp_path / "new") == new


async def test_the_older_one_comes_back_where_nothing_of_the_newer_is_whole(tmp_path: Path) -> None:
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        old = [await write(node, base) for base in (0, 1)]
        await node.settle(FLUSH)
        tier.remember()
        await datasets_of(node).delete("d")
        await node.settle(DELETE, COLLECT)
        await write(node, 0)
        await node.settle(FLUSH)
    for blob in (tier.place / "data").iterdir():
        os.truncate(blob, 10)
    tier.bring_back()
    found = await rebuild(tier, tmp_path / "new")
    assert [one.what for one in found.left_out] == ["version 1 of dataset d"]
    assert "bytes" in found.left_out[0].reason
    assert await versions_in(tmp_path / "new") == old


async def test_a_version_that_is_lost_is_a_gap(tmp_path: Path) -> None:
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        made = [await write(node, base) for base in (0, 1, 2)]
        await node.settle(FLUSH)
    tier.manifest(made[1]).unlink()
    found = await rebuild(tier, tmp_path / "new")
    assert (found.num_versions, found.left_out) == (2, [])
    assert await versions_in(tmp_path / "new") == [made[0], made[2]]


async def test_what_an_older_copy_of_the_catalog_commits_last_is_the_chain(tmp_path: Path) -> None:
    """The catalog is restored from a backup: version 2 is made twice."""
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        first = await write(node, 0)
        await node.settle(FLUSH)
    shutil.copy(tmp_path / "catalog.sqlite", tmp_path / "backup")
    async with open_checkpoints(tmp_path) as node:
        await write(node, 1)
        await write(node, 2)
        await node.settle(FLUSH)
    shutil.copy(tmp_path / "backup", tmp_path / "catalog.sqlite")
    async with open_checkpoints(tmp_path) as node:
        last = await write(node, 1)
        await node.settle(FLUSH)
    found = await rebuild(tier, tmp_path / "new")
    assert sorted((one.what, one.reason) for one in found.left_out) == [
        (f"version {number} of dataset d", "version 2, committed later, does not stand on it")
        for number in (2, 3)
    ]
    assert await versions_in(tmp_path / "new") == [first, last]


async def test_a_lost_version_is_not_replaced_by_one_of_another_chain(tmp_path: Path) -> None:
    """The catalog is restored from a backup; then version 2 as it was made again is lost."""
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        first = await write(node, 0)
        await node.settle(FLUSH)
    shutil.copy(tmp_path / "catalog.sqlite", tmp_path / "backup")
    async with open_checkpoints(tmp_path) as node:
        await write(node, 1)
        await node.settle(FLUSH)
    shutil.copy(tmp_path / "backup", tmp_path / "catalog.sqlite")
    async with open_checkpoints(tmp_path) as node:
        second, third = await write(node, 1), await write(node, 2)
        await node.settle(FLUSH)
    tier.manifest(second).unlink()
    found = await rebuild(tier, tmp_path / "new")
    assert [one.what for one in found.left_out] == ["version 2 of dataset d"]
    assert await versions_in(tmp_path / "new") == [first, third]


async def test_a_manifest_under_the_name_of_another_is_left_out(tmp_path: Path) -> None:
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        made = [await write(node, base) for base in (0, 1)]
        await node.settle(FLUSH)
    tier.manifest(made[1]).rename(tier.manifest("0" * 64))
    found = await rebuild(tier, tmp_path / "new")
    assert [one.what for one in found.left_out] == [f"manifest {'0' * 64}"]
    assert f"this is manifest {made[1]}" in found.left_out[0].reason
    assert await versions_in(tmp_path / "new") == made[:1]


async def test_of_two_runs_with_one_name_the_newer_one_comes_back(tmp_path: Path) -> None:
    """Earlier releases counted a deleted run's attempts from 1 again; object tiers have such."""
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        for step in (10, 20, 30):
            await node.wait(await node.save(step, [b"old %d" % step]), "remote")
        tier.remember()
        await node.checkpoints.delete_run(RUN)
        await node.settle(DELETE, COLLECT)
        forgotten = delete(settings).where(settings.c.key.startswith("last_attempt/"))
        await node.storage.catalog.write(lambda c: c.execute(forgotten))
        await node.begin()
        for step in (10, 20):
            await node.wait(await node.save(step, [b"new %d" % step]), "remote")
    tier.bring_back()
    found = await rebuild(tier, tmp_path / "new")
    assert found.num_generations == 2
    assert sorted(one.what for one in found.left_out) == [
        f"generation {RUN}@1/{step}" for step in (10, 20, 30)
    ]
    async with open_checkpoints(tmp_path / "new") as node:
        assert await node.latest() == "1/20"
        assert await node.restore(GenerationId(RUN, 1, 10)) == [b"new 10"]


async def test_a_step_that_was_deleted_and_saved_again_comes_back_as_saved_last(
    tmp_path: Path,
) -> None:
    """Releases before schema 9 let a step be saved again; object tiers have such generations."""
    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        for step in (1, 2):
            await node.wait(await node.save(step, [b"old"]), "remote")
        tier.remember()
        await node.checkpoints.delete_generation(GenerationId(RUN, 1, 2))
        await node.settle(DELETE, COLLECT)
        for forgotten in (update(attempts).values(newest_step=-1), delete(history)):
            await node.storage.catalog.write(lambda c, what=forgotten: c.execute(what))
        await node.wait(await node.save(2, [b"new"]), "remote")
    tier.bring_back()
    found = await rebuild(tier, tmp_path / "new")
    assert [(one.what, one.reason) for one in found.left_out] == [
        (f"generation {RUN}@1/2", "the step was saved again later")
    ]
    async with open_checkpoints(tmp_path / "new") as node:
        assert await node.restore(GenerationId(RUN, 1, 2)) == [b"new"]


async def test_stamps_go_upwards_when_the_clock_does_not(tmp_path: Path) -> None:
    far = 1 << 62  # in the year 2116

    async def stamps(node: CheckpointNode, *manifests: str) -> list[Any]:
        return [
            read_stamp((tier.place / "manifests" / manifest).read_bytes()) for manifest in manifests
        ]

    tier = Tier(tmp_path)
    async with open_checkpoints(tmp_path) as node:
        catalog = node.storage.catalog
        await catalog.write(lambda connection: put_setting(connection, LAST_MOMENT, str(far)))
        made = [await write(node, base) for base in (0, 1)]
        await node.settle(FLUSH)
        one, two = await stamps(node, *made)
        assert far < one.begun_ns == one.committed_ns == two.begun_ns < two.committed_ns
    await rebuild(tier, tmp_path / "new")
    tier.place = tmp_path / "new" / "object"
    async with open_checkpoints(tmp_path / "new") as node:
        await node.storage.catalog.write(lambda connection: pass_moment(connection, 1))
        made.append(await write(node, 2))
        await node.settle(FLUSH)
        (three,) = await stamps(node, made[2])
    assert (three.begun_ns, three.committed_ns) == (one.begun_ns, two.committed_ns + 1)
