"""The job runner: leases, repeats, take-over, stop."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_server.catalog.engine import Catalog, Connection, sqlite_url
from forebay_server.catalog.queries_jobs import FLUSH, Job, claim, enqueue, job_of
from forebay_server.move.jobs import Handler, Jobs, Progress, take_over_jobs
from forebay_wire.errors import IntegrityError, StorageError


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    opened = Catalog.open(sqlite_url(tmp_path / "catalog.sqlite"))
    yield opened
    opened.close()


class Running:
    """A job runner in a task of its own."""

    def __init__(self, catalog: Catalog, handler: Handler, **options: float) -> None:
        self.jobs = Jobs(catalog, "me", {FLUSH: handler}, **options)  # type: ignore[arg-type]

    async def __aenter__(self) -> Jobs:
        self._task = asyncio.create_task(self.jobs.run())
        return self.jobs

    async def __aexit__(self, *_: object) -> None:
        self.jobs.stop()
        await self._task


async def queue(catalog: Catalog, *targets: str) -> None:
    for target in targets:
        await catalog.write(lambda connection, t=target: enqueue(connection, FLUSH, t))


async def look(catalog: Catalog, target: str) -> Job:
    def find(connection: Connection) -> Job | None:
        return job_of(connection, FLUSH, target)

    found = await catalog.read(find)
    assert found is not None
    return found


async def test_queued_work_is_done_once_woken(catalog: Catalog) -> None:
    done: list[str] = []
    told: list[str] = []

    async def handler(progress: Progress) -> None:
        progress.plan(10)
        progress.advance(10)
        done.append(progress.target)

    async with Running(catalog, handler) as jobs:
        jobs.listen(told.append)
        await asyncio.sleep(0)
        await queue(catalog, "a", "b", "c", "d")
        jobs.wake()
        for target in "abcd":
            job = await jobs.wait(FLUSH, target, 10)
            assert job is not None
            assert job.state == "done"
    assert sorted(done) == sorted(told) == list("abcd")


async def test_a_failed_try_is_repeated_with_its_error_shown(catalog: Catalog) -> None:
    errors: list[str] = []

    async def handler(progress: Progress) -> None:
        errors.append((await look(catalog, "a")).error)
        if len(errors) < 3:
            raise StorageError(f"no connection {len(errors)}")

    await queue(catalog, "a")
    async with Running(catalog, handler) as jobs:
        job = await jobs.wait(FLUSH, "a", 20)
    assert job is not None
    assert (job.state, job.tries, job.error) == ("done", 3, "")
    assert errors == ["", "no connection 1", "no connection 2"]


async def test_what_can_never_succeed_is_given_up(catalog: Catalog) -> None:
    async def handler(progress: Progress) -> None:
        raise IntegrityError("no good copy")

    await queue(catalog, "a")
    async with Running(catalog, handler) as jobs:
        job = await jobs.wait(FLUSH, "a", 10)
    assert job is not None
    assert (job.state, job.error) == ("failed", "no good copy")


async def test_a_bug_in_a_handler_does_not_end_the_loop(catalog: Catalog) -> None:
    async def handler(progress: Progress) -> None:
        if progress.target == "a":
            raise ZeroDivisionError

    await queue(catalog, "a", "b")
    async with Running(catalog, handler) as jobs:
        job = await jobs.wait(FLUSH, "b", 10)
    assert job is not None
    assert job.state == "done"
    assert (await look(catalog, "a")).state == "queued"


async def test_stop_interrupts_and_the_next_start_goes_on(catalog: Catalog) -> None:
    started = asyncio.Event()

    async def endless(progress: Progress) -> None:
        started.set()
        while True:
            progress.advance(1)
            await asyncio.sleep(0.001)

    async def quick(progress: Progress) -> None:
        pass

    await queue(catalog, "a")
    async with Running(catalog, endless):
        await started.wait()
    stopped = await look(catalog, "a")
    assert (stopped.state, stopped.error) == ("queued", "")
    async with Running(catalog, quick) as jobs:
        job = await jobs.wait(FLUSH, "a", 10)
    assert job is not None
    assert job.state == "done"


async def test_finish_lets_the_running_job_end_and_starts_no_other(catalog: Catalog) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def handler(progress: Progress) -> None:
        started.set()
        await go_on.wait()

    await queue(catalog, "a", "b")
    running = Running(catalog, handler, num_workers=1)
    async with running as jobs:
        await started.wait()
        assert jobs.num_running == 1
        jobs.finish()
        go_on.set()
    assert (await look(catalog, "a")).state == "done"
    assert (await look(catalog, "b")).state == "queued"


async def test_a_dead_owners_job_is_taken_over(catalog: Catalog) -> None:
    await queue(catalog, "a")
    assert await catalog.write(lambda connection: claim(connection, "dead", 3600, [FLUSH]))

    async def handler(progress: Progress) -> None:
        pass

    assert await take_over_jobs(catalog) == 1
    async with Running(catalog, handler) as jobs:
        job = await jobs.wait(FLUSH, "a", 10)
    assert job is not None
    assert (job.state, job.tries) == ("done", 2)


async def test_a_lease_that_ran_out_is_taken_over(catalog: Catalog) -> None:
    await queue(catalog, "a")
    assert await catalog.write(lambda connection: claim(connection, "stuck", 0.2, [FLUSH]))

    async def handler(progress: Progress) -> None:
        pass

    async with Running(catalog, handler) as jobs:
        job = await jobs.wait(FLUSH, "a", 10)
    assert job is not None
    assert job.state == "done"


async def test_a_running_job_keeps_its_lease(catalog: Catalog) -> None:
    runs = 0
    go_on = asyncio.Event()

    async def handler(progress: Progress) -> None:
        nonlocal runs
        runs += 1
        progress.plan(5)
        progress.advance(3)
        await go_on.wait()

    await queue(catalog, "a")
    async with Running(catalog, handler, lease_seconds=0.3) as jobs:
        shown = await catalog.wait_until(_three_bytes_done, 10)
        assert shown
        await asyncio.sleep(0.6)  # two leases long
        go_on.set()
        assert await jobs.wait(FLUSH, "a", 10)
    assert runs == 1


def _three_bytes_done(connection: Connection) -> bool | None:
    job = job_of(connection, FLUSH, "a")
    return True if job is not None and job.done_bytes == 3 else None
