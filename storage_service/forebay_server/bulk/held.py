"""What HTTP clients have open: no connection stands for a client there, so opens time out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from forebay_server.serve.open import Opener
from forebay_server.serve.opened import OpenedBlob
from forebay_wire.errors import ForebayError

UNUSED_SECONDS: Final = 120.0
"""An open that nobody has used for this long is released; a ticket opens it again."""

LOOK_SECONDS: Final = 10.0


@dataclass(eq=False)
class _Held:
    """One descriptor of a blob for one client."""

    opened: OpenedBlob
    last_used: float
    num_opens: int = 0
    num_users: int = 0
    """Answers that are being sent from it."""
    is_retired: bool = False


class HeldOpens:
    """Blobs that HTTP clients hold open, each once a client. Belongs to the event loop."""

    def __init__(
        self,
        opener: Opener,
        unused_seconds: float = UNUSED_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._opener = opener
        self._unused_seconds = unused_seconds
        self._clock = clock
        self._held: dict[tuple[str, str], _Held] = {}

    async def open(
        self,
        client: str,
        blobs: Sequence[str],
        plan: str = "",
        waits: dict[str, float] | None = None,
    ) -> list[OpenedBlob | ForebayError]:
        """Open *blobs*: always anew, since the copy in use may have turned out bad.

        The descriptors stay here. *waits* gets what was waited for, reason to seconds.
        """
        opened = self._opener.open_cached(client, blobs)
        results: Sequence[OpenedBlob | ForebayError] | None = opened
        if results is None:
            results = await self._opener.open(client, blobs, plan, can_stream=True, waits=waits)
        for one in results:
            if isinstance(one, OpenedBlob):
                self._keep(client, one)
        return list(results)

    @contextlib.asynccontextmanager
    async def use(self, client: str, blob: str) -> AsyncIterator[OpenedBlob]:
        """The blob with its descriptor, which stays open inside the ``with`` block."""
        held = self._held.get((client, blob))
        if held is None:
            [result] = await self.open(client, [blob])
            if isinstance(result, ForebayError):
                raise result
            held = self._held[client, blob]
        held.num_users += 1
        try:
            yield held.opened
        finally:
            held.num_users -= 1
            held.last_used = self._clock()
            self._close_if_done(held)

    def release(self, client: str, blobs: Sequence[str]) -> None:
        """End one open of each of *blobs*; unknown ones are left out."""
        for blob in blobs:
            held = self._held.get((client, blob))
            if held is None:
                continue
            held.num_opens -= 1
            if held.num_opens <= 0:
                self._retire(client, blob)

    def release_unused(self) -> None:
        """End the opens that nobody has used for the time-out."""
        oldest = self._clock() - self._unused_seconds
        for (client, blob), held in list(self._held.items()):
            if not held.num_users and held.last_used < oldest:
                self._retire(client, blob)

    async def release_unused_for_ever(self) -> None:
        """Look every 10 s, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.release_unused()

    def close(self) -> None:
        """End all opens; descriptors in use go when their answers end."""
        for client, blob in list(self._held):
            self._retire(client, blob)

    def _keep(self, client: str, opened: OpenedBlob) -> None:
        held = _Held(opened, self._clock(), num_opens=1)
        before = self._held.get((client, opened.blob))
        if before is not None:
            held.num_opens += before.num_opens
            self._retire(client, opened.blob)
        self._held[client, opened.blob] = held

    def _retire(self, client: str, blob: str) -> None:
        held = self._held.pop((client, blob))
        held.is_retired = True
        self._opener.release(client, [blob])
        self._close_if_done(held)

    def _close_if_done(self, held: _Held) -> None:
        if held.is_retired and not held.num_users:
            held.opened.close()
