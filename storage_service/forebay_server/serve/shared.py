"""Work that several wait for, each of whom is told what it spent their time on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

from forebay_server.tier.course import Course, begin_course, current_course

T = TypeVar("T")


class Shared(Generic[T]):
    """A task with a course of its own. Belongs to the event loop."""

    def __init__(self, work: Coroutine[Any, Any, T], name: str | None = None) -> None:
        """Starts *work*, whoever waits for it."""
        self.course = Course()
        self.task = asyncio.create_task(self._run(work), name=name)

    async def wait(self) -> T:
        """The result. Whoever is cancelled here leaves the work to the others."""
        waiting = current_course()
        with nullcontext() if waiting is None else waiting.following(self.course):
            return await asyncio.shield(self.task)

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        begin_course(self.course)
        return await work
