"""Looks for upload sessions whose lease ran out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_uploads import expired_uploads
from forebay_wire.errors import ForebayError

logger = logging.getLogger(__name__)

MAX_PAUSE_SECONDS: Final = 5.0

EXPIRY_BATCH: Final = 1000


class Expiry:
    """A task from ``start`` to ``close`` that has expired sessions ended, a batch at a time."""

    def __init__(
        self,
        catalog: Catalog,
        lease_seconds: float,
        expire: Callable[[str], Awaitable[None]],
        looked: Callable[[], object],
    ) -> None:
        """*expire* is called with each expired session's name, *looked* after each round."""
        self._catalog = catalog
        self._pause_seconds = min(MAX_PAUSE_SECONDS, lease_seconds / 4)
        self._expire = expire
        self._looked = looked
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="upload-expiry")

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._pause_seconds)
            try:
                await self._look()
            except ForebayError as error:
                logger.warning("expired upload sessions stay for now: %s", error)

    async def _look(self) -> None:
        expired = await self._catalog.read(
            lambda connection: expired_uploads(connection, EXPIRY_BATCH)
        )
        for session in expired:
            await self._expire(session)
        self._looked()
