"""Locks by name, and waiting for changes without polling."""

import asyncio

from forebay_server.locks import NamedLocks
from forebay_server.publish.changes import Changes


async def test_one_name_is_held_once_and_others_are_free() -> None:
    locks = NamedLocks()
    order: list[str] = []
    entered = asyncio.Event()

    async def second() -> None:
        entered.set()
        async with locks.hold("a"):
            order.append("second")

    async with locks.hold("a"):
        task = asyncio.create_task(second())
        await entered.wait()
        async with locks.hold("b"):
            order.append("other")
        await asyncio.sleep(0)
        order.append("first")
    await task
    assert order == ["other", "first", "second"]


async def test_a_lock_is_free_after_an_error_and_after_a_cancelled_wait() -> None:
    locks = NamedLocks()
    try:
        async with locks.hold("a"):
            waiting = asyncio.create_task(locks.hold("a").__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            raise ValueError
    except ValueError:
        pass
    async with asyncio.timeout(5), locks.hold("a"):
        pass


async def test_a_change_between_looking_and_waiting_is_not_lost() -> None:
    changes = Changes()
    with changes.watch("a", "b") as changed:
        changes.announce("b")
        async with asyncio.timeout(5):
            await changed.wait()
        changed.clear()
        changes.announce("c")
        assert not changed.is_set()
    changes.announce("a")
    assert not changed.is_set()
