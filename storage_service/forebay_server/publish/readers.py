"""Which generations somebody was told of a moment ago, to open them: retention leaves those."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from forebay_wire.ids import GenerationId

LEND_SECONDS: Final = 120.0
"""From the answer that names a generation until its bytes are open, on every rank."""


class Readers:
    """Belongs to the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[GenerationId, float] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def settled(self, run: str) -> AsyncIterator[None]:
        """Within it no generation of *run* is lent, or deleted by retention, by anybody else."""
        async with self._locks[run]:
            yield
        if not self._locks[run].locked() and len(self._locks) > 1000:
            del self._locks[run]

    def lend(self, generation: GenerationId) -> None:
        """Somebody is told of *generation*, or was seen reading it."""
        self._until[generation] = self._clock() + LEND_SECONDS

    def lent(self, run: str) -> set[GenerationId]:
        """The generations of *run* that somebody was told of lately."""
        now = self._clock()
        for one in [one for one, until in self._until.items() if until <= now]:
            del self._until[one]
        return {one for one in self._until if one.run == run}
