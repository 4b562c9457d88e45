"""Copies that are read while they are made durable.

What a reader waits for is that its blob is here and good, not that a copy of it would survive a
power loss: another tier has the blob. So the copy is written through the page cache and handed over
as soon as its last byte is there; the sync, the name and the row in the catalog follow. Until then
nobody finds the copy but through this module, and a crash leaves nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from forebay_server.model.encodings import RAW
from forebay_server.serve.opened import OpenedBlob, opened_at
from forebay_server.serve.promote import Place, Promoter
from forebay_server.serve.shared import Shared
from forebay_server.tier.encode import StoredFile
from forebay_server.tier.memory import Window
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier, TierWriter
from forebay_server.tier.verify import copy_verified
from forebay_wire.errors import ForebayError
from forebay_wire.ids import new_random_name
from forebay_wire.segments import SegmentTable

logger = logging.getLogger(__name__)


@dataclass
class _Written:
    """A copy that is complete and not published."""

    writer: TierWriter
    table: SegmentTable
    descriptor: int

    def abandon(self) -> None:
        """Leave nothing of it but what readers hold."""
        os.close(self.descriptor)
        self.writer.abort()


class EarlyCopy:
    """One copy on its way to being durable. Made by :class:`EarlyCopies`."""

    def __init__(self, place: Place, descriptor: int) -> None:
        """Takes *descriptor* over. Whoever publishes it closes it, and whoever fetched it."""
        self.place = place
        """Where it will be; its row is not there yet."""
        self.published: asyncio.Task[Place]
        """Ends when it is durable and in the catalog, with where it lies then."""
        self._descriptor = descriptor
        self._num_holders = 2
        self._lock = threading.Lock()

    def open(self) -> OpenedBlob | None:
        """A descriptor of its own for a reader; None once both have closed it. From any thread."""
        with self._lock:
            if not self._num_holders:
                return None
            found = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY)
        return opened_at(self.place, self.place.tier, found)

    def close(self) -> None:
        """One of the two is done with it. Its readers keep what they have."""
        with self._lock:
            self._num_holders -= 1
            if not self._num_holders:
                os.close(self._descriptor)


@dataclass
class HeldWindow:
    """A blob's bytes in memory, for as long as anybody has it open or waits for it."""

    place: Place
    window: Window
    num_holders: int = 0


Fetched = EarlyCopy | HeldWindow
"""What a fetch gives to those who wait for it."""


@dataclass
class Fetch:
    """One running fetch of a blob, however many wait for it."""

    work: Shared[Fetched]
    num_waiting: int = 0


class EarlyCopies:
    """Belongs to the event loop, except for ``get``."""

    def __init__(
        self, tiers: Tiers, promoter: Promoter, published: Callable[[Place], object]
    ) -> None:
        """*published* is told where a copy lies that is durable now."""
        self._tiers = tiers
        self._promoter = promoter
        self._published = published
        self._copies: dict[str, EarlyCopy] = {}

    async def settle(self) -> None:
        """Wait until all are durable, or have failed."""
        tasks = [copy.published for copy in self._copies.values()]
        await asyncio.gather(*tasks, return_exceptions=True)

    def get(self, blob: str) -> EarlyCopy | None:
        """The copy of *blob* that is not durable yet, if there is one. From any thread."""
        return self._copies.get(blob)

    async def begin(self, source: Place, tier: Tier) -> EarlyCopy:
        """Copy the blob at *source* into *tier*, checked by BLAKE3; readable on return, and durable
        later. :class:`IntegrityError` if the source is damaged, :class:`ResourceExhausted` without
        room."""
        file = new_random_name()
        origin = self._tiers.get(source.tier)
        with ExitStack() as stack:
            stack.enter_context(self._promoter.policy.promise(tier, source))
            writing = asyncio.ensure_future(
                self._tiers.run(origin, self._write, source, tier, file)
            )
            try:
                written = await asyncio.shield(writing)
            except asyncio.CancelledError:
                writing.add_done_callback(_abandon)
                raise
            promised = stack.pop_all()
        self._promoter.fetched_bytes[source.tier] += source.file_bytes
        place = Place(source.blob, source.num_bytes, source.num_segments, "", tier.name, file, RAW)
        copy = EarlyCopy(place, written.descriptor)
        self._copies[source.blob] = copy
        copy.published = asyncio.create_task(
            self._publish(copy, source, tier, written, promised), name=f"publish-{source.blob}"
        )
        copy.published.add_done_callback(_look_at_error)
        return copy

    def _write(self, source: Place, tier: Tier, file: str) -> _Written:
        with self._promoter.open_told(source) as reader:
            writer = tier.create(tier.blob_name(file), source.file_bytes)
            try:
                writer.keep_cached()
                table = copy_verified(reader, writer, source.blob)
                return _Written(writer, table, writer.open_early())
            except BaseException:
                writer.abort()
                raise

    async def _publish(
        self, copy: EarlyCopy, source: Place, tier: Tier, written: _Written, promised: ExitStack
    ) -> Place:
        # On the source's threads, as the copy: a sync takes long, and the tier's have to open.
        threads = self._tiers.get(source.tier)
        try:
            await self._tiers.run(threads, written.writer.publish)
            stored = StoredFile(RAW, source.file_bytes, written.table)
            placed = await self._promoter.enter(source, tier, copy.place.file, stored)
            self._published(placed)
            return placed
        except BaseException:
            await asyncio.shield(self._tiers.run(threads, written.writer.abort))
            raise
        finally:
            self._copies.pop(copy.place.blob, None)
            copy.close()
            promised.close()


def _abandon(writing: asyncio.Future[_Written]) -> None:
    if not writing.cancelled() and writing.exception() is None:
        writing.result().abandon()


def _look_at_error(task: asyncio.Task[Place]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, ForebayError):
        logger.info("%s: the copy that was read is not kept: %s", task.get_name(), error)
    else:
        logger.error("%s failed", task.get_name(), exc_info=error)
