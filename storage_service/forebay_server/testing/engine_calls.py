"""What a test can ask an engine in a process of its own: each method is one call."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    COPY,
    FLUSH,
    GARBAGE,
    MIGRATE,
    PIN,
    REPAIR,
    SCRUB,
    Job,
    claim,
    enqueue,
    list_jobs,
    renew,
    retry_now,
)
from forebay_server.daemon import Daemon
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.copy import Copier, copy_target
from forebay_server.move.jobs import Progress
from forebay_server.move.migrate import Migrator, migrate_target
from forebay_server.move.scrub import read_report
from forebay_server.move.trash import Trash
from forebay_server.publish.dataset import VersionCommit
from forebay_server.publish.shards import ShardCommit
from forebay_server.serve.opened import OpenedBlob
from forebay_server.serve.plans import OrderParameters
from forebay_server.testing.checkpoints import RUN, CheckpointNode
from forebay_server.testing.storage import UID, Storage
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.health import GuardedTier
from forebay_wire import failpoints
from forebay_wire.errors import ForebayError
from forebay_wire.ids import GenerationId, new_random_name
from forebay_wire.segments import SegmentTable

CLIENT: Final = "client"
MAX_TRIES: Final = 8
"""Opens of one blob, each after a report that the copy was bad: more than there are tiers."""
LATE: Final = "late-0"
SETTLE_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02
MAX_JOBS: Final = 10_000
BATCH_ROWS: Final = 4
"""Samples of each shard; the bytes are no Arrow files, nothing here reads them as such."""


class LateMover:
    """A background job whose owner stands still at one place while its lease runs out."""

    def __init__(self, daemon: Daemon, job: Job, stop_at: str) -> None:
        """*stop_at*: ``begin``, ``inside`` the copying, before the ``removal``."""
        self._daemon = daemon
        self._job = job
        self._stop_at = stop_at
        self.stands = asyncio.Event()
        self._goes_on = asyncio.Event()
        self._goes_on_thread = threading.Event()
        self._loop = asyncio.get_running_loop()
        # The locks of a process of its own: those of the daemon would keep everybody waiting.
        locks = NamedLocks()
        copier = Copier(daemon._opener.bringer, Budget({}), locks)
        self._copier = copier
        late_copier: Any = _StoppingCopier(copier, self)
        self._handler: Any = late_copier
        if job.kind == MIGRATE:
            self._handler = Migrator(
                daemon._catalog,
                daemon._tiers,
                late_copier,
                locks,
                is_open=daemon._opener.is_open,
                moved=self._moved,
            )
        self._task = asyncio.create_task(self._work(), name="late-mover")

    def _moved(self, tier: str, blob: str) -> None:
        self._daemon._opener.forget(blob)
        self._daemon._ahead.left(tier, blob)

    async def wait_standing(self) -> None:
        """Until it stands still, or has ended without coming by."""
        standing = asyncio.create_task(self.stands.wait())
        await asyncio.wait([standing, self._task], return_when=asyncio.FIRST_COMPLETED)
        standing.cancel()

    async def go_on(self) -> str:
        """Wake it up; how it ended: ``done``, or the kind of the error."""
        self._goes_on.set()
        self._goes_on_thread.set()
        return await self._task

    async def pause(self, place: str) -> None:
        """Called by the mover where it comes by."""
        if place == self._stop_at:
            self.stands.set()
            await self._goes_on.wait()

    def pause_thread(self) -> None:
        """The same on a thread, inside the copying."""
        if self._stop_at == "inside":
            self._loop.call_soon_threadsafe(self.stands.set)
            self._goes_on_thread.wait()

    async def _work(self) -> str:
        await self.pause("begin")
        try:
            await self._handler(_LateProgress(self._job, self))
        except ForebayError as error:
            return type(error).__name__
        return "done"


class _StoppingCopier:
    """A copier that lets the mover stand still once the copy is there."""

    def __init__(self, copier: Copier, mover: LateMover) -> None:
        self._copier = copier
        self._mover = mover

    async def __call__(self, progress: Progress) -> None:
        await self._copier(progress)

    async def copy_locked(self, blob: str, tier: str, progress: Progress) -> bool:
        made = await self._copier.copy_locked(blob, tier, progress)
        await self._mover.pause("removal")
        return made


class _LateProgress(Progress):
    def __init__(self, job: Job, mover: LateMover) -> None:
        super().__init__(job, LATE)
        self._mover = mover

    def advance(self, num_bytes: int) -> None:
        self._mover.pause_thread()
        super().advance(num_bytes)


class EngineCalls:
    """The calls; arguments and results are plain values, as they travel through a pipe."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        storage = Storage(daemon._catalog, daemon._tiers, daemon._uploads)
        trash = Trash(daemon._catalog, daemon._jobs)
        self._node = CheckpointNode(
            storage, daemon._checkpoints, daemon._jobs, trash, daemon._retention
        )
        self._storage = storage
        self._late: LateMover | None = None

    async def close(self) -> None:
        """Let a mover that stands still go on. Idempotent."""
        if self._late is not None:
            await self.late_goes_on()

    # ----------------------------------------------------------------------------- put and seal

    async def begin_attempt(self, parent: tuple[int, int] | None) -> int:
        return (await self._node.begin(parent, num_ranks=2)).attempt

    async def save(self, attempt: int, step: int, packs: list[bytes]) -> list[str]:
        """Save a generation; its blobs, once it is local."""
        await self._node.save(step, packs, attempt=attempt)
        await self._node.wait(GenerationId(RUN, attempt, step), "local", 30)
        return await self.blobs_of(attempt, step)

    async def blobs_of(self, attempt: int, step: int) -> list[str]:
        manifest = await self._node.manifest(GenerationId(RUN, attempt, step))
        return [pack.blob for pack in manifest.packs]

    async def is_committed(self, attempt: int, step: int) -> bool:
        try:
            info = await self._node.checkpoints.generations.look(GenerationId(RUN, attempt, step))
        except ForebayError:
            return False
        return info.manifest is not None

    async def wait_remote(self, attempt: int, step: int, seconds: float) -> None:
        await self._node.wait(GenerationId(RUN, attempt, step), "remote", seconds)

    async def delete_generation(self, attempt: int, step: int) -> None:
        await self._node.checkpoints.delete_generation_now(GenerationId(RUN, attempt, step))

    async def commit_dataset(self, name: str, contents: list[bytes]) -> tuple[str, list[str]]:
        """A dataset with a shard of each content: its manifest and its blobs."""
        shards = []
        for content in contents:
            landed = await self._storage.upload(content, owner=f"dataset {name}")
            shards.append(
                ShardCommit(landed.session, landed.blob, len(content), BATCH_ROWS, (BATCH_ROWS,))
            )
        commit = VersionCommit(name, 0, b"a schema", tuple(shards), new_random_name())
        version = await self._daemon._datasets.commit_version(commit, UID)
        return version.manifest, [shard.blob for shard in shards]

    async def manifest_of(self, name: str) -> tuple[str, list[str]] | None:
        """The same of a dataset that may be there."""
        try:
            found = await self._daemon._datasets.get(name)
        except ForebayError:
            return None
        manifest = found.versions[-1].manifest
        parsed: Any = await self._node.parse_manifest(manifest)
        return manifest, [shard.blob for shard in parsed.shards]

    async def delete_dataset(self, name: str) -> None:
        await self._daemon._datasets.delete_now(name)

    # ------------------------------------------------------------------------------------ read

    async def copies(self, blobs: Sequence[str]) -> dict[str, list[tuple[str, str, str, str]]]:
        """Blob to its copies: tier, file, state and encoding."""
        located = await self._storage.catalog.locate(blobs)
        return {
            blob: [
                (one.tier, extent.file, one.state, one.encoding)
                for one in found.replicas
                for extent in one.extents
            ]
            for blob, found in located.items()
        }

    async def read(self, blob: str, start: int, stop: int) -> bytes:
        """Bytes of a blob as a client gets them: verified, damage reported, opened again."""
        opener = self._daemon._opener
        for _ in range(MAX_TRIES):
            [opened] = await opener.open(CLIENT, [blob])
            if isinstance(opened, ForebayError):
                raise opened
            try:
                content, bad = _read_verified(opened, start, stop)
            finally:
                opener.release(CLIENT, [blob])
            if bad is None:
                return content
            await opener.report(blob, opened.tier, bad, "digest")
        raise AssertionError("a bad copy is served again and again")

    # --------------------------------------------------------------------------------- movement

    async def evict(self, blob: str, tier: str) -> None:
        found = self._storage.tiers.get(tier)
        await self._daemon._ahead.evictor.evict(found, [blob])

    async def queue_copy(self, blob: str, tier: str) -> None:
        await self._queue(COPY, copy_target(blob, tier))

    async def queue_migration(self, blob: str, source: str, tier: str) -> None:
        await self._queue(MIGRATE, migrate_target(blob, source, tier))

    async def pin(self, target: str, tier: str) -> str:
        return (await self._daemon._movement.pins.pin(target, tier, 0, self._daemon._jobs)).pin

    async def is_pinned_warm(self, pin: str) -> tuple[str, bool]:
        found = await self._daemon._movement.pins.look(pin)
        return found.state, found.is_warm

    async def unpin(self, pin: str) -> None:
        await self._daemon._movement.pins.unpin(pin)

    async def late_begins(self, kind: str, blob: str, source: str, tier: str, stop_at: str) -> None:
        """A job whose owner stands still at *stop_at*; its lease has run out on return."""
        await self.close()
        is_copy = kind == COPY
        target = copy_target(blob, tier) if is_copy else migrate_target(blob, source, tier)

        def take(connection: Connection) -> Job | None:
            # In one transaction: no worker of the daemon comes first.
            enqueue(connection, kind, target, priority=1000)
            return claim(connection, LATE, 3600, [kind])

        job = await self._storage.catalog.write(take)
        if job is None or job.target != target:
            return  # somebody works on it already
        self._late = LateMover(self._daemon, job, stop_at)
        await self._late.wait_standing()
        taken = job.job

        await self._storage.catalog.write(
            lambda one: renew(one, taken, LATE, -1.0, 0, job.total_bytes)
        )
        self._daemon._jobs.wake()

    async def late_goes_on(self) -> str:
        """Wake the mover up; how it ended."""
        late, self._late = self._late, None
        return await late.go_on() if late is not None else ""

    async def limit(self, tier: str, num_bytes: int) -> None:
        """From here on the tier takes no more than *num_bytes*; 0: as before."""
        found: Any = self._storage.tiers.get(tier)
        while not isinstance(found, DirectoryTier):
            found = found.inner  # it is wrapped, perhaps more than once
        found._ledger.limit_bytes = num_bytes

    async def probe(self) -> None:
        """Have tiers that are out of service looked at now, and what waits for them done."""
        for tier in self._storage.tiers.own:
            found: Any = tier
            while not isinstance(found, GuardedTier):
                found = found.inner
            await self._storage.tiers.run(tier, found.probe)
        await self.hurry()

    async def used_bytes(self) -> dict[str, tuple[int, int]]:
        """Landing tier to the bytes that its ledger counts as used, and as reserved."""
        spaces = {tier.name: tier.space() for tier in self._storage.tiers.landing}
        return {name: (one.used_bytes, one.reserved_bytes) for name, one in spaces.items()}

    # ------------------------------------------------------------------------------------- plans

    async def register(
        self, plan: str, manifest: str, shuffle: str, seed: int, position: int
    ) -> None:
        order = OrderParameters(manifest, shuffle=shuffle, seed=seed)
        await self._daemon._ahead.plans.register(plan, "machine", order, 0, position)

    async def advance(self, plan: str, epoch: int, position: int) -> None:
        self._daemon._ahead.plans.advance(plan, epoch, position)

    async def end_plan(self, plan: str) -> bool:
        return self._daemon._ahead.plans.end(plan)

    # -------------------------------------------------------------------------- scrub and collect

    async def scrub(self) -> None:
        """Read everything; and have done what follows from that."""
        state = await self._daemon._integrity.begin_scrub("")
        await self._daemon._jobs.wait(SCRUB, state.job.target, SETTLE_SECONDS)
        found = await self._daemon._integrity.look_at_scrub(state.job.job)
        assert found.job.state == "done", found
        read_report(found.job.journal)
        await self.settle()

    async def fsck(self, is_repairing: bool) -> list[str]:
        found = await self._daemon._integrity.fsck(repair=is_repairing)
        return [str(one) for one in found.left]

    async def collect(self) -> None:
        await self._queue(COLLECT, GARBAGE)
        await self.settle()

    async def settle(self) -> None:
        """Wait until no job runs or is about to; those are left that wait for another try, or for
        a tier that is out of service."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while busy := await self._busy():
            assert asyncio.get_running_loop().time() < deadline, busy
            await asyncio.sleep(POLL_SECONDS)

    async def _busy(self) -> list[Job]:
        may_run = self._daemon._jobs._may_run
        kinds = [one for one in (FLUSH, COPY, MIGRATE, REPAIR, COLLECT, PIN) if may_run(one)]
        return await self._storage.catalog.read(lambda one: _busy_jobs(one, kinds))

    async def hurry(self) -> None:
        """Have what waits for another try tried now."""

        await self._storage.catalog.write(retry_now)
        self._daemon._jobs.wake()

    async def _queue(self, kind: str, target: str) -> None:
        await self._storage.catalog.write(lambda connection: enqueue(connection, kind, target))
        self._daemon._jobs.wake()

    # -------------------------------------------------------------------------------------- death

    async def die_at(self, failpoint: str, count: int) -> None:
        """From here on the *count*-th passing of *failpoint* ends the process with SIGKILL."""
        failpoints._kills.clear()
        failpoints._kills[failpoint] = count

    async def live_on(self) -> None:
        failpoints._kills.clear()


def _busy_jobs(connection: Connection, kinds: Sequence[str]) -> list[Job]:
    """Those that run or are due."""
    return [
        job
        for job in list_jobs(connection, MAX_JOBS)
        if job.kind in kinds
        and (job.state == "running" or (job.state == "queued" and job.due_unix <= time.time()))
    ]


def _read_verified(opened: OpenedBlob, start: int, stop: int) -> tuple[bytes, int | None]:
    """The range, and the first segment of it that is not what the table says."""
    with ExitStack() as files:
        file = files.enter_context(os.fdopen(opened.fd, "rb"))
        table_file = file
        if opened.table_fd >= 0:
            table_file = files.enter_context(os.fdopen(opened.table_fd, "rb"))
        table_file.seek(opened.table_offset)
        encoded = table_file.read(opened.table_length)
        file.seek(0)
        data = file.read(opened.length)
    table = SegmentTable.decode(encoded, "test", opened.blob)
    for index in table.covering(start, stop - start):
        try:
            table.check(index, data[table.offsets[index] : table.offsets[index + 1]], "test")
        except ForebayError:
            return b"", index
    return data[start:stop], None
