"""Whether a replica is good: read in full, out of service if it is not, back in it if it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import Replica
from forebay_server.catalog.queries_damage import (
    is_mended,
    quarantine,
    repair_error,
    return_to_service,
)
from forebay_server.tier.encode import open_plain
from forebay_server.tier.registry import Tiers
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import ForebayError, IntegrityError, NotFound

logger = logging.getLogger(__name__)

REPAIR_SECONDS: Final = 40.0
"""How long a reader waits for the repair of what has no other copy: its own request may take 60."""


class Quarantine:
    """Belongs to the event loop; files are read on their tier's threads."""

    def __init__(
        self,
        tiers: Tiers,
        catalog: Catalog,
        *,
        forget: Callable[[str], object] = lambda blob: None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        """*forget* is told the id of a blob whose replicas changed state; *changed* is called when
        that may have queued jobs."""
        self._tiers = tiers
        self._catalog = catalog
        self._forget = forget
        self._changed = changed
        self._names = frozenset(tier.name for tier in tiers.all)
        self._bad: set[str] = set()
        self._returns: dict[str, asyncio.Task[bool]] = {}
        self.may_be_repaired = False
        """Whether there is somebody who works on the repairs that this queues."""

    async def verify(
        self, blob: str, tier: str, file: str, encoding: str, *, is_landing: bool = False
    ) -> None:
        """Read the whole blob file *file* of *tier*, which lies there in *encoding*; it is good if
        this returns.

        *is_landing*: on the threads that land bytes, as part of that. :class:`IntegrityError`,
        :class:`NotFound`; :class:`StorageError` says nothing about the file.
        """
        found = self._tiers.get(tier)
        run = self._tiers.run_landing if is_landing else self._tiers.run
        await run(found, self._verify, blob, tier, file, encoding)

    def _verify(self, blob: str, tier: str, file: str, encoding: str) -> None:
        with open_plain(self._tiers.get(tier), file, encoding, blob) as reader:
            verify_file(reader, blob)

    async def condemn(
        self, blob: str, replica_id: str, tier: str, file: str, error: ForebayError
    ) -> None:
        """Take a replica out of service because of *error*; its file stays."""
        if isinstance(error, IntegrityError):
            self._bad.add(replica_id)
        reason = error.message
        was_live = await self._catalog.write(
            lambda connection: quarantine(connection, replica_id, reason)
        )
        self._forget(blob)
        if was_live:
            logger.error(
                "replica of blob %s in tier %s, file %s, is quarantined: %s",
                blob,
                tier,
                file,
                reason,
            )
            self._changed()

    async def return_good(self, blob: str) -> bool:
        """Read the quarantined replicas of *blob* and have the good ones serve again; whether
        there is one. Calls for one blob that come meanwhile share the reading.

        A tier that was away for a while condemns what is good. Bytes that were found bad since the
        daemon's start are not read again before the next one.
        """
        task = self._returns.get(blob)
        if task is None:
            task = asyncio.create_task(self._return_good(blob), name=f"return-{blob}")
            self._returns[blob] = task
            task.add_done_callback(lambda _: self._returns.pop(blob, None))
        return await asyncio.shield(task)

    async def serves_again(self, blob: str, problems: list[ForebayError]) -> bool:
        """Whether a copy of *blob*, of which none was left, is in service now: one that turned out
        to be good, or that the repair which is queued has made meanwhile. *problems* gets what that
        found to be lost."""
        if await self.return_good(blob):
            return True
        if self.may_be_repaired:
            self._changed()
            if await self._catalog.wait_until(
                lambda connection: is_mended(connection, blob), REPAIR_SECONDS
            ):
                return True
        error = await self._catalog.read(lambda connection: repair_error(connection, blob))
        if error:
            problems.append(IntegrityError(error))
        return False

    async def close(self) -> None:
        """Wait for what is being read. Idempotent."""
        await asyncio.gather(*self._returns.values(), return_exceptions=True)

    async def _return_good(self, blob: str) -> bool:
        located = (await self._catalog.locate([blob])).get(blob)
        if located is None:
            return False
        found = [await self._return(blob, one) for one in located.replicas if self._may_be(one)]
        return any(found)

    def _may_be(self, replica: Replica) -> bool:
        return (
            replica.state == "quarantined"
            and replica.tier in self._names
            and replica.replica_id not in self._bad
        )

    async def _return(self, blob: str, replica: Replica) -> bool:
        replica_id, tier, file = replica.replica_id, replica.tier, replica.extents[0].file
        try:
            await self.verify(blob, tier, file, replica.encoding)
        except IntegrityError:
            self._bad.add(replica_id)
            return False
        except ForebayError as error:
            if not isinstance(error, NotFound):
                logger.warning("a quarantined replica of blob %s stays so: %s", blob, error)
            return False
        is_back = await self._catalog.write(
            lambda connection: return_to_service(connection, replica_id)
        )
        if is_back:
            self._forget(blob)
            logger.warning(
                "replica of blob %s in tier %s, file %s, is good and serves again", blob, tier, file
            )
        return is_back
