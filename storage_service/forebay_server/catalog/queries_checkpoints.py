"""Changing runs: attempts begin, packs are planned, sealed and landed, generations committed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import (
    Connection,
    Row,
    case,
    delete,
    func,
    insert,
    select,
    update,
)

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import DELETE, FINGERPRINT, FLUSH, cancel_queued, enqueue
from forebay_server.catalog.queries_managing import (
    apply_wanted_tags,
    queue_notes,
    queue_retention,
)
from forebay_server.catalog.queries_manifests import commit_manifest
from forebay_server.catalog.queries_runs import (
    AttemptInfo,
    at,
    attempt_info,
    fork_of,
    parent_of,
)
from forebay_server.catalog.queries_settings import last_deleted_attempt, remember_attempt
from forebay_server.catalog.queries_steps import check_new_step, note_committed
from forebay_server.catalog.queries_trash import tombstone_of, trash_generations
from forebay_server.catalog.tables import (
    attempts,
    generations,
    packs,
    runs,
)
from forebay_server.model.lineage import Point
from forebay_server.model.states import (
    Event,
    GenerationState,
    PackState,
    advance,
    after_packs,
)
from forebay_wire.errors import AlreadyExists, Conflict, Fenced, InvalidRequest, NotFound
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import GenerationId
from forebay_wire.limits import MAX_GENERATION_DESCRIPTION_BYTES, check_limit
from forebay_wire.manifest import KIND_GENERATION, GenerationManifest, PackRef

DAEMON_ENDED = "the daemon ended before it was local: save the step again"

NOTHING_IN_SLOTS: Mapping[str, tuple[str, int]] = {}


@dataclass(frozen=True)
class PackInfo:
    """One rank's part of a generation."""

    generation: GenerationId
    rank: int
    state: PackState
    session: str
    num_bytes: int


@dataclass(frozen=True)
class Fencing:
    """What a new attempt put an end to."""

    attempt: AttemptInfo
    is_new: bool
    """False for a repeat of a request that was applied before."""
    aborted: tuple[GenerationId, ...]
    sessions: tuple[str, ...]
    """Upload sessions of the aborted generations."""


# ----------------------------------------------------------------------------------------- attempts


def open_attempt(
    connection: Connection,
    run: str,
    parent: Point | None,
    num_ranks: int,
    request: str,
    *,
    fork: GenerationId | None = None,
) -> Fencing:
    """Open the run's next attempt and abort what older ones have not sealed with all ranks.

    It stands on *parent*, or on the generation *fork* of another run. A repeated *request* is
    answered with its attempt and changes nothing.
    """
    known = connection.execute(select(attempts).where(attempts.c.request == request)).one_or_none()
    if known is not None:
        if known.run != run:
            raise Conflict(f"request {request} opened an attempt of run {known.run}, not of {run}")
        return Fencing(attempt_info(known), False, (), ())
    if parent is not None:
        _check_parent(connection, run, parent)
    if fork is not None:
        _check_fork(connection, run, fork)
    stands_on = parent if fork is None else Point(fork.attempt, fork.step)
    if connection.scalar(select(runs.c.run).where(runs.c.run == run)) is None:
        connection.execute(insert(runs).values(run=run))
    # Also after the run was deleted: a name means the same for ever, and old clients stay fenced.
    number = max(newest_attempt(connection, run) or 0, last_deleted_attempt(connection, run)) + 1
    aborted, sessions = _abort(
        connection,
        Event.FENCED,
        f"attempt {number} of the run began before all ranks had sealed it",
        generations.c.run == run,
    )
    connection.execute(
        insert(attempts).values(
            run=run,
            attempt=number,
            parent_run=fork.run if fork else "",
            parent_attempt=stands_on.attempt if stands_on else None,
            parent_step=stands_on.step if stands_on else None,
            num_ranks=num_ranks,
            request=request,
        )
    )
    row = connection.execute(select(attempts).where(attempts.c.request == request)).one()
    return Fencing(attempt_info(row), True, aborted, sessions)


def _check_parent(connection: Connection, run: str, parent: Point) -> None:
    state = connection.scalar(select(generations.c.state).where(at(GenerationId(run, *parent))))
    if state not in (GenerationState.COMMITTED, GenerationState.SEALED):  # or restored from memory
        raise NotFound(
            f"run {run} has no committed generation {parent} that a new attempt could stand on: "
            "restore 'latest' again and begin the attempt with what it names"
        )


