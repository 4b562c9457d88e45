"""The whole engine against a dictionary: whatever happens, right bytes or an error, and an error
only where every copy was damaged or is away."""

import asyncio
import os
import random
import shutil
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from forebay_server.ahead import Ahead
from forebay_server.catalog.queries_jobs import COLLECT
from forebay_server.catalog.queries_pins import insert_pin
from forebay_server.model.watermarks import Watermarks
from forebay_server.serve.open import OpenedBlob, Opener
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_wire.errors import ForebayError, NotFound, ResourceExhausted
from forebay_wire.ids import GenerationId, new_random_name
from forebay_wire.limits import KIB
from forebay_wire.segments import SegmentTable

SMALL = 40 * KIB
LARGE = 300 * KIB
CHOICE = st.integers(0, 1 << 30)


@dataclass
class Saved:
    """One generation as the oracle knows it."""

    packs: list[bytes]
    is_local: bool = False
    is_remote: bool = False


@dataclass
class Oracle:
    """What was acknowledged, and what was done to it from outside."""

    saved: dict[int, Saved] = field(default_factory=dict)
    deleted: set[int] = field(default_factory=set)
    damaged: set[Path] = field(default_factory=set)
    """Files that somebody changed behind the engine's back."""


class Engine(RuleBasedStateMachine):
    """Storage, serving and movement of one daemon in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.runner = asyncio.Runner()
        self.oracle = Oracle()
        self.step = 0
        self.attempt = 0
        self.away: Path | None = None
        self.pinned: set[tuple[str, str]] = set()

    def run(self, work: Any) -> Any:
        return self.runner.run(asyncio.wait_for(work, 60))

    @initialize()
    def start(self) -> None:
        self.run(self._open())
        self.run(self._begin(None))

    async def _open(self) -> None:
        self.stack = AsyncExitStack()
        self.node: CheckpointNode = await self.stack.enter_async_context(
            open_checkpoints(self.folder, is_open=lambda blob: self.opener.is_open(blob))
        )
        storage = self.node.storage
        self.opener = Opener(storage.tiers, storage.catalog)
        self.stack.push_async_callback(self.opener.close)
        self.ahead = Ahead(
            storage.tiers, storage.catalog, self.opener, marks=Watermarks(0.5, 0.8, 0.95)
        )

    async def _begin(self, parent: tuple[int, int] | None) -> None:
        self.attempt = (await self.node.begin(parent, num_ranks=2)).attempt

    def teardown(self) -> None:
        try:
            self._bring_back()
            self.run(self.stack.aclose())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------- operations

    @rule(seed=st.integers(0, 1 << 30), size=st.sampled_from([1, SMALL, LARGE]))
    def save(self, seed: int, size: int) -> None:
        rng = random.Random(seed)
        packs = [rng.randbytes(size), rng.randbytes(size + 7)]
        self.step += 1
        generation = GenerationId(RUN, self.attempt, self.step)

        async def work() -> None:
            await self.node.save(self.step, packs, attempt=self.attempt)
            await self.node.wait(generation, "local", 30)

        try:
            self.run(work())
        except ResourceExhausted:
            assert self.is_full(), "refused although there is room"
        except ForebayError:
            assert self.away is not None
        else:
            self.oracle.saved[self.step] = Saved(packs, is_local=True)

    def is_full(self) -> bool:
        landing = self.node.storage.tiers.landing
        return all(tier.space().limit_bytes for tier in landing)

    @precondition(lambda self: self.oracle.saved and self.away is None)
    @rule(choice=CHOICE)
    def flush(self, choice: int) -> None:
        """Everything becomes remote, except what has no good copy left."""
        step = self._pick(choice)
        try:
            self.run(self.node.wait(self._id(step), "remote", 10))
        except ForebayError:
            assert self._damaged_blobs(step), "nothing was damaged, and it does not become remote"
        else:
            self.oracle.saved[step].is_remote = True

    @precondition(lambda self: self.oracle.saved)
    @rule(choice=CHOICE)
    def read(self, choice: int) -> None:
        self._check(self._pick(choice))

    @precondition(lambda self: self.oracle.saved)
    @rule(choice=CHOICE, tier=st.sampled_from(["ssd", "hdd"]))
    def evict(self, choice: int, tier: str) -> None:
        step = self._pick(choice)
        saved = self.oracle.saved[step]

        async def work() -> None:
            found = self.node.storage.tiers.get(tier)
            for blob in await self._blobs(step):
                before = await self._tiers_of(blob)
                await self.ahead.evictor.evict(found, [blob])
                after = await self._tiers_of(blob)
                assert after or not before, "the last copy went"
                if not saved.is_remote and "object" not in before:
                    assert after == before, "a dirty copy went"
                if (blob, tier) in self.pinned:
                    assert (tier in after) == (tier in before), "a pinned copy went"

        if self.away is None:
            self.run(work())

    @precondition(lambda self: self.oracle.saved and self.away is None)
    @rule(choice=CHOICE)
    def pin(self, choice: int) -> None:
        step = self._pick(choice)

        async def work() -> None:
            named = await self._blobs(step)
            target = f"generation {RUN}@{self.attempt}/{step}"
            await self.node.storage.catalog.write(
                lambda c: insert_pin(c, new_random_name(), target, "ssd", named)
            )
            self.pinned.update({(blob, "ssd") for blob in named})

        self.run(work())

    # ---------------------------------------------------------------------------------- harm

    @precondition(lambda self: self.oracle.saved and self.away is None)
    @rule(choice=CHOICE, how=st.sampled_from(["flip", "truncate", "remove"]))
    def harm(self, choice: int, how: str) -> None:
        """One file of one replica is changed behind the engine's back."""
        step = self._pick(choice)
        files = self.run(self._files(step))
        if not files:
            return
        path = sorted(files)[choice % len(files)]
        size = path.stat().st_size
        position = choice % size
        if how == "remove":
            path.unlink()
        elif how == "truncate":
            os.truncate(path, position)
        else:
            with path.open("r+b") as file:
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ (1 << choice % 8)]))
        self.oracle.damaged.add(path)

    @rule(is_full=st.booleans())
    def fill(self, is_full: bool) -> None:
        """The landing tiers have no room, or have it again."""
        for tier in self.node.storage.tiers.landing:
            tier._ledger.limit_bytes = 1 if is_full else 0  # type: ignore[attr-defined]

    @precondition(lambda self: self.away is None)
    @rule(tier=st.sampled_from(["ssd", "object"]))
    def lose(self, tier: str) -> None:
        place = self.folder / tier
        place.rename(self.folder / f"{tier}-away")
        self.away = place

    @precondition(lambda self: self.away is not None)
    @rule()
    def bring_back(self) -> None:
        self._bring_back()

    def _bring_back(self) -> None:
        if self.away is not None:
            shutil.rmtree(self.away, ignore_errors=True)
            self.away.with_name(f"{self.away.name}-away").rename(self.away)
            self.away = None

    @precondition(lambda self: self.away is None)
    @rule()
    def restart(self) -> None:
        self.run(self.stack.aclose())
        self.run(self._open())

    @precondition(lambda self: self.away is None)
    @rule()
    def collect(self) -> None:
        self.run(self.node.settle(COLLECT))

    # ------------------------------------------------------------------------------- what holds

    @invariant()
    def nothing_is_promised_for_ever(self) -> None:
        if hasattr(self, "node") and self.away is None:
            for tier in self.node.storage.tiers.landing:
                assert tier.space().reserved_bytes == 0

    def _pick(self, choice: int) -> int:
        steps = sorted(self.oracle.saved)
        return steps[choice % len(steps)]

    def _id(self, step: int) -> GenerationId:
        return GenerationId(RUN, self.attempt, step)

    async def _blobs(self, step: int) -> list[str]:
        return [pack.blob for pack in (await self.node.manifest(self._id(step))).packs]

    async def _tiers_of(self, blob: str) -> set[str]:
        found = (await self.node.storage.catalog.locate([blob])).get(blob)
        return {one.tier for one in found.live()} if found is not None else set()

    async def _files(self, step: int) -> list[Path]:
        """The files of all replicas, good or not."""
        paths = []
        for blob in await self._blobs(step):
            found = (await self.node.storage.catalog.locate([blob]))[blob]
            for replica in found.replicas:
                for extent in replica.extents:
                    paths.extend(self.folder.glob(f"{replica.tier}/**/{extent.file}"))
        return paths

    def _damaged_blobs(self, step: int) -> bool:
        return bool(self.oracle.damaged)

    def _check(self, step: int) -> None:
        packs = self.oracle.saved[step].packs
        for blob, pack in zip(self.run(self._blobs(step)), packs, strict=True):
            try:
                found = self.run(self._read(blob))
            except NotFound:
                raise
            except ForebayError:
                assert self.oracle.damaged or self.away is not None or self.is_full()
            else:
                assert found == pack

    async def _read(self, blob: str) -> bytes:
        """As a client reads: verify, report damage, open again."""
        for _ in range(6):
            [opened] = await self.opener.open("client", [blob])
            if isinstance(opened, ForebayError):
                raise opened
            try:
                content, bad = _read_verified(opened)
            finally:
                self.opener.release("client", [blob])
            if bad is None:
                return content
            await self.opener.report(blob, opened.tier, bad, "digest")
        raise AssertionError("a bad copy is served again and again")


def _read_verified(opened: OpenedBlob) -> tuple[bytes, int | None]:
    """The data, and the first segment that is not what the table says."""
    with os.fdopen(opened.fd, "rb") as file:
        content = file.read()
    end = opened.table_offset + opened.table_length
    table = SegmentTable.decode(content[opened.table_offset : end], "test", opened.blob)
    data = content[: opened.length]
    for index in range(table.num_segments):
        try:
            table.check(index, data[table.offsets[index] : table.offsets[index + 1]], "test")
        except ForebayError:
            return data, index
    return data, None


QUICK = settings(
    derandomize=True,
    max_examples=10,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.timeout(600)
def test_the_engine_agrees_with_a_dictionary() -> None:
    run_state_machine_as_test(Engine, settings=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_engine_agrees_with_a_dictionary_for_long() -> None:
    run_state_machine_as_test(
        Engine, settings=settings(QUICK, max_examples=200, stateful_step_count=60)
    )
