"""Checkpoints: the packs of all ranks become one committed generation, or nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeVar

from forebay_server.catalog import queries_checkpoints as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_checkpoints import PackInfo, PackPlan
from forebay_server.catalog.queries_jobs import COLLECT, GARBAGE, enqueue, enqueue_collection
from forebay_server.catalog.queries_lineage import forks_needing, forks_needing_run
from forebay_server.catalog.queries_managing import queue_notes, set_keep
from forebay_server.catalog.queries_runs import AttemptInfo, find_generation, load_lineage
from forebay_server.catalog.queries_sharing import likely_new_bytes
from forebay_server.catalog.queries_trash import trash_generations
from forebay_server.model.lineage import Point, needed_as_parent
from forebay_server.model.save_rounds import Ask, Ruling
from forebay_server.model.states import GenerationState, PackState
from forebay_server.publish.calls import Calls
from forebay_server.publish.generations import COMMITTED, Generations, check_step
from forebay_server.publish.lease import Grant, LandedBlob, Uploads
from forebay_server.publish.managing import Managing
from forebay_server.publish.prepared import PreparedSessions
from forebay_server.publish.readers import Readers
from forebay_server.publish.seal import PackSeal, told_by
from forebay_server.publish.sealed import SealedGenerations
from forebay_server.publish.session import Piece, slot_owner
from forebay_server.publish.verdicts import SaveVerdicts
from forebay_wire.errors import (
    Conflict,
    ForebayError,
    InvalidRequest,
    ResourceExhausted,
)
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import GenerationId, check_name
from forebay_wire.limits import (
    MAX_DESCRIPTION_BYTES,
    MAX_RANKS,
    MAX_UPLOAD_SLOT_BYTES,
    check_limit,
)
from forebay_wire.manifest import canonical_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_SLOTS: Final = 2
"""Of one rank in one attempt: one is filled while the other's bytes land."""

SLOT_SECONDS: Final = 600.0
"""How long a rank waits for one of its own slots, unless it says so itself."""


ALL_ATTEMPTS: Final = 1 << 62
"""More than any."""

AHEAD_SECONDS: Final = 5.0
"""How long a slot that is asked for ahead waits for that of the pack before, which is local."""


class JobQueue(Protocol):
    """What is needed of :class:`forebay_server.move.jobs.Jobs`."""

    def wake(self) -> None:
        """There may be new work."""
        ...

    def listen(self, listener: Callable[[str], object]) -> None:
        """Have *listener* told the target of each try that ended, well or not."""
        ...


@dataclass(frozen=True)
class SaveAsk:
    """A rank asks, before it begins its pack, whether all may save by the plan they hold."""

    number: int
    """Of the save within the attempt, from 1; the same on all ranks."""
    ask: Ask