def _check_fork(connection: Connection, run: str, fork: GenerationId) -> None:
    """Only a committed generation of another run may be forked, and only into a run that forked
    the same one before, or has no attempt yet."""
    if fork.run == run:
        raise InvalidRequest(f"run {run} cannot fork itself: restore one of its generations")
    state = connection.scalar(select(generations.c.state).where(at(fork)))
    if state != GenerationState.COMMITTED:
        raise NotFound(
            f"there is no committed generation {fork} that run {run} could fork: `forebay "
            f"checkpoint list {fork.run}` names what there is"
        )
    roots = {
        fork_of(row)
        for row in connection.execute(select(attempts).where(attempts.c.run == run))
        if parent_of(row) is None
    }
    if roots - {fork}:
        known = next(iter(roots - {fork}))
        raise Conflict(
            f"run {run} exists and "
            + (f"was forked from {known}" if known else "was not forked")
            + f": it cannot be forked from {fork} now; give the new run a name of its own"
        )


def newest_attempt(connection: Connection, run: str) -> int | None:
    """The number of the run's newest attempt, None without one."""
    number: int | None = connection.scalar(
        select(func.max(attempts.c.attempt)).where(attempts.c.run == run)
    )
    return number


def _abort(
    connection: Connection, event: Event, reason: str, *where: Any
) -> tuple[tuple[GenerationId, ...], tuple[str, ...]]:
    """Apply *event* to the unfinished generations; those that it ended, and their sessions."""
    unfinished = generations.c.state.in_((GenerationState.OPEN, GenerationState.SEALED))
    ended: list[GenerationId] = []
    sessions: list[str] = []
    for row in connection.execute(select(generations).where(unfinished, *where)).all():
        state = GenerationState(row.state)
        if advance(state, event) in (None, state):
            continue
        generation = GenerationId(row.run, row.attempt, row.step)
        sessions.extend(end_generation(connection, generation, GenerationState.ABORTED, reason))
        ended.append(generation)
    return tuple(ended), tuple(sessions)


def end_generation(
    connection: Connection, generation: GenerationId, state: GenerationState, error: str
) -> list[str]:
    """Abort or fail an unfinished generation: its landed bytes become garbage; the sessions of
    all its packs, which have to end."""
    changed = connection.execute(
        update(generations)
        .where(
            at(generation),
            generations.c.state.in_((GenerationState.OPEN, GenerationState.SEALED)),
        )
        .values(state=state, error=error)
    )
    if not changed.rowcount:
        return []
    sessions = sessions_of(connection, generation)
    # Rows of packs that have not landed stay: a late seal finds out through them why it is refused.
    connection.execute(
        delete(packs).where(at(generation, packs), packs.c.state == PackState.LANDED)
    )
    return sessions


def sessions_of(connection: Connection, generation: GenerationId) -> list[str]:
    """The upload sessions that carry, or carried, the generation's packs."""
    return list(connection.scalars(select(packs.c.session).where(at(generation, packs))))


def abort_unlanded(connection: Connection) -> tuple[tuple[GenerationId, ...], tuple[str, ...]]:
    """At the daemon's start: give up what the previous incarnation had not committed."""
    return _abort(connection, Event.DAEMON_ENDED, DAEMON_ENDED)


# -------------------------------------------------------------------------------------------- packs


@dataclass(frozen=True)
class PackPlan:
    """What one rank is going to contribute."""

    generation: GenerationId
    rank: int
    num_ranks: int
    num_bytes: int


def check_plan(connection: Connection, plan: PackPlan) -> str | None:
    """Raise unless the pack may be begun; the session of an unsealed earlier try of this rank.

    A generation that the daemon's end aborted may be begun again, by any of its ranks.
    """
    _check_newest(connection, plan.generation)
    row = connection.execute(select(generations).where(at(plan.generation))).one_or_none()
    if row is None:
        check_new_step(connection, plan.generation)
        return None
    can_reopen = row.state == GenerationState.ABORTED and row.error == DAEMON_ENDED
    if row.state in (GenerationState.ABORTED, GenerationState.FAILED) and not can_reopen:
        raise _ended(plan.generation, row)
    pack = None if can_reopen else _pack(connection, plan)
    if (pack is not None and pack.state != PackState.OPEN) or row.state == "committed":
        raise AlreadyExists(
            f"step {plan.generation.step} was already saved in attempt {plan.generation.attempt} "
            f"of run {plan.generation.run}: save each step once"
        )
    if row.num_ranks != plan.num_ranks:
        raise Conflict(
            f"generation {plan.generation} was begun with {row.num_ranks} ranks, rank {plan.rank} "
            f"says {plan.num_ranks}: all ranks must name the same number"
        )
    return pack.session if pack is not None else None


