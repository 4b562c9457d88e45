"""The return job: what is out of service and good serves again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_damage import quarantined_blobs
from forebay_server.move.jobs import Progress

BATCH: Final = 100


class Returns:
    """Handles jobs of the kind ``return``, one at each start: all quarantined replicas. Idempotent.

    A tier that was away when files of it were wanted, or that came back from a repair, is whole
    again without anybody's doing.
    """

    def __init__(self, catalog: Catalog, return_good: Callable[[str], Awaitable[bool]]) -> None:
        """*return_good* reads the quarantined replicas of a blob and returns the good ones."""
        self._catalog = catalog
        self._return_good = return_good

    async def __call__(self, progress: Progress) -> None:
        after = ""
        while found := await self._next(after):
            for blob in found:
                await self._return_good(blob)
                progress.advance(0)
            after = found[-1]

    async def _next(self, after: str) -> list[str]:
        return await self._catalog.read(
            lambda connection: quarantined_blobs(connection, after, BATCH)
        )
