"""Runs the catalog's jobs: a few at a time, leased, tried again with back-off, resumable.

A job is a row, so the work survives the daemon: a row that was queued or running when a daemon died
is taken over by the next one. Handlers are therefore idempotent. Who queues a job does so in the
transaction that makes it necessary and calls :meth:`Jobs.wake` after the commit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_jobs import (
    Job,
    claim,
    drop_finished,
    fail,
    finish,
    hold,
    job_of,
    renew,
    requeue_all,
    retry_later,
    schedule,
    seconds_until_due,
    set_journal,
)
from forebay_server.model.backoff import delay_seconds
from forebay_wire.errors import (
    Conflict,
    DaemonUnavailable,
    ForebayError,
    IntegrityError,
    InvalidRequest,
)

logger = logging.getLogger(__name__)

STOPPING: Final = "the daemon is stopping; the job goes on at its next start"
LEASE_SECONDS: Final = 30.0
RENEW_SECONDS: Final = 2.0
"""How often a running job extends its lease and stores its progress."""
KEEP_DONE_SECONDS: Final = 600.0
"""How long a finished job can still be asked for."""
NUM_WORKERS: Final = 2
"""Jobs at a time: enough to hide one slow object store call behind another job's copying."""
NUM_SLOW_WORKERS: Final = 2
"""Jobs of slow kinds at a time, beside the others."""
NUM_ENDLESS_WORKERS: Final = 2
"""Jobs of endless kinds at a time: one that comes by itself, one that somebody asked for."""


