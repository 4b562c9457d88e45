"""Pins and warm holds: room first, then the bytes, verified, and nothing takes them away."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, Protocol

from forebay_server.catalog import queries_pins as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_jobs import PIN, Job, enqueue, job_of
from forebay_server.catalog.queries_pins import Pin, PinnedBlob
from forebay_server.catalog.queries_subjects import resolve
from forebay_server.model.subjects import Subject, parse_subject
from forebay_server.move.copy import Bringer, Copier
from forebay_server.move.jobs import Progress
from forebay_server.move.room import MakeRoom
from forebay_server.tier.registry import Tiers
from forebay_server.tier.space import in_blocks
from forebay_server.tier.store import RoomPromise, Tier
from forebay_wire.errors import (
    IntegrityError,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    StorageError,
)
from forebay_wire.ids import check_random_name, new_random_name
from forebay_wire.segments import file_bytes_for

logger = logging.getLogger(__name__)

PRIORITY: Final = 10
"""Somebody waits for it: before what policies want."""
STREAMS: Final = 6
"""Blobs of one pin that are fetched or checked at a time."""
MAX_HOLD_SECONDS: Final = 366 * 86400.0

State = Literal["fetching", "held", "ended", "failed"]


@dataclass(frozen=True)
class PinState:
    """What a pin promised, and whether that is so; the field names are those of the message."""

    pin: str
    target: str
    tier: str
    is_warm: bool
    because: str
    state: State
    done_bytes: int
    total_bytes: int
    num_blobs: int
    created_unix: float
    expires_unix: float


class Waker(Protocol):
    """What is needed of :class:`forebay_server.move.jobs.Jobs`."""

    def wake(self) -> None:
        """There may be new work."""
        ...


class Pins:
    """Belongs to the event loop. The promises of room are in memory: a start makes them anew."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        bringer: Bringer,
        copier: Copier,
        *,
        make_room: MakeRoom | None = None,
    ) -> None:
        self._catalog = catalog
        self._tiers = tiers
        self._bringer = bringer
        self._copier = copier
        self._make_room = make_room
        self._promises: dict[str, RoomPromise] = {}

    # ------------------------------------------------------------------------------ what people do

    async def pin(self, target: str, tier: str, hold_seconds: float, jobs: Waker) -> PinState:
        """Keep what *target* names in *tier* (empty: the fastest); room for it is reserved on
        return.

        *hold_seconds* count from the moment all is there, 0: until it is unpinned.
        :class:`ResourceExhausted` with the bytes needed and what holds the space; nothing is pinned
        then.
        """
        subject = _check_target(target)
        found = self._landing(tier)
        if not (math.isfinite(hold_seconds) and 0 <= hold_seconds <= MAX_HOLD_SECONDS):
            raise InvalidRequest(f"a hold of {hold_seconds} s: give 0 to {MAX_HOLD_SECONDS:.0f}")
        pin = new_random_name()

        def begin(connection: Connection) -> list[PinnedBlob]:
            resolved = resolve(connection, subject)
            queries.insert_pin(connection, pin, resolved.target, found.name, resolved.blobs)
            return queries.pinned_blobs(connection, _known(connection, pin))

        # What is there is held from here on, so the room that is missing does not grow.
        pinned = await self._catalog.write(begin)
        try:
            self._promises[pin] = await self._reserve(found, pinned)
        except BaseException:
            await self._catalog.write(lambda connection: queries.delete_pin(connection, pin))
            raise
        journal = json.dumps({"hold": hold_seconds})
        total = sum(one.num_bytes for one in pinned)
        await self._catalog.write(
            lambda connection: enqueue(
                connection, PIN, pin, total_bytes=total, priority=PRIORITY, journal=journal
            )
        )
        jobs.wake()
        return await self.look(pin)

    async def look(self, pin: str) -> PinState:
        """Whether all that *pin* holds is where it is to be, in one look."""
        check_random_name("pin", pin)
        return await self._catalog.read(lambda connection: state_of(connection, pin))

    async def list(self) -> list[PinState]:
        """All pins, those that ended lately included, oldest first."""

        def read(connection: Connection) -> list[PinState]:
            return [state_of(connection, one.pin) for one in queries.list_pins(connection)]

        return await self._catalog.read(read)

    async def unpin(self, which: str) -> int:
        """End a pin, or all pins of a subject; how many there were."""

        def end(connection: Connection) -> int:
            name = which
            if queries.find_pin(connection, which) is None:
                name = resolve(connection, _check_target(which)).target
            return queries.end_pins(connection, name, "it was unpinned")

        number = await self._catalog.write(end)
        for pin in list(self._promises):
            if (await self.look(pin)).state == "ended":
                self._release(pin)
        return number

    # ----------------------------------------------------------------------------------- the job

    async def fetch(self, progress: Progress) -> None:
        """Handles jobs of the kind ``pin``; the target is a pin. Idempotent."""
        pin = progress.target
        found = await self._catalog.read(lambda connection: queries.find_pin(connection, pin))
        if found is None or found.has_ended:
            self._release(pin)
            return
        pinned = await self._catalog.read(
            lambda connection: queries.pinned_blobs(connection, found)
        )
        try:
            if pin not in self._promises:
                self._promises[pin] = await self._reserve(self._landing(found.tier), pinned)
            progress.plan(sum(one.num_bytes for one in pinned))
            await self._fetch_all(found, pinned, progress)
            await self._catalog.write(lambda connection: _begin_hold(connection, found, progress))
        except (IntegrityError, InvalidRequest) as error:
            reason = error.message
            await self._catalog.write(
                lambda connection: queries.end_pins(connection, pin, f"failed: {reason}")
            )
            self._release(pin)
            raise
        self._release(pin)

    async def _fetch_all(
        self, found: Pin, pinned: Sequence[PinnedBlob], progress: Progress
    ) -> None:
        slots = asyncio.Semaphore(STREAMS)

        async def one(blob: PinnedBlob) -> None:
            async with slots:
                await self._fetch_one(found, blob, progress)

        try:
            async with asyncio.TaskGroup() as group:
                for blob in pinned:
                    group.create_task(one(blob))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _fetch_one(self, found: Pin, blob: PinnedBlob, progress: Progress) -> None:
        """Have a good copy there: one that is there is read, and replaced if it is bad."""
        if blob.is_there and await self._bringer.check(blob.blob, found.tier):
            progress.advance(blob.num_bytes)
            return
        promise = self._promises.get(found.pin)
        if promise is not None and not blob.is_there:
            promise.shrink(_room_of(blob))  # the copy takes it up right now
        if not await self._copier.copy(blob.blob, found.tier, progress):
            progress.advance(blob.num_bytes)

    # ----------------------------------------------------------------------------------- helpers

    async def _reserve(self, tier: Tier, pinned: Sequence[PinnedBlob]) -> RoomPromise:
        needed = sum(_room_of(one) for one in pinned if not one.is_there)
        short = needed - tier.space().free_bytes
        if short > 0 and self._make_room is not None:
            await self._make_room(tier, short)
        try:
            return tier.reserve(needed)
        except ResourceExhausted as error:
            kept, dirty = await self._catalog.read(
                lambda connection: queries.held_bytes(connection, tier.name)
            )
            raise ResourceExhausted(
                f"{needed} bytes do not fit into tier {tier.name}: {error.message}. Pins hold "
                f"{kept} bytes of it (`forebay pins`), {dirty} have no other copy"
            ) from error

    def _release(self, pin: str) -> None:
        promise = self._promises.pop(pin, None)
        if promise is not None:
            promise.release()

    def _landing(self, name: str) -> Tier:
        landing = {tier.name: tier for tier in self._tiers.landing}
        if name and name not in landing:
            raise InvalidRequest(
                f"there is no tier {name!r} that blobs can be pinned in; there are "
                f"{', '.join(landing)}"
            )
        return landing[name] if name else self._tiers.landing[0]


