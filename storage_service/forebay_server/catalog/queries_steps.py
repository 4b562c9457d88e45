"""Which steps of an attempt are used: they grow, and none is ever used twice."""

from __future__ import annotations

from sqlalchemy import Connection, func, select, update

from forebay_server.catalog.tables import attempts, generations, history, trash
from forebay_server.model.states import GenerationState
from forebay_wire.errors import AlreadyExists, InvalidRequest
from forebay_wire.ids import GenerationId


def note_committed(connection: Connection, generation: GenerationId) -> None:
    """Remember the step of a generation that is being committed, whatever becomes of it."""
    connection.execute(
        update(attempts)
        .where(
            attempts.c.run == generation.run,
            attempts.c.attempt == generation.attempt,
            attempts.c.newest_step < generation.step,
        )
        .values(newest_step=generation.step)
    )


def check_new_step(connection: Connection, generation: GenerationId) -> None:
    """Raise unless a generation of which nothing is known may be begun: its step is higher than
    all that its attempt committed, or sealed with all ranks."""
    highest = max(_newest_committed(connection, generation), _newest_row(connection, generation))
    if generation.step > highest:
        return
    where = f"in attempt {generation.attempt} of run {generation.run}"
    if was_committed(connection, generation):
        raise AlreadyExists(
            f"step {generation.step} was already saved {where}, and deleted since: a step is saved "
            "once; to save it again, restore an older generation, which opens a new attempt"
        )
    raise InvalidRequest(
        f"step {generation.step} comes after step {highest} {where}: steps of one attempt grow; to "
        "go back, restore an older generation, which opens a new attempt"
    )


def was_committed(connection: Connection, generation: GenerationId) -> bool:
    """Whether a generation that is not there was committed once, as far back as anything tells."""
    if _newest_committed(connection, generation) == generation.step:
        return True
    subject = f"generation {generation}"
    deleted = select(history.c.seq).where(
        history.c.subject == subject, history.c.event == "deleted"
    )
    in_trash = select(trash.c.manifest).where(trash.c.target == subject)
    return any(connection.scalar(one.limit(1)) is not None for one in (deleted, in_trash))


def why_deleted(connection: Connection, generation: GenerationId) -> str:
    """The reason of the deletion that was recorded last, empty: none is."""
    deleted = select(history.c.detail).where(
        history.c.subject == f"generation {generation}", history.c.event == "deleted"
    )
    return connection.scalar(deleted.order_by(history.c.seq.desc()).limit(1)) or ""


def _newest_committed(connection: Connection, generation: GenerationId) -> int:
    found: int | None = connection.scalar(
        select(attempts.c.newest_step).where(
            attempts.c.run == generation.run, attempts.c.attempt == generation.attempt
        )
    )
    return -1 if found is None else found


def _newest_row(connection: Connection, generation: GenerationId) -> int:
    found: int | None = connection.scalar(
        select(func.max(generations.c.step)).where(
            generations.c.run == generation.run,
            generations.c.attempt == generation.attempt,
            generations.c.state.in_((GenerationState.COMMITTED, GenerationState.SEALED)),
        )
    )
    return -1 if found is None else found
