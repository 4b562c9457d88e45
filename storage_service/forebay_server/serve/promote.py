"""From the object tier to where clients can map it: into a local tier with room, or a window."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import (
    BlobLocation,
    add_replica,
    known_in_tier,
)
from forebay_server.model.encodings import RAW
from forebay_server.model.landing import Room, choose_landing
from forebay_server.tier.course import Course, Reason, current_course, doing, on_thread
from forebay_server.tier.encode import StoredFile, encode_into, open_plain
from forebay_server.tier.memory import Window
from forebay_server.tier.registry import Tiers, reason_of
from forebay_server.tier.store import Tier, TierReader, TierWriter
from forebay_server.tier.verify import copy_verified, verify_file
from forebay_wire.errors import IntegrityError, NotFound, ResourceExhausted, StorageError
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import new_random_name
from forebay_wire.segments import SegmentTable, encode_trailer, file_bytes_for

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

logger = logging.getLogger(__name__)

T = TypeVar("T")

Foreground = Callable[[str], AbstractContextManager[None]]
"""Given a tier: a ``with`` block in which somebody waits for bytes of it."""


def nobody(tier: str) -> AbstractContextManager[None]:
    """A :data:`Foreground` that tells nobody."""
    return nullcontext()


@dataclass(frozen=True)
class Place:
    """A blob file in a tier: all that it takes to open it again without asking the catalog."""

    blob: str
    num_bytes: int
    num_segments: int
    replica_id: str
    tier: str
    file: str
    """As the catalog calls it."""
    encoding: str = RAW

    @property
    def file_bytes(self) -> int:
        """Size of the raw file."""
        return file_bytes_for(self.num_bytes, self.num_segments)


class CachePolicy(Protocol):
    """Which fetched blobs are kept, and where."""

    async def tiers_for(self, source: Place) -> list[Tier]:
        """The landing tiers that take a copy of the blob at *source*, best first."""
        ...

    def asked(self, plan: str, blob: str) -> None:
        """A reader with that plan, if it has one, asks for *blob* now."""
        ...

    def read(self, blob: str, num_bytes: int) -> None:
        """A reader opens *blob*, wherever it lies: once per reader, before :meth:`tiers_for`. From
        any thread."""
        ...

    def waited(self, plan: str, seconds: Mapping[str, float]) -> None:
        """A reader with that plan has waited for a blob: reason to seconds."""
        ...

    def promise(self, tier: Tier, source: Place) -> AbstractContextManager[None]:
        """A ``with`` block in which room in *tier* is kept for a copy."""
        ...

    def entered(self, place: Place) -> None:
        """A copy that was made is in the catalog."""
        ...


class KeepWhatFits:
    """Keeps every blob that some faster tier has free room for."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    async def tiers_for(self, source: Place) -> list[Tier]:
        rooms = [
            Room(tier.name, tier.space().free_bytes)
            for tier in self._tiers.landing
            if tier.name != source.tier
        ]
        return [self._tiers.get(name) for name in choose_landing(source.file_bytes, rooms)]

    def asked(self, plan: str, blob: str) -> None:
        pass

    def read(self, blob: str, num_bytes: int) -> None:
        pass

    def waited(self, plan: str, seconds: Mapping[str, float]) -> None:
        pass

    def promise(self, tier: Tier, source: Place) -> AbstractContextManager[None]:
        return nullcontext()

    def entered(self, place: Place) -> None:
        pass