def _check_target(target: str) -> Subject:
    subject = parse_subject(target)
    if subject.kind not in ("dataset", "generation"):
        raise InvalidRequest(f"{subject} cannot be pinned: name a dataset or a generation")
    return subject


def _room_of(blob: PinnedBlob) -> int:
    return in_blocks(file_bytes_for(blob.num_bytes, blob.num_segments))


def _known(connection: Connection, pin: str) -> Pin:
    found = queries.find_pin(connection, pin)
    if found is None:
        raise NotFound(f"there is no pin {pin!r}: `forebay pins` names them")
    return found


def _begin_hold(connection: Connection, found: Pin, progress: Progress) -> None:
    """All is there: from now on the hold counts."""
    progress.guard(connection)
    missing = [one for one in queries.pinned_blobs(connection, found) if not one.is_there]
    if missing:
        raise StorageError(queries.why_not_there(connection, missing[0].blob, found.tier))
    if seconds := float(progress.journal.get("hold", 0)):
        queries.set_expiry(connection, found.pin, seconds)


def state_of(connection: Connection, pin: str) -> PinState:
    """A pin as it stands."""
    found = _known(connection, pin)
    job = job_of(connection, PIN, pin)
    pinned = queries.pinned_blobs(connection, found)
    number = queries.count_pinned(connection, pin)
    state, because = _judge(connection, found, job, pinned, number)
    total = sum(one.num_bytes for one in pinned)
    is_fetching = state == "fetching" and job is not None
    return PinState(
        pin=pin,
        target=found.target,
        tier=found.tier,
        is_warm=not because,
        because=because,
        state=state,
        done_bytes=job.done_bytes if is_fetching and job is not None else total,
        total_bytes=total,
        num_blobs=number,
        created_unix=found.created_unix,
        expires_unix=found.expires_unix,
    )


def _judge(
    connection: Connection,
    found: Pin,
    job: Job | None,
    pinned: Sequence[PinnedBlob],
    number: int,
) -> tuple[State, str]:
    if job is not None and job.state == "failed":
        return "failed", f"it could not be fetched: {job.error}"
    if found.has_ended:
        reason = queries.why_ended(connection, found)
        return "ended", reason or f"the hold ended at {_moment(found.expires_unix)}"
    if job is not None and job.state in ("queued", "running"):
        trouble = f"; the last try failed: {job.error}" if job.error else ""
        return "fetching", f"{job.done_bytes} of {job.total_bytes} bytes are there{trouble}"
    if len(pinned) < number:
        return "held", f"{number - len(pinned)} of its {number} blobs were deleted"
    missing = [one.blob for one in pinned if not one.is_there]
    if missing:
        reason = queries.why_not_there(connection, missing[0], found.tier)
        return "held", f"{len(missing)} of its {number} blobs are not in {found.tier}: {reason}"
    return "held", ""


def _moment(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
