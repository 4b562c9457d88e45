"""The daemon's own set of long-running tasks: none is lost, and a crash of one is noticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Background:
    """Owns tasks that should run as long as the daemon; belongs to one event loop."""

    def __init__(self, on_crash: Callable[[], None]) -> None:
        """*on_crash* is called once a task ends with an error."""
        self._on_crash = on_crash
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run *work* beside the others."""
        task = asyncio.create_task(work, name=name)
        self._tasks[name] = task
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel what still runs and wait for it. Idempotent."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        logger.critical("%s crashed, the daemon stops", task.get_name(), exc_info=task.exception())
        self._on_crash()