class Promoter:
    """Fetches blobs. Belongs to the event loop; holds no state."""

    def __init__(self, tiers: Tiers, catalog: Catalog, foreground: Foreground = nobody) -> None:
        """*foreground* surrounds what somebody waits for, with the tier that it is read from:
        background work steps back meanwhile."""
        self._tiers = tiers
        self._catalog = catalog
        self._foreground = foreground
        self.policy: CachePolicy = KeepWhatFits(tiers)
        self.fetched_bytes: Counter[str] = Counter()
        """Tier to bytes that were read there for readers, or ahead of them."""

    async def promote(
        self, source: Place, copy: Callable[[Place, Tier], Awaitable[T]]
    ) -> T | Window:
        """Have *copy* bring the blob at *source* into the best tier that the policy names and that
        takes it; what it answers.

        Where no tier takes it, a sealed window that the caller closes. :class:`IntegrityError` if
        the source is damaged, :class:`ResourceExhausted` if there is neither room nor memory.
        """
        with self._foreground(source.tier):
            for tier in await self.policy.tiers_for(source):
                try:
                    return await copy(source, tier)
                except (ResourceExhausted, StorageError) as error:
                    # One that cannot be read from says so again below.
                    logger.info("blob %s is not promoted to %s: %s", source.blob, tier.name, error)
            from_tier = self._tiers.get(source.tier)
            window = await self._tiers.run(from_tier, self._fill_window, source)
            self.fetched_bytes[source.tier] += source.file_bytes
            return window

    async def copy_into(
        self,
        source: Place,
        tier: Tier,
        progress: Callable[[int], object] = lambda num_bytes: None,
        guard: Callable[[Connection], object] = lambda connection: None,
        encoding: str = "",
    ) -> Place:
        """Copy the blob at *source* into *tier*, for somebody who does not wait for its bytes.

        Checked by BLAKE3 on both sides; durable and in the catalog on return. *progress* is told on
        a thread how many bytes were written; it may wait, or raise to end the copy. *guard* is
        called in the transaction that adds the row, and may raise to prevent it. *encoding*: how
        it is to lie there, empty: as the tier has it.
        :class:`IntegrityError` if the source is damaged, :class:`ResourceExhausted` without room.
        """
        file = new_random_name()
        failpoint("copy.before_file")
        origin = self._tiers.get(source.tier)
        stored = await self._tiers.run_moving(
            origin, self._copy, source, tier, file, encoding or tier.encoding, progress
        )
        failpoint("copy.after_file")
        try:
            await self._tiers.run_moving(tier, _read_back, source.blob, tier, file, stored.encoding)
        except BaseException:
            await self._tiers.run(tier, tier.delete, tier.blob_name(file))
            raise
        placed = await self.enter(source, tier, file, stored, guard)
        failpoint("copy.after_row")
        return placed

    async def copy_pieces(
        self, source: Place, table: SegmentTable, tier: Tier, pieces: AsyncIterable[memoryview]
    ) -> Place:
        """Make a copy in *tier* of the checked *pieces* of a blob, all of them in order; durable
        and in the catalog on return. :class:`ResourceExhausted` without room."""
        file = new_random_name()
        with self.policy.promise(tier, source):
            name = tier.blob_name(file)
            writer = await self._tiers.run(tier, tier.create, name, source.file_bytes)
            try:
                async for piece in pieces:
                    await self._tiers.run(tier, writer.write, piece)
                await self._tiers.run(tier, _finish, writer, table)
            finally:
                await self._tiers.run(tier, writer.abort)
        stored = StoredFile(RAW, source.file_bytes, table)
        return await self.enter(source, tier, file, stored)

    async def enter(
        self,
        source: Place,
        tier: Tier,
        file: str,
        stored: StoredFile,
        guard: Callable[[Connection], object] = lambda connection: None,
    ) -> Place:
        """Add the row of a copy that lies in *file* by now; the copy of somebody else if that came
        first."""
        target = Place(
            source.blob,
            source.num_bytes,
            source.num_segments,
            "",
            tier.name,
            file,
            stored.encoding,
        )

        def enter(connection: Connection) -> str | None:
            guard(connection)
            return _record(connection, target, stored.num_bytes)

        try:
            with doing("tier"):
                replica_id = await self._catalog.write(enter)
        except Exception:  # after a cancellation the row may still come: at worst it is garbage
            await self._tiers.run(tier, tier.delete, file)
            raise
        if replica_id is not None:
            placed = replace(target, replica_id=replica_id)
            self.policy.entered(placed)
            return placed
        # Somebody else brought the blob to this tier meanwhile: that copy serves.
        await self._tiers.run(tier, tier.delete, file)
        found = (await self._catalog.locate([source.blob])).get(source.blob)
        for place in places_of(found) if found is not None else ():
            if place.tier == tier.name:
                return place
        raise NotFound(f"blob {source.blob} was deleted while it was fetched")

    def _copy(
        self,
        source: Place,
        tier: Tier,
        file: str,
        setting: str,
        progress: Callable[[int], object],
    ) -> StoredFile:
        with self.open_told(source) as reader:
            return encode_into(reader, tier, file, setting, source.blob, advance=progress)

    @contextmanager
    def open_told(self, source: Place) -> Iterator[TierReader]:
        """Inside, a reader of the raw image of the blob at *source*, on a thread; who waits for
        this is told what is read there, and that the rest is the target's."""
        origin = self._tiers.get(source.tier)
        whole = partial(origin.read_whole, num_bytes=source.file_bytes)
        with open_plain(origin, source.file, source.encoding, source.blob, read=whole) as reader:
            course = current_course()
            told = _ToldReader(reader, course, reason_of(origin)) if course is not None else reader
            with doing("tier"):
                yield told

    def _fill_window(self, source: Place) -> Window:
        origin = self._tiers.get(source.tier)
        window = self._tiers.slots.window(source.file_bytes)
        try:
            with open_plain(origin, source.file, source.encoding, source.blob) as reader:
                copy_verified(reader, window, source.blob)
            window.seal()
        except BaseException:
            window.close()
            raise
        return window


