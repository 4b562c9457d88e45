"""Upload sessions: what a client writes is its session's until it is committed, or it goes away.

A session is a lease (a row with an expiry by the catalog's clock), a slot of shared memory and a
file on its way into a landing tier. Renewals and every other call keep it alive; without them it
ends, and slot, unfinished file, reservation and what it landed go with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from forebay_server.catalog import queries_uploads as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.publish.calls import Calls
from forebay_server.publish.duplicates import Duplicates
from forebay_server.publish.expiry import Expiry
from forebay_server.publish.in_slot import open_in_slot
from forebay_server.publish.known import KnownSegments
from forebay_server.publish.landing import BlobLanding, PublishedBlob
from forebay_server.publish.leftovers import Leftovers
from forebay_server.publish.placing import (
    Known,
    begin_landing,
    land_in_full,
    land_somewhere,
    run_to_end,
)
from forebay_server.publish.recording import Recorder
from forebay_server.publish.session import (
    Grant,
    LandedBlob,
    Piece,
    Session,
    check_owner,
    ended,
    slot_owner,
)
from forebay_server.publish.slots import SlotKeeper
from forebay_server.quarantine import Quarantine
from forebay_server.tier.memory import Slot
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import Conflict, ForebayError, ResourceExhausted
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import check_random_name, new_random_name
from forebay_wire.limits import (
    MAX_BLOB_BYTES,
    MAX_SHARDS_PER_VERSION,
    MAX_UPLOAD_SLOT_BYTES,
    check_limit,
)
from forebay_wire.segments import SegmentTable

__all__ = ["Grant", "LandedBlob", "Uploads"]

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

DEFAULT_LEASE_SECONDS: Final = 60.0

ANSWER_SECONDS: Final = 0.004
"""Before a sealed blob lands: all cores are busy then, and its client waits for the answer."""

MAX_SESSIONS: Final = 2 * MAX_SHARDS_PER_VERSION
"""In memory at a time; those that have landed hold no slot."""

NUM_WRITING_THREADS: Final = 12
"""Write what lands, copy and digest what comes next: up to three for each landing at a time."""


class Uploads:
    """All upload sessions of this node. Belongs to the event loop; ``slot`` is thread-safe.

    ``start`` begins to look for expired leases, ``close`` ends all sessions.
    """

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        *,
        node: str = "",
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        forget: Callable[[str], object] = lambda blob: None,
    ) -> None:
        """*forget* is told the id of a blob whose local files are about to be deleted."""
        self.lease_seconds = lease_seconds
        self._catalog = catalog
        self._tiers = tiers
        self._node = node
        self._listeners: list[Callable[[str], Awaitable[None]]] = []
        self._landing_order: Callable[[str], Sequence[str]] = lambda owner: ()
        self._sessions: dict[str, Session] = {}
        self.known = KnownSegments(catalog, tiers, node)
        self._slots = self.slots = SlotKeeper(tiers)
        self._leftovers = Leftovers(catalog, tiers, forget)
        duplicates = Duplicates(catalog, tiers, Quarantine(tiers, catalog, forget=forget))
        self.recorder = Recorder(catalog, duplicates, self._leftovers, node)
        self._calls = Calls("uploads")
        self._landings = Calls("landings")
        self._expiry = Expiry(catalog, lease_seconds, self._expire, self._drop_idle_slots)
        self._writing = ThreadPoolExecutor(NUM_WRITING_THREADS, thread_name_prefix="landing-write")

    def listen(self, listener: Callable[[str], Awaitable[None]]) -> None:
        """Have *listener* told the name of each session that ended before it was sealed, unless
        :meth:`end` ended it."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Begin to end sessions whose lease ran out."""
        self._expiry.start()

    async def drain(self, timeout_seconds: float) -> bool:
        """Wait for what is sealed to land, also for what is sealed meanwhile; whether all did."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while waiting := self._calls.running | self._landings.running:
            if (left_seconds := deadline - loop.time()) <= 0:
                break
            await asyncio.wait(waiting, timeout=left_seconds)
        return not self._landings.running

    async def close(self) -> None:
        """Cancel what still lands and end every session. Idempotent."""
        await self._expiry.close()
        for task in self._landings.running:
            task.cancel()
        while waiting := self._calls.running | self._landings.running:
            await asyncio.wait(waiting)
        for found in list(self._sessions.values()):
            await self._drop_from_memory(found)
        await asyncio.to_thread(self._writing.shutdown)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_landing(self) -> int:
        """Sealed blobs that still land in the background."""
        return len(self._landings.running)

    # --------------------------------------------------------------------- the client's calls

    def prefer(self, landing_order: Callable[[str], Sequence[str]]) -> None:
        """Have *landing_order* say, for an owner, in which kinds of tiers new bytes land, best
        first."""
        self._landing_order = landing_order

    async def begin(
        self,
        uid: int,
        owner: str,
        total_bytes: int,
        slot_bytes: int,
        *,
        minimum_bytes: int = 0,
        new_bytes: int = 0,
        bind: Callable[[Connection, str], object] | None = None,
        is_ahead: bool = False,
    ) -> Grant:
        """Open a session with a slot of at most *slot_bytes* and room for *total_bytes* reserved.
        With *minimum_bytes* room for as little as that will do, and the slot is no larger then;
        with *new_bytes* for as little as that, as the rest is likely to be shared.

        *owner* says what it is for (``dataset NAME``); its slots are reused among its sessions.
        *bind* is called with the new session's name in the transaction that records it; if it
        raises, there is no session. Unless it *is_ahead* of its need, memory that others have on
        loan is waited for, 20 s at most, and what they have cached goes where there is no room.
        :class:`ResourceExhausted` if no landing tier has room, or there is no memory.
        """
        check_limit("bytes of the blob", total_bytes, MAX_BLOB_BYTES, "write several blobs")
        check_limit("slot bytes", slot_bytes, MAX_UPLOAD_SLOT_BYTES, "append in pieces")
        check_owner(owner)
        if len(self._sessions) >= MAX_SESSIONS:
            raise ResourceExhausted(
                f"{len(self._sessions)} upload sessions are open, the limit is {MAX_SESSIONS}: "
                "commit or abort some"
            )
        what = uid, owner, total_bytes, slot_bytes, minimum_bytes, new_bytes, bind, is_ahead
        if is_ahead:
            return await self._calls.finish(self._begin(*what))
        return await self._slots.begin_for_sure(
            slot_owner(uid, owner), slot_bytes, lambda: self._calls.finish(self._begin(*what))
        )

    async def bind(self, session: str, uid: int, bind: Callable[[Connection, str], T]) -> T:
        """Say in one transaction what an open session is for that was begun without; if *bind*
        raises, it stays as it was."""
        found = self._find(session, uid)
        return await self._calls.finish(self._bind(found, bind))

    async def append(self, session: str, uid: int, piece: Piece) -> int:
        """Take *piece* of the slot as the blob's next bytes; the blob's bytes so far.

        On return that part of the slot may be overwritten. A failed write ends the session.
        """
        found = self._find(session, uid)
        return await self._calls.finish(self._append(found, piece))

    async def seal(self, session: str, uid: int, piece: Piece) -> LandedBlob:
        """Take *piece* of the slot as the last bytes and land the blob.
        On return it is fsynced and held by the session: garbage, unless a manifest that names it is
        committed before the lease ends. Idempotent.
        """
        found = self._find(session, uid)
        return await self._calls.finish(self._seal(found, piece))

    async def seal_in_background(
        self,
        session: str,
        uid: int,
        piece: Piece,
        *,
        sealed: Callable[[Connection], S],
        landed: Callable[[Connection, LandedBlob], T],
        known: Known | None = None,
    ) -> tuple[S, asyncio.Task[T]]:
        """Like :meth:`seal`, without waiting for the landing: ``(what sealed() gave, landing)``.
        *sealed* runs in the transaction that marks the session sealed; from then on nothing the
        client does ends it. *landed* runs in the transaction that records the landed blob and ends
        the session, so it has to name the blob (in a pack) or leave it to the collector. The task's
        result is what *landed* returned; if landing or *landed* fails, the task raises and nothing
        stays. Idempotent while it lands; afterwards the session is unknown, and its slot is held
        until :meth:`reuse` or :meth:`end` is told of it: its client may offer it again meanwhile.
        What *known* says to lie in the tier is referenced and not written.
        """
        found = self._find(session, uid)
        return await self._calls.finish(self._seal_behind(found, piece, sealed, landed, known))

    async def renew(self, session: str, uid: int) -> Grant:
        """Extend the lease of the session and of all that its owner has landed."""
        found = self._find(session, uid)
        if not await self._renew_row(found):
            await self._calls.finish(self._abort_and_tell(found))
            raise ended(session)
        return Grant(session, found.slot.capacity_bytes, self.lease_seconds)

    async def abort(self, session: str, uid: int) -> None:
        """End the session and drop its bytes. Idempotent, also for unknown sessions.

        :class:`Conflict` for one that is sealed and lands in the background.
        """
        check_random_name("session", session)
        if session in self._sessions:
            await self._calls.finish(self._abort_and_tell(self._find(session, uid), keep_slot=True))

    def slot(self, session: str, uid: int) -> Slot:
        """The slot of an open session, to be handed over or written to. Thread-safe."""
        found = self._find(session, uid)
        found.open_landing()
        return found.slot

    async def peek(
        self, session: str, uid: int, offset: int, num_bytes: int, use: Callable[[bytearray], T]
    ) -> T:
        """What *use* makes, in a thread, of a copy of bytes of an open session's slot."""
        found = self._find(session, uid)

        def read() -> T:
            data = bytearray(num_bytes)
            found.slot.read_into(offset, data)
            return use(data)

        async with found.lock:  # while it is held, the slot is not closed
            found.open_landing()
            return await run_to_end(self._tiers.run(self._tiers.slots, read))

    # --------------------------------------------------------------------- the daemon's calls

    async def end(self, sessions: Iterable[str]) -> None:
        """End sessions from the daemon's side (a fenced attempt); sealed ones go on landing.

        Their clients do not know, and may write on: the slots, also held ones, are not used again.
        """
        for session in sessions:
            found = self._sessions.get(session)
            if found is not None:
                found.keeps_slot = False
                with contextlib.suppress(Conflict):
                    await self._calls.finish(self._abort(found))
            await self._calls.finish(self._slots.close_held(session))

    async def open_sealed(self, session: str) -> SegmentTable | None:
        """Have the blob that a sealed session lands be read from its slot until then; its table.

        None if the slot does not hold all of it, or it has landed, failed or is unknown.
        """
        found = self._sessions.get(session)
        return (
            await self._calls.finish(open_in_slot(self._tiers, found))
            if found is not None
            else None
        )

    def reuse(self, sessions: Iterable[str]) -> None:
        """What these sealed in the background is committed: their owners may have the slots."""
        for session in sessions:
            found = self._sessions.get(session)
            if found is not None and found.keeps_slot is None:
                found.keeps_slot = True
            self._slots.reuse_held(session)

    def committed(self, sessions: Iterable[str]) -> None:
        """A transaction named the blobs of these sessions and ended their rows."""
        owners = set()
        for session in sessions:
            found = self._sessions.pop(session, None)
            if found is not None:
                found.state = "ended"
                owners.add(found.slot_owner)
        busy = {found.slot_owner for found in self._sessions.values()}
        for owner in owners - busy:
            self._slots.drop_owner(owner)

    async def drop_slots(self, uid: int, owner: str) -> None:
        """Give the memory back that was kept warm for *owner*: unmapping it takes a while."""
        await asyncio.to_thread(self._slots.drop_owner, slot_owner(uid, owner))

    # -------------------------------------------------------------------------- begin, append

    async def _begin(
        self,
        uid: int,
        owner: str,
        total_bytes: int,
        slot_bytes: int,
        minimum_bytes: int,
        new_bytes: int,
        bind: Callable[[Connection, str], object] | None,
        is_ahead: bool,
    ) -> Grant:
        slot = await self._slots.lend(slot_owner(uid, owner), slot_bytes, keeps_last=is_ahead)
        try:
            file = new_random_name()
            tier, landing, room = await begin_landing(
                self._tiers,
                file,
                total_bytes,
                self._writing,
                minimum_bytes=minimum_bytes,
                new_bytes=new_bytes,
                order=self._landing_order(owner),
                may_relieve=not is_ahead,
            )
        except BaseException:
            self._slots.keep_warm(slot)
            raise
        found = Session(new_random_name(), uid, owner, slot, tier, file, landing)
        try:
            await self._catalog.write(lambda connection: self._insert(connection, found, bind))
        except BaseException:
            await self._drop_from_memory(found, keep_slot=True)
            raise
        found.renewed_at = asyncio.get_running_loop().time()
        self._sessions[found.name] = found
        has_room = bool(new_bytes) or room >= total_bytes
        usable = slot.capacity_bytes if has_room else min(slot.capacity_bytes, room)
        return Grant(found.name, usable, self.lease_seconds)

    def _insert(
        self,
        connection: Connection,
        found: Session,
        bind: Callable[[Connection, str], object] | None,
    ) -> None:
        queries.insert_upload(
            connection,
            found.name,
            owner=found.owner,
            uid=found.uid,
            tier=found.tier.name,
            file=found.file,
            lease_seconds=self.lease_seconds,
        )
        if bind is not None:
            bind(connection, found.name)

    async def _bind(self, found: Session, bind: Callable[[Connection, str], T]) -> T:
        async with found.lock:  # while it is held, the session does not expire
            found.open_landing()
            return await self._catalog.write(lambda connection: bind(connection, found.name))

    async def _append(self, found: Session, piece: Piece) -> int:
        async with found.lock:
            landing = found.open_landing()
            if piece != found.last_piece:
                found.check_piece(piece)
                await self._take(found, landing, piece)
                await self._keep_alive(found)
            return landing.num_bytes

    async def _take(self, found: Session, landing: BlobLanding, piece: Piece) -> None:
        try:
            await run_to_end(
                self._tiers.run_landing(
                    found.tier, landing.take, found.slot, piece.slot_offset, piece.cuts
                )
            )
        except BaseException:
            await self._end(found)
            await self._tell_ended(found.name)
            raise
        found.last_piece = piece

    # ----------------------------------------------------------------------------- seal, land

    async def _seal(self, found: Session, piece: Piece) -> LandedBlob:
        async with found.lock:
            if found.landed is not None:
                return found.landed
            landing = found.open_landing()
            found.check_piece(piece)
            await self._take(found, landing, piece)
            publishing = run_to_end(self._tiers.run_landing(found.tier, landing.publish))
            found.landed, _ = await self._land(found, publishing, lambda connection, blob: None)
            found.state = "landed"
            await self._keep_alive(found)
            return found.landed

    async def _seal_behind(
        self,
        found: Session,
        piece: Piece,
        sealed: Callable[[Connection], S],
        landed: Callable[[Connection, LandedBlob], T],
        known: Known | None,
    ) -> tuple[S, asyncio.Task[T]]:
        async with found.lock:
            if found.background is not None:
                return found.background
            found.open_landing()
            found.check_piece(piece)

            def seal(connection: Connection) -> S:
                queries.mark_sealed(connection, found.name)
                return sealed(connection)

            answer = await self._catalog.write(seal)
            found.state, found.sealed_piece = "sealed", piece
            task = asyncio.create_task(
                self._land_behind(found, piece, landed, known), name=f"land-{found.name}"
            )
            self._landings.keep(task)
            found.background = (answer, task)
            return found.background

    async def _land_behind(
        self,
        found: Session,
        piece: Piece,
        landed: Callable[[Connection, LandedBlob], T],
        known: Known | None,
    ) -> T:
        def record_end(connection: Connection, blob: LandedBlob) -> T:
            value = landed(connection, blob)
            queries.end_claimed(connection, found.name)
            return value

        await asyncio.sleep(ANSWER_SECONDS)
        where = self._catalog, self._tiers, self._writing, found, piece
        again = functools.partial(land_in_full, *where)
        _, value = await self._land(found, land_somewhere(*where, known), record_end, again)
        self._sessions.pop(found.name, None)
        found.state = "ended"
        return value

    async def _land(
        self,
        found: Session,
        publishing: Awaitable[PublishedBlob],
        landed: Callable[[Connection, LandedBlob], T],
        again: Callable[[], Awaitable[PublishedBlob]] | None = None,
    ) -> tuple[LandedBlob, T]:
        """Publish and record, and *again* what shares pieces that are not safe any more; on any
        other error the session ends and nothing stays."""
        try:
            blob, value, spare = await self.recorder.record(found, publishing, landed, again)
        except BaseException:
            await self._end(found)
            await self._tell_ended(found.name)
            raise
        failpoint("upload.after_row")
        found.landing = None
        await self._settle_slot(found)
        await self._leftovers.delete_files(spare)
        return blob, value

    # ----------------------------------------------------------------------------------- ends

    async def _abort(self, found: Session, *, keep_slot: bool = False) -> None:
        async with found.lock:
            if found.state == "sealed":
                raise Conflict(
                    f"upload session {found.name} is sealed and lands without its client"
                )
            if found.state != "ended":
                await self._end(found, keep_slot=keep_slot)

    async def _abort_and_tell(self, found: Session, *, keep_slot: bool = False) -> None:
        await self._abort(found, keep_slot=keep_slot)
        await self._tell_ended(found.name)

    async def _tell_ended(self, session: str) -> None:
        for listener in self._listeners:
            try:
                await listener(session)
            except ForebayError as error:
                logger.warning("the end of upload session %s is not noted: %s", session, error)

    async def _end(self, found: Session, *, keep_slot: bool = False) -> None:
        """End the session everywhere. What the catalog cannot do now, its expiry does later."""
        await self._drop_from_memory(found, keep_slot=keep_slot)
        await self._leftovers.end(found)

    async def _drop_from_memory(self, found: Session, *, keep_slot: bool = False) -> None:
        """Forget the session; *keep_slot* only if its client asked for the end."""
        self._sessions.pop(found.name, None)
        found.state = "ended"
        if found.landing is not None:
            landing, found.landing = found.landing, None
            found.keeps_slot = keep_slot
            await run_to_end(self._tiers.run(found.tier, landing.abort))
            await self._settle_slot(found)

    async def _settle_slot(self, found: Session) -> None:
        """Take the slot back, or hold it where nobody knows yet whether it may be used again."""
        self._tiers.sealed.forget(found.name)
        if found.state == "sealed" and found.keeps_slot is None:
            self._slots.hold(found.name, found.slot, found.table_in_slot)
        elif found.keeps_slot is False:
            await self._slots.close(found.slot)
        else:
            table = found.table_in_slot if found.state == "sealed" else None
            self._slots.keep_warm(found.slot, table)

    # --------------------------------------------------------------------------------- leases

    async def _keep_alive(self, found: Session) -> None:
        """Renew, unless that was done within a third of the lease."""
        now = asyncio.get_running_loop().time()
        if now - found.renewed_at > self.lease_seconds / 3:
            await self._renew_row(found)

    async def _renew_row(self, found: Session) -> bool:
        found.renewed_at = asyncio.get_running_loop().time()
        return await self._catalog.write(
            lambda connection: queries.renew_uploads(
                connection,
                found.name,
                owner=found.owner,
                uid=found.uid,
                lease_seconds=self.lease_seconds,
            )
        )

    def _drop_idle_slots(self) -> None:
        self._slots.drop_idle(
            {found.slot_owner for found in self._sessions.values() if found.landing is not None}
        )

    async def _expire(self, session: str) -> None:
        await self._calls.finish(self._expire_one(session))

    async def _expire_one(self, session: str) -> None:
        found = self._sessions.get(session)
        if found is not None and found.lock.locked():
            await self._renew_row(found)  # a call works on it: that is a sign of life
            return
        async with found.lock if found is not None else contextlib.nullcontext():
            row = await self._catalog.write(
                lambda connection: queries.end_expired(
                    connection, session, self._leftovers.local_tiers()
                )
            )
            if row is None:
                return
            if found is not None and found.state != "ended":
                logger.info("upload session %s of %s expired", session, found.owner)
                await self._drop_from_memory(found)
        await self._tell_ended(session)
        await self._leftovers.delete_landed(row)

    # -------------------------------------------------------------------------------- helpers

    def _find(self, session: str, uid: int) -> Session:
        check_random_name("session", session)
        found = self._sessions.get(session)
        if found is None:
            raise ended(session)
        found.check_user(uid)
        return found