class Checkpoints:
    """Runs, attempts and generations. Belongs to the event loop.

    A sealed pack lands in the background, whatever its trainer does meanwhile; whoever lands last
    commits the generation in the transaction that records its blob.
    """

    def __init__(
        self,
        catalog: Catalog,
        uploads: Uploads,
        jobs: JobQueue,
        *,
        trash_seconds: float = 0.0,
        why_not_remote: str = "",
    ) -> None:
        """*trash_seconds*: how long what is deleted can be restored; *why_not_remote*: why nothing
        ever becomes remote, empty: it does."""
        self._trash_seconds = trash_seconds
        self._catalog = catalog
        self._uploads = uploads
        self._jobs = jobs
        self._sealed = SealedGenerations(catalog, uploads)
        self.readers = Readers()
        self.generations = Generations(catalog, self._sealed, why_not_remote, self.readers)
        self.managing = Managing(catalog, jobs.wake)
        jobs.listen(self.generations.announce)  # the target of a flush is a manifest
        self._calls = Calls("checkpoints")
        self._followed: set[str] = set()
        # Run to (attempt, uid, owner) of the slots that its ranks keep warm.
        self._slots: dict[str, set[tuple[int, int, str]]] = {}
        self._verdicts = SaveVerdicts()
        self._prepared = PreparedSessions(uploads)

    async def close(self) -> None:
        """Wait for what still settles; after the uploads are closed. Idempotent."""
        await self._calls.wait()

    # ---------------------------------------------------------------------------------- attempts

    async def begin_attempt(
        self,
        run: str,
        parent: Point | None,
        num_ranks: int,
        request: str,
        *,
        fork: GenerationId | None = None,
        keep_json: str | None = None,
    ) -> AttemptInfo:
        """Open the run's next attempt, standing on *parent*, in one transaction; durable on return.

        Or standing on the generation *fork* of another run, which is kept until the run has
        committed one of its own. With *keep_json* that is what is kept of the run from here
        on.
        Generations of older attempts that not all ranks have sealed are aborted and their sessions
        ended; sealed ones go on landing. Idempotent by *request*.
        """
        check_name("run", run)
        _check_num_ranks(num_ranks)
        check_name("request", request)
        if parent is not None:
            check_step(parent.step)

        def begin(connection: Connection) -> queries.Fencing:
            fencing = queries.open_attempt(connection, run, parent, num_ranks, request, fork=fork)
            if fencing.is_new and keep_json is not None:
                set_keep(connection, run, keep_json)
            if fencing.is_new and fork is not None:
                queue_notes(connection, run)
            if fencing.aborted:
                enqueue_collection(connection)
            return fencing

        return await self._calls.finish(self._begin_attempt(run, begin))

    async def _begin_attempt(
        self, run: str, begin: Callable[[Connection], queries.Fencing]
    ) -> AttemptInfo:
        failpoint("attempt.before_commit")
        fencing = await self._catalog.write(begin)
        failpoint("attempt.after_commit")
        if fencing.is_new:
            await self._uploads.end(fencing.sessions)
            self._drop_slots(run, fencing.attempt.attempt)
            self._announce(*fencing.aborted)
            self._jobs.wake()
        return fencing.attempt

    def _drop_slots(self, run: str, newest: int) -> None:
        """Give the memory back that older attempts keep warm; slots in use follow by themselves."""
        self._verdicts.forget(run, newest)
        kept = self._slots.pop(run, set())
        for attempt, uid, owner in kept:
            if attempt < newest:
                self._calls.keep(asyncio.create_task(self._drop_owner(uid, owner)))
        if left := {one for one in kept if one[0] >= newest}:
            self._slots[run] = left

    async def _drop_owner(self, uid: int, owner: str) -> None:
        await self._prepared.drop(slot_owner(uid, owner))
        await self._uploads.drop_slots(uid, owner)

    # ------------------------------------------------------------------------------------- packs

    async def begin_pack(
        self, uid: int, plan: PackPlan, slot_bytes: int, wait_seconds: float = SLOT_SECONDS
    ) -> Grant:
        """Reserve room for one rank's pack and grant a slot; the first rank makes the generation.

        The slot may be smaller than wanted where memory is short. While two earlier packs of this
        rank have not landed, this waits, *wait_seconds* at most. :class:`AlreadyExists` if this
        rank sealed this step before, :class:`Fenced` in an older attempt, :class:`Conflict` if the
        ranks disagree on their number, :class:`ResourceExhausted` if no landing tier has room:
        nothing committed is touched by that.
        """
        _check_plan(plan)
        owner = slot_owner(uid, _owner_of(plan))
        if not self._prepared.has(owner) and self._uploads.slots.num_in_use(owner) >= NUM_SLOTS:
            await self._catalog.read(lambda connection: queries.check_plan(connection, plan))
            await self._uploads.slots.wait_for_one_of(owner, NUM_SLOTS, wait_seconds)
        return await self._calls.finish(self._begin_pack(uid, plan, slot_bytes))

    async def ask_to_save(self, uid: int, plan: PackPlan, asked: SaveAsk) -> Ruling:
        """How all ranks of the attempt go on with a save, once all of them have asked.

        What they plan anew, or copy, they begin with :meth:`begin_pack`. Raises what that would
        raise for the plan; then the other ranks are told to stop.
        """
        _check_plan(plan)
        generation = plan.generation
        key, ask = (generation.run, generation.attempt), asked.ask

        def is_busy() -> bool:
            names = (_owner(*key, rank) for rank in range(plan.num_ranks))
            owners = [slot_owner(uid, one) for one in names]
            in_use = self._uploads.slots.num_in_use
            return any(in_use(one) - self._prepared.has(one) >= NUM_SLOTS for one in owners)

        try:
            if plan.num_ranks > 1:  # else nobody is held up by what the beginning refuses
                await self._catalog.read(lambda connection: queries.check_plan(connection, plan))
        except ForebayError:
            ask = Ask(ask.step, "")
            await self._verdicts.ask(key, plan.num_ranks, plan.rank, asked.number, ask, is_busy)
            raise
        return await self._verdicts.ask(key, plan.num_ranks, plan.rank, asked.number, ask, is_busy)

    async def prepare_pack(
        self, uid: int, run: str, attempt: int, rank: int, total_bytes: int, slot_bytes: int
    ) -> Grant | None:
        """A session for the next pack of a rank, before it is known what that holds; None: not now.

        Without bytes the one that there is ends: it is not wanted any more.
        :meth:`begin_pack` gives the next pack of the rank this session if it has room for it.
        Nothing that others use is waited for or taken, but what this rank's last pack still has.
        :class:`Fenced` in an older attempt.
        """
        check_name("run", run)
        owner = _owner(run, attempt, rank)

        if not slot_bytes:
            await self._prepared.give_up(uid, owner)
            return None

        def look(connection: Connection) -> int:
            queries.check_newest(connection, run, attempt)
            return likely_new_bytes(connection, run, rank)

        likely = await self._catalog.read(look)
        self._slots.setdefault(run, set()).add((attempt, uid, owner))
        try:
            slot = slot_owner(uid, owner)
            if not self._prepared.has(slot):
                await self._uploads.slots.wait_for_one_of(slot, 1, AHEAD_SECONDS)
            size = total_bytes, min(slot_bytes, MAX_UPLOAD_SLOT_BYTES), min(likely, total_bytes)
            grant = await self._prepared.begin(uid, owner, *size)
            if (attempt, uid, owner) not in self._slots.get(run, ()):  # a newer one began meanwhile
                await self._prepared.drop(slot)
                return None
            return grant
        except ResourceExhausted as error:
            logger.debug("no slot ahead for %s: %s", owner, error)
            return None

    async def _begin_pack(self, uid: int, plan: PackPlan, slot_bytes: int) -> Grant:
        slot_bytes = min(slot_bytes, MAX_UPLOAD_SLOT_BYTES)
        failpoint("pack.before_begin")
        found = await self._begin_prepared(uid, plan, slot_bytes)
        grant = found or await self._begin_anew(uid, plan, slot_bytes)
        failpoint("pack.after_begin")
        generation = plan.generation
        kept = self._slots.setdefault(generation.run, set())
        kept.add((generation.attempt, uid, _owner_of(plan)))
        return grant

    async def _begin_prepared(self, uid: int, plan: PackPlan, slot_bytes: int) -> Grant | None:
        """In the session that the rank was given ahead, if that will do."""
        size = plan.num_bytes, slot_bytes
        found = await self._prepared.use(
            uid, _owner_of(plan), *size, lambda c, session: queries.insert_pack(c, plan, session)
        )
        if found is None:
            return None
        grant, replaced = found
        if replaced is not None:
            await self._uploads.end([replaced])
        return replace(grant, was_ahead=True)

    async def _begin_anew(self, uid: int, plan: PackPlan, slot_bytes: int) -> Grant:
        generation = plan.generation

        def look(connection: Connection) -> tuple[str | None, int]:
            replaced = queries.check_plan(connection, plan)
            return replaced, likely_new_bytes(connection, generation.run, plan.rank)

        replaced, likely = await self._catalog.read(look)
        if replaced is not None:
            await self._uploads.end([replaced])
        try:
            return await self._uploads.begin(
                uid,
                _owner_of(plan),
                plan.num_bytes,
                slot_bytes,
                new_bytes=min(likely, plan.num_bytes),
                bind=lambda connection, session: queries.insert_pack(connection, plan, session),
            )
        except ResourceExhausted as error:
            reason = f"rank {plan.rank}: {error.message}"
            await self._catalog.write(
                lambda connection: queries.note_trouble(connection, generation, reason)
            )
            self._announce(generation)
            raise

    async def session_ended(self, session: str) -> None:
        """An upload session ended before it was sealed: tell those who wait for its pack."""
        generation = await self._catalog.write(
            lambda connection: queries.drop_open_pack(
                connection, session, "its upload ended before it was sealed; save the step again"
            )
        )
        if generation is not None:
            self._announce(generation)

    async def seal_pack(self, uid: int, seal: PackSeal) -> bool:
        """The pack is complete in the slot: from here on it lands without its trainer.

        Answers at once whether all ranks have sealed now; the generation is then ``ram``.
        :class:`Fenced` in an older attempt. Idempotent per session.
        """
        check_limit(
            "bytes of a pack's description",
            seal.description_bytes,
            MAX_DESCRIPTION_BYTES,
            "save fewer tensors per rank",
        )
        return await self._calls.finish(self._seal_pack(uid, seal))

    async def _seal_pack(self, uid: int, seal: PackSeal) -> bool:
        failpoint("pack.before_seal")
        session = seal.session
        # Side by side: each waits for a thread.
        looking = asyncio.create_task(
            self._catalog.read(lambda connection: queries.check_sealable(connection, session))
        )
        reading = asyncio.create_task(self._read_description(uid, seal))
        await asyncio.wait([looking, reading])
        unreadable = reading.exception()
        pack = looking.result()  # says best why there is no such session
        if pack.state is not PackState.OPEN:
            info = await self.generations.look(pack.generation)
            return info.num_sealed == info.num_ranks
        if unreadable is not None:
            raise unreadable
        description = reading.result()
        told = told_by(seal)

        def sealed(connection: Connection) -> bool:
            given = session, pack.num_bytes, description, told, seal.stall_seconds
            return queries.seal_pack(connection, *given)

        def landed(connection: Connection, blob: LandedBlob) -> list[str]:
            if queries.land_pack(connection, session, blob) is None:
                return []
            return queries.sessions_of(connection, pack.generation)

        piece = Piece(seal.sequence, seal.num_bytes, tuple(seal.cuts))
        all_sealed, landing = await self._uploads.seal_in_background(
            session,
            uid,
            piece,
            sealed=sealed,
            landed=landed,
            known=partial(self._uploads.known.of, pack.generation.run),
        )
        failpoint("pack.after_seal")
        self._follow(pack, landing)
        self._announce(pack.generation)
        return all_sealed

    async def _read_description(self, uid: int, seal: PackSeal) -> bytes:
        """The JSON object behind the pack's last bytes, checked, as the manifest will hold it."""
        where = seal.session, uid, seal.num_bytes, seal.description_bytes
        return await self._uploads.peek(*where, _canonical)

    # ----------------------------------------------------------------------------------- landing

    def _follow(self, pack: PackInfo, landing: asyncio.Task[list[str]]) -> None:
        """Settle what comes of a landing, once. Its result: the generation's sessions if it
        committed that."""
        if pack.session in self._followed:
            return
        self._followed.add(pack.session)
        self._calls.keep(
            asyncio.create_task(self._settle(pack, landing), name=f"settle-{pack.session}")
        )

    async def _settle(self, pack: PackInfo, landing: asyncio.Task[list[str]]) -> None:
        try:
            await asyncio.wait([landing])
            if landing.cancelled():  # the daemon stops; its next start aborts the generation
                return
            error = landing.exception()
            if error is not None:
                await self._fail(pack, error)
            elif sessions := landing.result():
                failpoint("generation.after_commit")
                self._uploads.reuse(sessions)
                self._jobs.wake()
            await self._sealed.forget_if_final(pack.generation)
        finally:
            self._followed.discard(pack.session)
            self._announce(pack.generation)

    async def _fail(self, pack: PackInfo, error: BaseException) -> None:
        """A pack could not be landed: the generation cannot be committed any more."""
        reason = f"rank {pack.rank}: {str(error) or type(error).__name__}"
        generation = pack.generation

        def end(connection: Connection) -> list[str]:
            sessions = queries.end_generation(
                connection, generation, GenerationState.FAILED, reason
            )
            enqueue_collection(connection)
            return sessions

        try:
            sessions = await self._catalog.write(end)
        except ForebayError:
            logger.exception(
                "generation %s failed (%s) and could not be marked", generation, reason
            )
            return
        if sessions:
            logger.error("generation %s failed: %s", generation, reason)
            await self._uploads.end(sessions)
        self._jobs.wake()

    # ---------------------------------------------------------------------------------- deleting

    async def delete_generation(self, generation: GenerationId) -> int:
        """Put one generation into the trash; how many there were (0 or 1). Idempotent.

        Refused as :meth:`delete_generation_now`, which it is without a grace period.
        """
        check_name("run", generation.run)
        grace = self._trash_seconds
        return await self._calls.finish(self._delete(lambda c: _delete_one(c, generation, grace)))

    async def delete_generation_now(self, generation: GenerationId) -> int:
        """Delete one generation for good; how many there were (0 or 1). Idempotent.

        On return nobody sees it any more; a background job removes it from the object tier first
        and then its bytes, those that other generations share excepted. Refused
        (:class:`Conflict`) while it lands, and as long as the newest attempt stands on it without a
        generation of its own: a resume would silently lose that attempt's starting point.
        """
        check_name("run", generation.run)
        return await self._calls.finish(self._delete(lambda c: _delete_one(c, generation, 0.0)))

    async def delete_run(self, run: str) -> int:
        """Put a run with all attempts and committed generations into the trash; how many
        generations there were. Unfinished ones go for good. Its clients are fenced off.
        Idempotent."""
        check_name("run", run)
        grace = self._trash_seconds
        return await self._calls.finish(self._delete(lambda c: _delete_run(c, run, grace), run))

    async def delete_run_now(self, run: str) -> int:
        """Delete a run with all attempts and generations for good, also unfinished ones; how many
        generations there were. Its clients are fenced off. Idempotent."""
        check_name("run", run)
        return await self._calls.finish(self._delete(lambda c: _delete_run(c, run), run))

    async def _delete(
        self, forget: Callable[[Connection], tuple[int, list[str]]], run: str = ""
    ) -> int:
        """*run*: all of it is deleted."""

        def change(connection: Connection) -> tuple[int, list[str]]:
            found = forget(connection)
            enqueue_collection(connection)
            return found

        number, sessions = await self._catalog.write(change)
        await self._uploads.end(sessions)
        if run:
            self._drop_slots(run, ALL_ATTEMPTS)
        self._jobs.wake()
        return number

    # ----------------------------------------------------------------------------------- helpers

    def _announce(self, *generations: GenerationId) -> None:
        for generation in generations:
            self.generations.announce(str(generation))


