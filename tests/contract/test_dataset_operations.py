"""Random operations on datasets agree with a model in memory, over restarts of the storage."""

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay_server.catalog.queries_jobs import COLLECT, DELETE, GARBAGE, enqueue
from forebay_server.locks import NamedLocks
from forebay_server.model.splits import split_bounds
from forebay_server.move.collect import Collector
from forebay_server.move.jobs import Jobs
from forebay_server.publish.checkpoint import recover_catalog_state
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.shards import ShardCommit
from forebay_server.testing.storage import UID, Storage, open_storage
from forebay_wire.errors import AlreadyExists, Conflict, NotFound
from forebay_wire.ids import new_random_name

NAMES = st.sampled_from(["a", "b", "c"])
CONTENTS = st.lists(st.integers(0, 5), max_size=3)  # few, so that equal shards are common
FRACTIONS = st.sampled_from([{"x": 1.0}, {"x": 0.5, "y": 0.5}, {"x": 0.9}])


@dataclass
class Known:
    """A dataset as it ought to be."""

    versions: list[list[int]] = field(default_factory=list)
    """The contents of each version's shards."""
    splits: dict[int, dict[str, float]] = field(default_factory=dict)


class Operations(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp())
        self.known: dict[str, Known] = {}
        self.requests: list[tuple[VersionCommit, int]] = []
        self.stack = AsyncExitStack()

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    # ------------------------------------------------------------------------- the system

    @initialize()
    def start(self) -> None:
        self.run(self._start())

    async def _start(self) -> None:
        self.storage: Storage = await self.stack.enter_async_context(open_storage(self.folder))
        await recover_catalog_state(self.storage.catalog)
        collector = Collector(self.storage.catalog, self.storage.tiers, NamedLocks())
        handlers = {DELETE: collector.delete_manifest, COLLECT: collector.collect}
        self.jobs = Jobs(self.storage.catalog, "test", handlers)
        running = asyncio.create_task(self.jobs.run())

        async def stop() -> None:
            self.jobs.stop()
            await running

        self.stack.push_async_callback(stop)
        self.datasets = Datasets(self.storage.catalog, self.storage.uploads, self.jobs)

    async def _shards(self, contents: list[int]) -> tuple[ShardCommit, ...]:
        made = []
        for content in contents:
            landed = await self.storage.upload(bytes([content]) * 100)
            made.append(
                ShardCommit(landed.session, landed.blob, 100, content, (content,) * (content > 0))
            )
        return tuple(made)

    def teardown(self) -> None:
        self.run(self.stack.aclose())
        self.loop.close()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------- operations

    @rule(name=NAMES, contents=CONTENTS)
    def create(self, name: str, contents: list[int]) -> None:
        self._commit(name, 0, contents)

    @rule(name=NAMES, contents=CONTENTS)
    def append(self, name: str, contents: list[int]) -> None:
        self._commit(name, len(self.known[name].versions) if name in self.known else 1, contents)

    @rule(name=NAMES, base=st.integers(1, 3), contents=CONTENTS)
    def append_anywhere(self, name: str, base: int, contents: list[int]) -> None:
        self._commit(name, base, contents)

    def _commit(self, name: str, base: int, contents: list[int]) -> None:
        shards = self.run(self._shards(contents))
        commit = VersionCommit(name, base, b"schema", shards, new_random_name())
        known = self.known.get(name)
        refusal: type[Exception] | None = None
        if base == 0:
            refusal = AlreadyExists if known else None
        elif known is None:
            refusal = NotFound
        elif base != len(known.versions):
            refusal = Conflict
        if refusal is not None:
            with pytest.raises(refusal):
                self.run(self.datasets.commit_version(commit, UID))
            for shard in shards:
                self.run(self.storage.uploads.abort(shard.session, UID))
            return
        made = self.run(self.datasets.commit_version(commit, UID))
        self.requests.append((commit, made.version))
        versions = self.known.setdefault(name, Known()).versions
        versions.append([*(versions[-1] if versions else []), *contents])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        commit, version = data.draw(st.sampled_from(self.requests))
        assert self.run(self.datasets.commit_version(commit, UID)).version == version

    @rule(name=NAMES, fractions=FRACTIONS)
    def split(self, name: str, fractions: dict[str, float]) -> None:
        known = self.known.get(name)
        if known is None:
            with pytest.raises(NotFound):
                self.run(self.datasets.define_splits(name, 0, fractions, 1))
            return
        version = len(known.versions)
        rows = sum(known.versions[-1])
        defined = known.splits.setdefault(version, fractions)
        if split_bounds(rows, defined) == split_bounds(rows, fractions):  # they select the same
            self.run(self.datasets.define_splits(name, 0, fractions, 1))
        else:
            with pytest.raises(AlreadyExists):
                self.run(self.datasets.define_splits(name, 0, fractions, 1))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        assert self.run(self.datasets.delete(name)) == (name in self.known)
        self.known.pop(name, None)
        self.requests = [one for one in self.requests if one[0].dataset != name]

    @rule(contents=CONTENTS)
    def leave_uncommitted_and_restart(self, contents: list[int]) -> None:
        self.run(self._shards(contents))
        self.run(self.stack.aclose())
        self.run(self._start())

    # ------------------------------------------------------------------------- agreement

    @invariant()
    def all_datasets_are_as_known(self) -> None:
        if not hasattr(self, "datasets"):
            return
        listed, _ = self.run(self.datasets.list())
        assert [one.name for one in listed] == sorted(self.known)
        for name, known in self.known.items():
            found = self.run(self.datasets.get(name))
            rows = [sum(contents) for contents in known.versions]
            assert [version.num_rows for version in found.versions] == rows
            assert [version.num_shards for version in found.versions] == [
                len(contents) for contents in known.versions
            ]
            expected = {
                (version, split): stop - start
                for version, fractions in known.splits.items()
                for split, (start, stop) in split_bounds(rows[version - 1], fractions).items()
            }
            assert {(one.version, one.name): one.num_rows for one in found.selections} == expected

    @invariant()
    def what_is_stored_is_what_is_named(self) -> None:
        if not hasattr(self, "datasets"):
            return
        self.run(self._collect())
        shards = {
            content
            for known in self.known.values()
            for contents in known.versions
            for content in contents
        }
        assert len(self.storage.files()) == len(shards)

    async def _collect(self) -> None:
        await self.storage.catalog.write(lambda c: enqueue(c, COLLECT, GARBAGE))
        self.jobs.wake()
        job = await self.jobs.wait(COLLECT, GARBAGE, 30)
        assert job is not None
        assert job.state == "done"


Operations.TestCase.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
# Every step commits durably: slow where the disk is.
TestDatasetOperations = pytest.mark.timeout(600)(Operations.TestCase)
