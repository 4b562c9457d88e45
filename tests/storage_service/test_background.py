"""The daemon's set of tasks: none is lost, a crash is noticed."""

import asyncio

import pytest

from forebay_server.background import Background


async def test_crash_of_a_task_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    crashed = asyncio.Event()
    background = Background(crashed.set)

    async def fail() -> None:
        raise RuntimeError("broken inside")

    background.start("worker", fail())
    async with asyncio.timeout(5):
        await crashed.wait()
    await background.close()
    assert "worker crashed" in caplog.text
    assert "broken inside" in caplog.text


async def test_task_that_ends_well_is_no_crash() -> None:
    background = Background(lambda: pytest.fail("told a crash"))

    async def work() -> None:
        await asyncio.sleep(0)

    await background.start("worker", work())
    await background.close()


async def test_close_cancels_what_runs_and_waits_for_it() -> None:
    background = Background(lambda: pytest.fail("told a crash"))
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    background.start("worker", work())
    await asyncio.sleep(0)
    await background.close()
    assert ended.is_set()
