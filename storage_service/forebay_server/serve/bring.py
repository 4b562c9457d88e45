"""Brings a blob into a tier from its best good copy, for background work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_history import record
from forebay_server.model.landing import reading_order
from forebay_server.quarantine import Quarantine
from forebay_server.serve.promote import Place, Promoter, places_of
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import TierReader
from forebay_wire.errors import ForebayError, IntegrityError, InvalidRequest, NotFound, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Bringer:
    """Belongs to the event loop; holds no state of its own."""

    def __init__(
        self, tiers: Tiers, catalog: Catalog, promoter: Promoter, quarantine: Quarantine
    ) -> None:
        self._tiers = tiers
        self._catalog = catalog
        self._promoter = promoter
        self._quarantine = quarantine
        self._landing = frozenset(tier.name for tier in (*tiers.landing, *tiers.caches))

    async def has(self, blob: str, tier: str) -> bool:
        """Whether *tier* has a live copy of *blob*."""
        located = (await self._catalog.locate([blob])).get(blob)
        return located is not None and any(one.tier == tier for one in located.live())

    async def bring(
        self,
        blob: str,
        tier: str,
        progress: Callable[[str, int], object],
        guard: Callable[[Connection], object],
        encoding: str = "",
    ) -> bool:
        """Have a live, durable and verified copy of *blob* in the landing tier *tier*.

        Whether one was made; False if there was one, or if the blob is no longer known. *progress*
        is told, on a thread, of so many bytes that moved from the tier it names into *tier*.
        *guard* is called in the transaction that adds the copy. *encoding*: how it is to lie there,
        empty: as the tier has it. A source that turns out to be bad
        is quarantined and the next one taken. :class:`IntegrityError` if no good one is left,
        :class:`ResourceExhausted` without room.
        """
        located = (await self._catalog.locate([blob])).get(blob)
        if located is None or any(one.tier == tier for one in located.live()):
            return False
        if tier not in self._landing:
            raise InvalidRequest(
                f"blobs are brought into {', '.join(sorted(self._landing))}, not into {tier!r}: "
                "what the object tier has comes from flushes"
            )
        problems: list[ForebayError] = []
        for source in self._in_order(places_of(located)):
            try:
                await self._copy(source, tier, progress, guard, encoding)
            except (IntegrityError, NotFound) as error:
                if not await self._still_there(source):
                    return False  # the blob, or this copy, went meanwhile: looked at again later
                problems.append(error)
                await self._quarantine.condemn(
                    blob, source.replica_id, source.tier, source.file, error
                )
            else:
                return True
        if problems:
            raise problems[-1]
        raise StorageError(f"blob {blob} has no copy in a tier that this daemon has")

    async def check(self, blob: str, tier: str) -> bool:
        """Read the copies of *blob* in *tier* with every byte checked, and quarantine bad ones;
        whether there is a good one."""
        located = (await self._catalog.locate([blob])).get(blob)
        for place in places_of(located) if located is not None else ():
            if place.tier != tier:
                continue
            try:
                await self._quarantine.verify(blob, tier, place.file, place.encoding)
            except (IntegrityError, NotFound) as error:
                if await self._still_there(place):
                    await self._quarantine.condemn(blob, place.replica_id, tier, place.file, error)
            else:
                return True
        return False

    async def read(self, blob: str, use: Callable[[str, TierReader], T]) -> T | None:
        """What *use* makes, on a thread that moves bytes, of the tier and the raw image of the best
        good copy of *blob*; None if the blob is no longer known.

        *use* reads with every byte checked: a copy that it finds bad is quarantined, and the next
        one taken. :class:`IntegrityError` if no good one is left.
        """
        located = (await self._catalog.locate([blob])).get(blob)
        if located is None:
            return None
        problems: list[ForebayError] = []
        for source in self._in_order(places_of(located)):
            tier = self._tiers.get(source.tier)
            try:
                return await self._tiers.run_moving(tier, self._use, source, use)
            except (IntegrityError, NotFound) as error:
                if not await self._still_there(source):
                    return await self.read(blob, use)  # it moved, or went, meanwhile
                problems.append(error)
                await self._quarantine.condemn(
                    blob, source.replica_id, source.tier, source.file, error
                )
        if problems:
            raise problems[-1]
        raise StorageError(f"blob {blob} has no copy in a tier that this daemon has")

    def _use(self, source: Place, use: Callable[[str, TierReader], T]) -> T:
        with self._promoter.open_told(source) as reader:
            return use(source.tier, reader)

    async def _copy(
        self,
        source: Place,
        tier: str,
        progress: Callable[[str, int], object],
        guard: Callable[[Connection], object],
        encoding: str,
    ) -> None:
        def told(num_bytes: int) -> None:
            progress(source.tier, num_bytes)

        def guarded(connection: Connection) -> None:
            guard(connection)
            record(connection, f"blob {source.blob}", "copied", f"{source.tier} to {tier}")

        target = self._tiers.get(tier)
        await self._promoter.copy_into(source, target, told, guarded, encoding)

    async def _still_there(self, place: Place) -> bool:
        located = (await self._catalog.locate([place.blob])).get(place.blob)
        live = located.live() if located is not None else ()
        return any(one.replica_id == place.replica_id for one in live)

    def _in_order(self, places: list[Place]) -> list[Place]:
        names = {tier.name for tier in self._tiers.all}
        here = [place for place in places if place.tier in names]
        kinds = [self._tiers.get(place.tier).kind for place in here]
        return [here[index] for index in reading_order(kinds)]
