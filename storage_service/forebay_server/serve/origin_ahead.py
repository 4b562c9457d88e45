"""First reads of origins before a loader asks: in the order in which plans need them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from forebay_server.serve.foresight import Foresight
from forebay_wire.errors import ForebayError

logger = logging.getLogger(__name__)

STREAMS: Final = 2
"""Files that are read ahead at a time: each is read by ranges, one after the other."""
LOOK: Final = 64
"""Origins that one look finds."""
LOOK_SECONDS: Final = 1.0
"""From one look to the next where nothing tells that there is more to do."""
RETRY_SECONDS: Final = 30.0
"""An origin that failed, or had no room, is looked at again after this."""


class Unread(Protocol):
    """What is needed of :class:`forebay_server.serve.plans.Plans`."""

    def is_unread(self, shard: str) -> bool:
        """Whether some plan reads the origin *shard*, of which nobody knows the bytes."""
        ...


class OriginAhead:
    """Belongs to the event loop; :meth:`run` it in the background."""

    def __init__(
        self,
        foresight: Foresight,
        plans: Unread,
        read_ahead: Callable[[str], Awaitable[bool]],
        *,
        is_busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*read_ahead* reads an origin for the first time if a tier has room for its copy; whether
        it did. *is_busy* answers whether a reader waits for origins."""
        self._foresight = foresight
        self._plans = plans
        self._read_ahead = read_ahead
        self._is_busy = is_busy
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}
        self._later: dict[str, float] = {}
        self._woken = asyncio.Event()
        self.num_read = 0
        """Origins read ahead since the start."""

    def wake(self) -> None:
        """Something else may be needed next."""
        self._woken.set()

    async def run(self) -> None:
        """Read ahead, until cancelled."""
        try:
            while True:
                self._start_some()
                self._woken.clear()
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._woken.wait()
                except TimeoutError:
                    continue
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _start_some(self) -> None:
        room = STREAMS - len(self._running)
        if room <= 0 or self._is_busy() or not self._foresight.has_plans:
            return
        now = self._clock()
        self._later = {origin: at for origin, at in self._later.items() if at > now}
        for use in self._foresight.upcoming(LOOK, self._may_be_read)[:room]:
            task = asyncio.create_task(self._read(use.blob), name=f"ahead-{use.blob}")
            self._running[use.blob] = task

    def _may_be_read(self, shard: str) -> bool:
        is_waiting = shard in self._running or shard in self._later
        return not is_waiting and self._plans.is_unread(shard)

    async def _read(self, origin: str) -> None:
        try:
            if await self._read_ahead(origin):
                self.num_read += 1
            else:
                self._later[origin] = self._clock() + LOOK_SECONDS
        except ForebayError as error:
            self._later[origin] = self._clock() + RETRY_SECONDS
            logger.info("origin %s is not read ahead: %s", origin, error)
        finally:
            del self._running[origin]
            self.wake()