class Progress:
    """One running job: how far it is, and whether it is still this worker's.

    Thread-safe: copying threads report into it.
    """

    def __init__(self, job: Job, owner: str = "") -> None:
        """*owner* is the worker that holds the lease."""
        self.job = job.job
        self.kind = job.kind
        self.owner = owner
        self.target = job.target
        self.tries = job.tries
        self.priority = job.priority
        self._journal = job.journal
        self.done_bytes = 0
        self.total_bytes = job.total_bytes
        self.repeat_seconds: float | None = None
        self._interrupted = ""
        self._lock = threading.Lock()

    def plan(self, total_bytes: int) -> None:
        """There are so many bytes to move in all."""
        self.total_bytes = total_bytes

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are moved; raises if the job has to end here, to go on later."""
        if self._interrupted:
            raise DaemonUnavailable(self._interrupted)
        with self._lock:
            self.done_bytes += num_bytes

    def repeat_after(self, seconds: float) -> None:
        """Do the same again so long after this job has ended, unless somebody asks for it first."""
        self.repeat_seconds = seconds

    @property
    def journal(self) -> dict[str, Any]:
        """What earlier tries have noted; empty at first."""
        found = json.loads(self._journal or "{}")
        assert isinstance(found, dict)
        return found

    def guard(self, connection: Connection) -> None:
        """To be called in each transaction that acts for the job: :class:`Conflict` if its lease
        ran out, as somebody else may be doing the same by now. Nothing of the transaction stays
        then."""
        if not hold(connection, self.job, self.owner):
            raise Conflict(f"the job for {self.target} was taken over: this worker was too slow")

    def note(self, connection: Connection, journal: Mapping[str, Any]) -> None:
        """Store in the same transaction how far the job is: :meth:`guard`, then the journal."""
        text = json.dumps(journal)
        if not set_journal(connection, self.job, self.owner, text):
            self.guard(connection)
        self._journal = text

    def interrupt(self, reason: str) -> None:
        """Make the next :meth:`advance` raise."""
        self._interrupted = reason

    @property
    def is_interrupted(self) -> bool:
        return bool(self._interrupted)


_CHANGING: Final = re.compile(r"\S*\d\S*")
"""Seconds, tries, and names that are random."""

Handler = Callable[[Progress], Awaitable[None]]
"""Does the work for ``progress.target``; returns when it is done or no longer needed."""


class Jobs:
    """The worker loop. Belongs to one event loop; :meth:`run` it in a task group."""

    def __init__(
        self,
        catalog: Catalog,
        owner: str,
        handlers: Mapping[str, Handler],
        *,
        slow_kinds: Collection[str] = (),
        endless_kinds: Collection[str] = (),
        quiet_kinds: Collection[str] = (),
        num_workers: int = NUM_WORKERS,
        num_slow_workers: int = NUM_SLOW_WORKERS,
        lease_seconds: float = LEASE_SECONDS,
        may_run: Callable[[str], bool] = lambda kind: True,
    ) -> None:
        """*owner* is this incarnation of the daemon; *handlers* maps a job's kind to its work;
        *slow_kinds* have workers of their own, and so have *endless_kinds*, which may take days and
        can be interrupted at any time without a loss; *quiet_kinds* have one worker, and end like
        those. Jobs of kinds that *may_run* denies stay in
        the queue; :meth:`wake` when that changes."""
        self._catalog = catalog
        self._owner = owner
        self._handlers = handlers
        self._endless_kinds = frozenset({*endless_kinds, *quiet_kinds})
        quick_kinds = handlers.keys() - self._endless_kinds - set(slow_kinds)
        self._lanes = [
            *[tuple(quick_kinds)] * num_workers,
            *[tuple(kind for kind in handlers if kind in slow_kinds)] * num_slow_workers,
            *[tuple(kind for kind in handlers if kind in endless_kinds)] * NUM_ENDLESS_WORKERS,
            tuple(kind for kind in handlers if kind in quiet_kinds),
        ]
        self._lease_seconds = lease_seconds
        self._may_run = may_run
        self._woken = asyncio.Event()
        self._stopping = False
        self._running: dict[str, Progress] = {}
        self._listeners: list[Callable[[str], object]] = []

    def listen(self, listener: Callable[[str], object]) -> None:
        """Have *listener* told the target of each try that ended, well or not."""
        self._listeners.append(listener)

    def wake(self) -> None:
        """There may be new work."""
        # A fresh event each time: a worker that looked before this call still sees it set.
        woken, self._woken = self._woken, asyncio.Event()
        woken.set()

    async def run(self) -> None:
        """Work until :meth:`stop`; an error of a job never ends it."""
        async with asyncio.TaskGroup() as group:
            for number, kinds in enumerate(self._lanes):
                if kinds:
                    owner = f"{self._owner}-{number}"
                    group.create_task(self._work(owner, kinds), name=f"jobs-{number}")

    def stop(self) -> None:
        """Take no more work and interrupt what runs: it goes back into the queue."""
        self._stopping = True
        for progress in self._running.values():
            progress.interrupt(STOPPING)
        self.wake()

    def finish(self) -> None:
        """Take no more work; what runs, unless it is endless, is finished before :meth:`run`
        returns."""
        self._stopping = True
        for progress in self._running.values():
            if progress.kind in self._endless_kinds:
                progress.interrupt(STOPPING)
        self.wake()

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def wait(self, kind: str, target: str, timeout_seconds: float) -> Job | None:
        """The job's row once it is done or given up; None after the timeout or without a row."""

        def ended(connection: Connection) -> tuple[Job | None] | None:
            job = job_of(connection, kind, target)
            if job is not None and job.state in ("queued", "running"):
                return None
            return (job,)

        found = await self._catalog.wait_until(ended, timeout_seconds)
        return found[0] if found is not None else None

    # ------------------------------------------------------------------------------- workers

    async def _work(self, owner: str, all_kinds: Sequence[str]) -> None:
        failures = 0
        while not self._stopping:
            woken = self._woken
            kinds = [kind for kind in all_kinds if self._may_run(kind)]
            try:
                job = await self._catalog.write(
                    partial(claim, owner=owner, lease_seconds=self._lease_seconds, kinds=kinds)
                )
                if job is not None:
                    await self._run(job, owner)
                else:
                    await self._sleep(woken, await self._seconds_until_due(kinds))
                failures = 0
            except ForebayError as error:  # the catalog itself: nothing could be stored
                if self._stopping:
                    return
                failures += 1
                logger.warning("background work waits, the catalog fails: %s", error)
                await self._sleep(woken, delay_seconds(failures, random.random()))

    async def _seconds_until_due(self, kinds: Sequence[str]) -> float | None:
        return await self._catalog.read(lambda connection: seconds_until_due(connection, kinds))

    async def _sleep(self, woken: asyncio.Event, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await woken.wait()

    async def _run(self, job: Job, owner: str) -> None:
        progress = Progress(job, owner)
        self._running[job.job] = progress
        try:
            async with asyncio.TaskGroup() as group:
                renewing = group.create_task(self._renew(job, progress))
                outcome = await self._attempt(job, progress)
                renewing.cancel()
            await self._settle(job, progress, outcome)
            for listener in self._listeners:
                listener(job.target)
        except asyncio.CancelledError:
            progress.interrupt(STOPPING)
            raise
        finally:
            # Another worker of ours may have taken it over, if this one was too slow to renew.
            if self._running.get(job.job) is progress:
                del self._running[job.job]

    async def _attempt(self, job: Job, progress: Progress) -> Exception | None:
        try:
            await self._handlers[job.kind](progress)
        except Exception as error:  # noqa: BLE001 - the loop must live; the row keeps the text
            return error
        return None

    async def _settle(self, job: Job, progress: Progress, outcome: Exception | None) -> None:
        """Store how the try ended."""
        name, owner = job.job, progress.owner
        if outcome is None:
            await self._catalog.write(lambda connection: _finish(connection, name, owner))
            await self._repeat(job, progress)
            return
        text = str(outcome) or type(outcome).__name__
        if isinstance(outcome, IntegrityError | InvalidRequest):
            logger.error("%s of %s is given up: %s", job.kind, job.target, text)
            await self._catalog.write(lambda connection: fail(connection, name, owner, text))
            await self._repeat(job, progress)
            return
        delay = delay_seconds(job.tries, random.random())
        if progress.is_interrupted:
            text, delay = "", 0.0
        elif isinstance(outcome, ForebayError | OSError):
            level = logging.DEBUG if _is_like(text, job.error) else logging.WARNING
            line = "%s of %s: %s; next try in %.1f s"
            logger.log(level, line, job.kind, job.target, text, delay)
        else:
            logger.error("%s of %s failed", job.kind, job.target, exc_info=outcome)
        await self._catalog.write(
            lambda connection: retry_later(connection, name, owner, text, delay)
        )

    async def _repeat(self, job: Job, progress: Progress) -> None:
        if (seconds := progress.repeat_seconds) is not None:
            await self._catalog.write(
                lambda connection: schedule(connection, job.kind, job.target, seconds)
            )

    async def _renew(self, job: Job, progress: Progress) -> None:
        """Keep the lease and store the progress until cancelled."""
        while True:
            await asyncio.sleep(min(RENEW_SECONDS, self._lease_seconds / 3))
            with suppress(ForebayError):  # one failed renewal is no reason to lose the work
                kept = await self._catalog.write(
                    lambda connection: renew(
                        connection,
                        job.job,
                        progress.owner,
                        self._lease_seconds,
                        progress.done_bytes,
                        progress.total_bytes,
                    )
                )
                if not kept:
                    progress.interrupt("another daemon took the job over")


def _is_like(text: str, other: str) -> bool:
    """Whether both tell the same, words that change each time aside."""
    return _CHANGING.sub("", text) == _CHANGING.sub("", other)


def _finish(connection: Connection, job: str, owner: str) -> None:
    finish(connection, job, owner)
    drop_finished(connection, KEEP_DONE_SECONDS)


async def take_over_jobs(catalog: Catalog) -> int:
    """Queue again what a dead daemon was running; call it where the lock of the data folder proves
    that no other daemon lives on this catalog. How many jobs that were."""
    return await catalog.write(requeue_all)