def insert_pack(connection: Connection, plan: PackPlan, session: str) -> str | None:
    """Record that *session* carries the planned pack; creates the generation if it is the first.

    The session of an unsealed earlier try of this rank, which this one replaces.
    """
    replaced = check_plan(connection, plan)
    generation = plan.generation
    # One that the daemon's end aborted begins anew, with none of its packs: their bytes are gone.
    connection.execute(
        delete(generations).where(at(generation), generations.c.state == GenerationState.ABORTED)
    )
    known = select(generations.c.state).where(at(generation))
    if connection.scalar(known) is None:
        connection.execute(insert(generations).values(**_key(generation), num_ranks=plan.num_ranks))
    connection.execute(delete(packs).where(at(generation, packs), packs.c.rank == plan.rank))
    connection.execute(
        insert(packs).values(
            **_key(generation), rank=plan.rank, session=session, num_bytes=plan.num_bytes
        )
    )
    connection.execute(update(generations).where(at(generation)).values(error=""))
    return replaced


def note_trouble(connection: Connection, generation: GenerationId, reason: str) -> None:
    """Remember why an open generation cannot be completed as things stand; the rank's next try
    clears it."""
    connection.execute(
        update(generations)
        .where(at(generation), generations.c.state == GenerationState.OPEN)
        .values(error=reason)
    )


def drop_open_pack(connection: Connection, session: str, reason: str) -> GenerationId | None:
    """The upload session ended before it was sealed; the generation that waits for it now.

    A generation that no rank contributes to any more is forgotten.
    """
    pack = find_pack(connection, session)
    if pack is None or pack.state is not PackState.OPEN:
        return None
    generation = pack.generation
    connection.execute(delete(packs).where(packs.c.session == session))
    left = connection.scalar(select(func.count()).where(at(generation, packs)))
    if left:
        note_trouble(connection, generation, f"rank {pack.rank}: {reason}")
    else:
        connection.execute(
            delete(generations).where(at(generation), generations.c.state == GenerationState.OPEN)
        )
    return generation


def find_pack(connection: Connection, session: str) -> PackInfo | None:
    """The pack that an upload session carries."""
    row = connection.execute(select(packs).where(packs.c.session == session)).one_or_none()
    if row is None:
        return None
    generation = GenerationId(row.run, row.attempt, row.step)
    return PackInfo(generation, row.rank, PackState(row.state), row.session, row.num_bytes)


def check_sealable(connection: Connection, session: str) -> PackInfo:
    """The pack of *session* if it may be sealed, or is; else why not."""
    pack = find_pack(connection, session)
    if pack is None:
        raise NotFound(
            f"upload session {session} carries no pack: it ended, or its lease ran out; "
            "save the step again"
        )
    if pack.state is PackState.OPEN:
        _check_newest(connection, pack.generation)
    row = connection.execute(select(generations).where(at(pack.generation))).one()
    if row.state in (GenerationState.ABORTED, GenerationState.FAILED):
        raise _ended(pack.generation, row)
    return pack


def seal_pack(
    connection: Connection,
    session: str,
    num_bytes: int,
    description: bytes,
    told: Mapping[str, str],
    stall_seconds: float = 0.0,
) -> bool:
    """The pack's bytes are complete in the daemon's memory; whether all ranks' are now.

    *told*: what this rank says about the generation, JSON by column (``metrics``, ``dataset``,
    ``note``, ``wanted_tags``). *stall_seconds*: how long the save held the rank up; of all
    ranks the longest is kept.
    """
    pack = check_sealable(connection, session)
    generation = pack.generation
    if pack.state is PackState.OPEN:
        connection.execute(
            update(packs)
            .where(packs.c.session == session)
            .values(state=PackState.SEALED, num_bytes=num_bytes, description=description)
        )
        _check_descriptions(connection, generation)
    values: dict[str, Any] = dict(told)
    longer = generations.c.stall < stall_seconds
    values["stall"] = case((longer, stall_seconds), else_=generations.c.stall)
    state = _state_by_packs(connection, generation)
    if state is not GenerationState.OPEN:
        values["sealed"] = func.coalesce(generations.c.sealed, now())
    connection.execute(update(generations).where(at(generation)).values(state=state, **values))
    return state is not GenerationState.OPEN