class _ToldReader(TierReader):
    """Reads of a source that somebody may wait for, beside the writing of what was read."""

    def __init__(self, inner: TierReader, course: Course, reason: Reason) -> None:
        """Whoever made *inner* closes it."""
        self.size_bytes = inner.size_bytes
        self.where = inner.where
        self._inner = inner
        self._course = course
        self._reason = reason

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        with on_thread(self._course, self._reason):
            self._inner.read_into(offset, buffer)

    def view(self, offset: int, num_bytes: int) -> memoryview | None:
        with on_thread(self._course, self._reason):
            return self._inner.view(offset, num_bytes)

    def fileno(self) -> int | None:
        return self._inner.fileno()

    def close(self) -> None:
        pass


def _finish(writer: TierWriter, table: SegmentTable) -> None:
    writer.write(table.encoded)
    writer.write(encode_trailer(table.total_bytes, len(table.encoded)))
    writer.publish()


def _read_back(blob: str, tier: Tier, file: str, encoding: str) -> None:
    try:
        with open_plain(tier, file, encoding, blob) as reader:
            verify_file(reader, blob)
    except (IntegrityError, NotFound) as error:
        raise StorageError(
            f"what was just written into tier {tier.name} reads back wrong: {error}"
        ) from error


def places_of(location: BlobLocation) -> list[Place]:
    """The live copies of a blob."""
    return [
        Place(
            location.blob,
            location.num_bytes,
            location.num_segments,
            replica.replica_id,
            replica.tier,
            replica.extents[0].file,
            replica.encoding,
        )
        for replica in location.live()
    ]


def _record(connection: Connection, target: Place, stored_bytes: int) -> str | None:
    """The new replica's id, None if the tier has the blob already."""
    is_known, live = known_in_tier(connection, target.blob, target.tier)
    if not is_known:
        raise NotFound(f"blob {target.blob} was deleted while it was fetched")
    if live is not None:
        return None
    return add_replica(
        connection,
        target.blob,
        target.num_bytes,
        target.tier,
        target.file,
        stored_bytes,
        encoding=target.encoding,
    )
