"""Work that is carried to its end although whoever asked for it may go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from forebay_wire.errors import ForebayError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Calls:
    """Belongs to the event loop."""

    def __init__(self, name: str) -> None:
        """*name*: whose calls they are, for messages."""
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> frozenset[asyncio.Task[Any]]:
        """What has not ended yet."""
        return frozenset(self._tasks)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Have :meth:`wait` wait for *task*, too, and notice how it ended."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._look_at)

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """What *work* answers; it runs to its end even if the caller goes away: threads cannot be
        stopped midway."""
        task = asyncio.create_task(work)
        self.keep(task)
        return await asyncio.shield(task)

    async def wait(self) -> None:
        """Return when nothing runs any more, also of what began meanwhile."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _look_at(self, task: asyncio.Task[Any]) -> None:
        """Take notice of an error whose caller may be gone."""
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, ForebayError):
                logger.debug("%s: %s", self._name, error)
            else:
                logger.error("%s: a call failed", self._name, exc_info=error)