def _check_descriptions(connection: Connection, generation: GenerationId) -> None:
    """Refuse early what no manifest can hold: when all has landed it would be too late."""
    lengths = func.coalesce(func.sum(func.length(packs.c.description)), 0)
    check_limit(
        f"bytes of the descriptions of generation {generation}",
        connection.scalar(select(lengths).where(at(generation, packs))) or 0,
        MAX_GENERATION_DESCRIPTION_BYTES,
        "save fewer tensors: larger ones, or on fewer ranks",
    )


class Landed(Protocol):
    """What is needed of :class:`forebay_server.publish.session.LandedBlob`."""

    @property
    def blob(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...


def land_pack(connection: Connection, session: str, landed: Landed) -> str | None:
    """A sealed pack's blob is durable on this node; the manifest that this committed, if any.

    Of two last ranks exactly one sees the other's pack landed: the generation's row is locked. The
    commit queues the flush of the manifest. Raises if the generation was given up meanwhile.
    """
    pack = check_sealable(connection, session)
    # SQLite has no row locks and needs none: it has one writer, whose transactions are serial.
    locked = select(generations.c.state).where(at(pack.generation)).with_for_update()
    connection.execute(locked).one()
    connection.execute(
        update(packs)
        .where(packs.c.session == session)
        .values(
            state=PackState.LANDED,
            blob=landed.blob,
            num_bytes=landed.num_bytes,
            shared_bytes=landed.shared_bytes,
        )
    )
    generation = pack.generation
    if _state_by_packs(connection, generation) is not GenerationState.COMMITTED:
        return None
    failpoint("generation.before_commit")
    manifest = _manifest_of(connection, generation)
    identity, data = manifest.encode()
    sibling = connection.scalar(
        select(generations.c.manifest)
        .where(generations.c.run == generation.run, generations.c.manifest.is_not(None))
        .limit(1)
    )
    commit_manifest(connection, identity, KIND_GENERATION, data, manifest.blobs(), sibling)
    connection.execute(
        update(generations)
        .where(at(generation))
        .values(state=GenerationState.COMMITTED, manifest=identity, committed=now())
    )
    note_committed(connection, generation)
    # The manifest holds the descriptions from here on.
    connection.execute(update(packs).where(at(generation, packs)).values(description=None))
    enqueue(connection, FLUSH, identity)
    enqueue(connection, FINGERPRINT, identity)
    apply_wanted_tags(connection, generation)
    queue_retention(connection, generation.run)
    failpoint("generation.inside_commit")
    return identity


def _state_by_packs(connection: Connection, generation: GenerationId) -> GenerationState:
    row = connection.execute(select(generations).where(at(generation))).one()
    found = connection.scalars(select(packs.c.state).where(at(generation, packs)))
    return after_packs(
        GenerationState(row.state), row.num_ranks, [PackState(state) for state in found]
    )


def sessions_in_slots(connection: Connection, generation: GenerationId) -> list[str]:
    """The upload sessions of the packs of *generation* that are sealed and have not landed."""
    is_sealed = packs.c.state == PackState.SEALED
    return list(connection.scalars(select(packs.c.session).where(at(generation, packs), is_sealed)))


def manifest_of_sealed(
    connection: Connection, generation: GenerationId, in_slots: Mapping[str, tuple[str, int]]
) -> GenerationManifest | None:
    """The manifest that a generation which all ranks have sealed is going to have.

    *in_slots*: upload session to (blob, bytes) of packs that have not landed. None if that is not
    all of them, or the generation is not sealed.
    """
    state = connection.scalar(select(generations.c.state).where(at(generation)))
    missing = set(sessions_in_slots(connection, generation)) - set(in_slots)
    if state != GenerationState.SEALED or missing:
        return None
    return _manifest_of(connection, generation, in_slots)


def _manifest_of(
    connection: Connection,
    generation: GenerationId,
    in_slots: Mapping[str, tuple[str, int]] = NOTHING_IN_SLOTS,
) -> GenerationManifest:
    row = connection.execute(select(generations).where(at(generation))).one()
    attempt = connection.execute(
        select(attempts).where(
            attempts.c.run == generation.run, attempts.c.attempt == generation.attempt
        )
    ).one()
    rows = connection.execute(select(packs).where(at(generation, packs)).order_by(packs.c.rank))
    refs = []
    for pack in rows:
        landed = pack.blob is not None
        blob, num_bytes = (pack.blob, pack.num_bytes) if landed else in_slots[pack.session]
        refs.append(PackRef(pack.rank, blob, num_bytes, json.loads(pack.description)))
    return GenerationManifest(
        run=generation.run,
        attempt=generation.attempt,
        step=generation.step,
        parent=parent_of(attempt),
        num_ranks=row.num_ranks,
        metrics=json.loads(row.metrics) if row.metrics else {},
        dataset=json.loads(row.dataset) if row.dataset else None,
        packs=tuple(refs),
        created_unix=row.created,
    )


def _key(generation: GenerationId) -> dict[str, Any]:
    return {"run": generation.run, "attempt": generation.attempt, "step": generation.step}


def _pack(connection: Connection, plan: PackPlan) -> Row[Any] | None:
    return connection.execute(
        select(packs).where(at(plan.generation, packs), packs.c.rank == plan.rank)
    ).one_or_none()


def _check_newest(connection: Connection, generation: GenerationId) -> None:
    check_newest(connection, generation.run, generation.attempt)


def check_newest(connection: Connection, run: str, attempt: int) -> None:
    """Raise unless *attempt* is the one that may save: Fenced, or NotFound if there is none."""
    newest = newest_attempt(connection, run)
    if newest is None:
        raise NotFound(f"run {run} has no attempt {attempt}: begin one before saving")
    if attempt > newest:
        raise NotFound(f"run {run} has no attempt {attempt}, the newest is {newest}")
    if attempt < newest:
        raise Fenced(
            f"attempt {attempt} of run {run} may not save any more: attempt "
            f"{newest} began after it; end this process, or restart it so that it resumes"
        )


def _ended(generation: GenerationId, row: Row[Any]) -> Conflict:
    return Conflict(f"generation {generation} is {row.state} ({row.error}): save another step")


# ----------------------------------------------------------------------------------------- deleting


def delete_generations(
    connection: Connection, doomed: Sequence[GenerationId], reason: str = "at once"
) -> tuple[int, list[str]]:
    """Forget generations; ``(how many there were, sessions that have to end)``.

    From here on nobody sees them. The manifests of those that are not in the trash stay, each with
    a job that removes it from the object tier first and then from here; until then their blobs are
    kept.
    """
    number = 0
    sessions: list[str] = []
    for generation in doomed:
        row = connection.execute(select(generations).where(at(generation))).one_or_none()
        if row is None:
            continue
        number += 1
        sessions.extend(sessions_of(connection, generation))
        connection.execute(delete(generations).where(at(generation)))
        if row.manifest is not None and tombstone_of(connection, row.manifest) is None:
            cancel_queued(connection, FLUSH, row.manifest)
            enqueue(connection, DELETE, row.manifest)
            record(connection, f"generation {generation}", "deleted", reason)
    for run in {generation.run for generation in doomed}:
        queue_notes(connection, run)
    return number, sessions


def delete_run(
    connection: Connection, run: str, grace_seconds: float = 0.0
) -> tuple[int, list[str]]:
    """Forget a run with all its attempts and generations, as :func:`delete_generations`; with
    *grace_seconds* what is committed goes into the trash."""
    rows = connection.execute(select(generations).where(generations.c.run == run)).all()
    doomed = [GenerationId(row.run, row.attempt, row.step) for row in rows]
    if grace_seconds:
        trash_generations(connection, f"run {run}", doomed, grace_seconds)
    forgotten = delete_generations(connection, doomed)
    queue_notes(connection, run)
    remember_attempt(connection, run, newest_attempt(connection, run) or 0)
    connection.execute(delete(attempts).where(attempts.c.run == run))
    connection.execute(delete(runs).where(runs.c.run == run))
    return forgotten