async def recover_catalog_state(catalog: Catalog) -> int:
    """At the daemon's start, before leftover bytes are reclaimed: abort the generations that the
    previous incarnation had not committed; how many. Committed ones stand."""

    def recover(connection: Connection) -> int:
        aborted, _ = queries.abort_unlanded(connection)
        enqueue(connection, COLLECT, GARBAGE)
        return len(aborted)

    return await catalog.write(recover)


def _canonical(description: bytearray) -> bytes:
    try:
        parsed = json.loads(description)
    except ValueError as error:
        raise InvalidRequest(f"the pack's description is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest("the pack's description is no JSON object")
    return canonical_json(parsed)


def _delete_one(
    connection: Connection, generation: GenerationId, grace_seconds: float
) -> tuple[int, list[str]]:
    info = find_generation(connection, generation)
    lineage = load_lineage(connection, generation.run)
    if info is None or lineage is None:
        return 0, []
    if info.state is GenerationState.SEALED:
        raise Conflict(
            f"generation {generation} is still landing: wait until it is local, then delete it"
        )
    if info.pin is not None:
        raise Conflict(
            f"generation {generation} is pinned{f' ({info.pin})' if info.pin else ''}: unpin it "
            "first (forebay checkpoint pin --remove), then delete it"
        )
    if forks := forks_needing(connection, generation):
        raise Conflict(_needed_by_fork(str(generation), forks[0]))
    point = Point(generation.attempt, generation.step)
    if (attempt := needed_as_parent(point, lineage, COMMITTED)) is not None:
        raise Conflict(
            f"generation {generation} is what attempt {attempt} restored, and that has committed "
            "nothing of its own yet: delete it after its next commit, restore an older generation "
            "first, or delete the whole run"
        )
    if grace_seconds:
        trash_generations(connection, f"generation {generation}", [generation], grace_seconds)
    return queries.delete_generations(connection, [generation])


def _owner(run: str, attempt: int, rank: int) -> str:
    """Whose slots are reused among each other."""
    return f"run {run} attempt {attempt} rank {rank}"


def _owner_of(plan: PackPlan) -> str:
    return _owner(plan.generation.run, plan.generation.attempt, plan.rank)


def _check_plan(plan: PackPlan) -> None:
    check_name("run", plan.generation.run)
    _check_num_ranks(plan.num_ranks)
    check_step(plan.generation.step)
    if not 0 <= plan.rank < plan.num_ranks:
        raise InvalidRequest(
            f"rank {plan.rank} of {plan.num_ranks}: ranks count from 0 to {plan.num_ranks - 1}"
        )


def _delete_run(
    connection: Connection, run: str, grace_seconds: float = 0.0
) -> tuple[int, list[str]]:
    for fork, generation in forks_needing_run(connection, run):
        raise Conflict(_needed_by_fork(f"run {run} with generation {generation}", fork))
    return queries.delete_run(connection, run, grace_seconds)


def _needed_by_fork(what: str, fork: str) -> str:
    return (
        f"{what} is what run {fork} was forked from, and that has committed nothing of its own "
        f"yet: delete it after the first commit of run {fork}, or delete that run first"
    )


def _check_num_ranks(num_ranks: int) -> None:
    check_limit("ranks of a generation", num_ranks, MAX_RANKS, "use fewer ranks")
    if num_ranks < 1:
        raise InvalidRequest("a generation has at least one rank")
