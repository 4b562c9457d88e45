"""Datasets on real storage: commits, appends, splits, deletes."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_jobs import job_of
from forebay_server.catalog.queries_manifests import read_manifest
from forebay_server.catalog.tables import manifest_remote, manifests
from forebay_server.move.jobs import Jobs, Progress
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.shards import ShardCommit
from forebay_server.testing.storage import UID, Storage, open_storage
from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SchemaMismatch,
)
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB
from forebay_wire.manifest import DatasetManifest, SelectionManifest, parse

SCHEMA = b"a schema"


@dataclass
class Service:
    """Datasets with jobs that only note in the catalog what an object tier would do."""

    storage: Storage
    datasets: Datasets
    jobs: Jobs

    async def shards(self, *num_rows: int) -> tuple[ShardCommit, ...]:
        made = []
        for rows in num_rows:
            landed = await self.storage.upload(os.urandom(64 * KIB))
            batches = (rows,) if rows else ()
            made.append(ShardCommit(landed.session, landed.blob, 64 * KIB, rows, batches))
        return tuple(made)

    async def commit(self, name: str = "d", base: int = 0, rows: tuple[int, ...] = (10,)) -> Any:
        shards = await self.shards(*rows)
        commit = VersionCommit(name, base, SCHEMA, shards, new_random_name())
        return await self.datasets.commit_version(commit, UID)

    async def manifest(self, manifest: str) -> Any:
        data = await self.storage.catalog.read(lambda c: read_manifest(c, manifest))
        assert data is not None
        return parse(data, "test", manifest)


def make_jobs(storage: Storage) -> Jobs:
    async def flush(progress: Progress) -> None:
        def note(connection: Connection) -> None:
            connection.execute(insert(manifest_remote).values(manifest=progress.target))

        await storage.catalog.write(note)

    async def remove(progress: Progress) -> None:
        def forget(connection: Connection) -> None:
            connection.execute(delete(manifests).where(manifests.c.manifest == progress.target))

        await storage.catalog.write(forget)

    return Jobs(storage.catalog, "test", {"flush": flush, "delete": remove})


@pytest.fixture
async def service(tmp_path: Path, catalog_url: str) -> AsyncIterator[Service]:
    async with open_storage(tmp_path, catalog_url=catalog_url) as storage:
        jobs = make_jobs(storage)
        running = asyncio.create_task(jobs.run())
        yield Service(storage, Datasets(storage.catalog, storage.uploads, jobs), jobs)
        jobs.stop()
        await running


async def test_a_commit_makes_a_version_visible_with_all_its_shards(service: Service) -> None:
    shards = await service.shards(10, 20)
    commit = VersionCommit("d", 0, SCHEMA, shards, new_random_name(), '{"source": "test"}')
    made = await service.datasets.commit_version(commit, UID)
    assert (made.version, made.num_rows, made.num_shards) == (1, 30, 2)
    manifest = await service.manifest(made.manifest)
    assert isinstance(manifest, DatasetManifest)
    assert manifest.blobs() == [shard.blob for shard in shards]
    assert manifest.metadata == {"source": "test"}
    found = await service.datasets.get("d")
    assert [version.version for version in found.versions] == [1]
    assert service.storage.uploads.num_sessions == 0
    assert service.storage.tiers.slots.space().num_files == 0  # the writer's slots are given back


async def test_nothing_is_visible_before_the_commit(service: Service) -> None:
    await service.shards(10)
    assert await service.datasets.list() == ([], "")
    with pytest.raises(NotFound, match="no dataset d"):
        await service.datasets.get("d")


async def test_an_append_has_the_old_shards_and_the_new_ones(service: Service) -> None:
    first = await service.commit(rows=(10,))
    second = await service.commit(base=1, rows=(5, 6))
    manifests = [await service.manifest(one.manifest) for one in (first, second)]
    assert (second.version, second.num_rows, second.num_shards) == (2, 21, 3)
    assert manifests[1].shards[0] == manifests[0].shards[0]
    assert manifests[1].parent == first.manifest
    assert (await service.datasets.wait_version("d", 0, "local", 1)).version == 2


async def test_a_repeated_request_is_answered_with_its_version(service: Service) -> None:
    commit = VersionCommit("d", 0, SCHEMA, await service.shards(10), new_random_name())
    made = await service.datasets.commit_version(commit, UID)
    again = await service.datasets.commit_version(commit, UID)
    assert (again.version, again.manifest) == (made.version, made.manifest)
    await service.commit(base=1)
    assert (await service.datasets.commit_version(commit, UID)).version == 1
    with pytest.raises(Conflict, match="use a new request name"):
        await service.datasets.commit_version(replace(commit, dataset="other"), UID)


async def test_creating_what_exists_is_refused_and_changes_nothing(service: Service) -> None:
    made = await service.commit()
    with pytest.raises(AlreadyExists, match="dataset d exists already"):
        await service.commit()
    found = await service.datasets.get("d")
    assert [version.manifest for version in found.versions] == [made.manifest]


async def test_an_append_to_an_older_version_is_refused(service: Service) -> None:
    await service.commit()
    await service.commit(base=1)
    with pytest.raises(Conflict, match="version 2 by now"):
        await service.commit(base=1)
    with pytest.raises(NotFound):
        await service.commit("unknown", base=1)


async def test_of_two_appends_at_once_one_wins(service: Service) -> None:
    await service.commit()
    outcomes = await asyncio.gather(
        *(service.commit(base=1) for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 3
    assert len((await service.datasets.get("d")).versions) == 2


async def test_shards_of_dead_or_foreign_sessions_are_refused(service: Service) -> None:
    shards = await service.shards(10, 20)
    commit = VersionCommit("d", 0, SCHEMA, shards, new_random_name())
    with pytest.raises(PermissionDenied):
        await service.datasets.commit_version(commit, UID + 1)
    await service.storage.uploads.abort(shards[1].session, UID)
    with pytest.raises(NotFound, match="write the shard again"):
        await service.datasets.commit_version(commit, UID)
    # Nothing of the refused commits is left: the first shard still counts.
    alone = replace(commit, shards=shards[:1])
    assert (await service.datasets.commit_version(alone, UID)).num_rows == 10


async def test_a_shard_that_is_not_what_was_sealed_is_refused(service: Service) -> None:
    (shard,) = await service.shards(10)
    commit = VersionCommit("d", 0, SCHEMA, (shard,), new_random_name())
    wrong = [
        replace(shard, num_bytes=1),
        replace(shard, num_rows=11),
        replace(shard, blob="nonsense"),
        replace(shard, session="nonsense"),
    ]
    for bad in wrong:
        with pytest.raises(InvalidRequest):
            await service.datasets.commit_version(replace(commit, shards=(bad,)), UID)
    other = replace(shard, blob="0" * 64)
    with pytest.raises(NotFound, match="has not sealed"):
        await service.datasets.commit_version(replace(commit, shards=(other,)), UID)
    with pytest.raises(InvalidRequest, match="same upload session"):
        await service.datasets.commit_version(replace(commit, shards=(shard, shard)), UID)
    with pytest.raises(InvalidRequest, match="no JSON"):
        await service.datasets.commit_version(replace(commit, metadata_json="["), UID)


async def test_another_schema_cannot_be_appended(service: Service) -> None:
    await service.commit()
    commit = VersionCommit("d", 1, b"another", await service.shards(10), new_random_name())
    with pytest.raises(SchemaMismatch, match="dataset d"):
        await service.datasets.commit_version(commit, UID)


async def test_a_dataset_without_rows_may_exist(service: Service) -> None:
    made = await service.commit(rows=())
    assert (made.num_rows, made.num_shards) == (0, 0)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 129, "-x"])
async def test_names_are_checked(service: Service, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await service.commit(name, rows=())


async def test_the_list_is_paged_by_name(service: Service) -> None:
    for name in ("c", "a", "b"):
        await service.commit(name)
    first, after = await service.datasets.list("", 2)
    rest, end = await service.datasets.list(after, 2)
    assert [one.name for one in (*first, *rest)] == ["a", "b", "c"]
    assert (after, end) == ("b", "")


async def test_splits_are_selections_of_their_version(service: Service) -> None:
    made = await service.commit(rows=(7, 4))
    found = await service.datasets.define_splits("d", 0, {"train": 0.8, "test": 0.2}, 3)
    assert {one.name: one.num_rows for one in found.selections} == {"test": 2, "train": 9}
    bounds = {}
    for one in found.selections:
        manifest = await service.manifest(one.manifest)
        assert isinstance(manifest, SelectionManifest)
        assert manifest.dataset_manifest == made.manifest
        assert (manifest.rule["kind"], manifest.rule["seed"]) == ("split", 3)
        bounds[one.name] = (manifest.rule["start"], manifest.rule["stop"])
    assert sorted(bounds.values()) == [(0, 2), (2, 11)]


async def test_repeating_splits_is_a_no_op_and_changing_them_is_refused(service: Service) -> None:
    await service.commit()
    first = await service.datasets.define_splits("d", 0, {"train": 0.8, "test": 0.2}, 3)
    again = await service.datasets.define_splits("d", 1, {"test": 0.2, "train": 0.8}, 3)
    assert again.selections == first.selections
    for fractions, seed in (({"train": 0.8, "test": 0.2}, 4), ({"train": 0.8}, 3)):
        with pytest.raises(AlreadyExists, match="other splits"):
            await service.datasets.define_splits("d", 0, fractions, seed)
    await service.commit(base=1)  # a new version has none yet
    more = await service.datasets.define_splits("d", 2, {"train": 1.0}, 4)
    assert [one.version for one in more.selections] == [1, 1, 2]


async def test_splits_of_what_is_not_there_are_refused(service: Service) -> None:
    with pytest.raises(NotFound):
        await service.datasets.define_splits("d", 0, {"a": 1.0}, 0)
    await service.commit()
    with pytest.raises(NotFound, match="newest is 1"):
        await service.datasets.define_splits("d", 2, {"a": 1.0}, 0)


async def test_a_version_becomes_remote_by_its_flush(service: Service) -> None:
    made = await service.commit()
    reached = await service.datasets.wait_version("d", 1, "remote", 10)
    assert (reached.manifest, reached.durability) == (made.manifest, "remote")
    with pytest.raises(InvalidRequest, match="durability"):
        await service.datasets.wait_version("d", 1, "ram", 1)


async def test_a_wait_that_ends_says_how_far_the_flush_is(tmp_path: Path) -> None:
    async with open_storage(tmp_path) as storage:
        jobs = make_jobs(storage)  # nobody runs them
        service = Service(storage, Datasets(storage.catalog, storage.uploads, jobs), jobs)
        made = await service.commit()
        queued = await storage.catalog.read(lambda c: job_of(c, "flush", made.manifest))
        assert queued is not None
        with pytest.raises(DeadlineExceeded, match="flush is queued"):
            await service.datasets.wait_version("d", 1, "remote", 0.05)


async def test_a_deleted_dataset_is_gone_and_its_name_free(service: Service) -> None:
    await service.commit()
    await service.commit(base=1)
    await service.datasets.define_splits("d", 0, {"a": 0.5}, 0)
    assert await service.datasets.delete("d") is True
    assert await service.datasets.delete("d") is False
    with pytest.raises(NotFound):
        await service.datasets.get("d")
    assert (await service.commit()).version == 1


async def test_committed_versions_survive_a_restart_and_uncommitted_bytes_do_not(
    tmp_path: Path,
) -> None:
    async with open_storage(tmp_path) as storage:
        jobs = make_jobs(storage)
        service = Service(storage, Datasets(storage.catalog, storage.uploads, jobs), jobs)
        made = await service.commit(rows=(1, 2, 3))
        await service.shards(4)
        assert len(storage.files()) == 4
    async with open_storage(tmp_path) as storage:
        assert len(storage.files()) == 3
        datasets = Datasets(storage.catalog, storage.uploads, make_jobs(storage))
        found = await datasets.get("d")
        assert [version.manifest for version in found.versions] == [made.manifest]
