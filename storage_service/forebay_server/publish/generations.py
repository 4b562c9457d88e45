"""Generations as callers see them: waited for, chosen by a selector, listed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_jobs import FLUSH, job_of
from forebay_server.catalog.queries_lineage import fork_at_root
from forebay_server.catalog.queries_managing import find_tag, list_tags, read_keep
from forebay_server.catalog.queries_runs import (
    AttemptInfo,
    GenerationInfo,
    RunInfo,
    find_generation,
    list_attempts,
    list_generations,
    list_runs,
    load_lineage,
    metrics_by_point,
    remote_points,
)
from forebay_server.catalog.queries_steps import was_committed, why_deleted
from forebay_server.model.lineage import Lineage, Point
from forebay_server.model.retention import best_first
from forebay_server.model.states import Durability, GenerationState, check_durability, reaches
from forebay_server.publish.changes import Changes
from forebay_server.publish.readers import Readers
from forebay_server.publish.sealed import SealedGenerations
from forebay_wire.errors import (
    Conflict,
    DeadlineExceeded,
    Fenced,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    NothingSaved,
    StorageError,
)
from forebay_wire.ids import GenerationId, check_name
from forebay_wire.keep import Keep, is_tag
from forebay_wire.limits import MAX_PAGE_ROWS

COMMITTED: Final = frozenset({GenerationState.COMMITTED})
COMMITTED_OR_LANDING: Final = frozenset({GenerationState.COMMITTED, GenerationState.SEALED})
MAX_STEP: Final = (1 << 63) - 1
"""The catalog keeps steps in 8 signed bytes."""


class Generations:
    """The reading side of checkpoints. Belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        sealed: SealedGenerations,
        why_not_remote: str = "",
        readers: Readers | None = None,
    ) -> None:
        """*why_not_remote*: why nothing ever becomes remote, empty: it does; *readers* is told
        whom a generation was named to."""
        self._readers = readers or Readers()
        self._why_not_remote = why_not_remote
        self._catalog = catalog
        self._sealed = sealed
        self._changes = Changes()

    # ----------------------------------------------------------------------------------- waiting

    def announce(self, name: str) -> None:
        """The generation (``RUN@ATTEMPT/STEP``) or the flush of the manifest *name* has changed."""
        self._changes.announce(name)

    async def wait(
        self, generation: GenerationId, durability: str, timeout_seconds: float
    ) -> GenerationInfo:
        """The generation once it is at least as durable as asked for.

        Raises at once if it never can be: :class:`Fenced`, :class:`Conflict` or
        :class:`StorageError` with the reason; :class:`DeadlineExceeded` after the timeout, and it
        may still happen later. One that was committed and deleted since was local: waiting for
        more is :class:`NotFound`.
        """
        wanted = check_durability(durability)
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        if wanted is Durability.REMOTE and timeout_seconds:
            await self._refuse_remote(generation)
        with self._changes.watch(str(generation)) as changed:
            info = await self._until(generation, wanted, changed, deadline)
        if wanted is not Durability.REMOTE or info.manifest is None:
            return info
        with self._changes.watch(info.manifest, str(generation)) as changed:
            return await self._until(generation, Durability.REMOTE, changed, deadline, remote=True)

    async def _refuse_remote(self, generation: GenerationId) -> None:
        if not self._why_not_remote:
            return
        info = await self._look_or_was(generation, Durability.REMOTE)
        if not reaches(Durability(info.durability), Durability.REMOTE):
            raise InvalidRequest(
                f"generation {generation} never becomes remote: {self._why_not_remote}"
            )

    async def _until(
        self,
        generation: GenerationId,
        wanted: Durability,
        changed: asyncio.Event,
        deadline: float,
        remote: bool = False,
    ) -> GenerationInfo:
        local = wanted if remote or wanted is not Durability.REMOTE else Durability.LOCAL
        while True:
            changed.clear()
            info = await self._look_or_was(generation, wanted)
            if reaches(Durability(info.durability), local):
                return info
            _raise_if_ended(info)
            if remote:
                await self._raise_if_given_up(info)
            try:
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            except TimeoutError:
                raise DeadlineExceeded(_progress_text(info, wanted)) from None

    async def look(self, generation: GenerationId) -> GenerationInfo:
        """One generation as it stands. :class:`NotFound` if there is none."""
        info = await self._catalog.read(lambda connection: find_generation(connection, generation))
        if info is None:
            raise _not_there(generation)
        return info

    async def _look_or_was(self, generation: GenerationId, wanted: Durability) -> GenerationInfo:
        """:meth:`look`, or what stands for a generation that was committed and deleted since: it
        was local, and what is more is asked for in vain."""

        def look(connection: Connection) -> GenerationInfo | None:
            found = find_generation(connection, generation)
            if found is None and was_committed(connection, generation):
                if not reaches(Durability.LOCAL, wanted):
                    why = why_deleted(connection, generation)
                    raise NotFound(
                        f"generation {generation} was local, and was deleted before it was "
                        f"{wanted}" + (f" ({why})" if why else "")
                    )
                return _was_local(generation)
            return found

        info = await self._catalog.read(look)
        if info is None:
            raise _not_there(generation)
        return info

    async def _raise_if_given_up(self, info: GenerationInfo) -> None:
        manifest = info.manifest or ""
        job = await self._catalog.read(lambda connection: job_of(connection, FLUSH, manifest))
        if job is not None and job.state == "failed":
            raise IntegrityError(
                f"generation {info.id} cannot be flushed into the object tier: {job.error}"
            )

    # --------------------------------------------------------------------------------- resolving

    async def resolve(
        self,
        run: str,
        selector: str,
        durability: str,
        skip: Collection[Point],
        timeout_seconds: float,
        *,
        look_only: bool = False,
    ) -> GenerationInfo:
        """The generation that *selector* (``latest``, ``best``, ``STEP``, ``ATTEMPT/STEP``, or a
        tag) means. Retention leaves it alone for a moment, unless *look_only*: whoever asks is
        about to read it.

        A run that was forked and has nothing of its own answers with what it was forked from.
        ``best`` is that of the run's own policy. ``latest`` is the newest committed one on the
        newest attempt's lineage, those in *skip* left out. One that all ranks have sealed is
        waited for first; :class:`DeadlineExceeded` if it has not landed after the timeout (0: what
        has not landed does not count). With *durability* ``ram`` it counts as it is, and its
        manifest is that of :meth:`SealedGenerations.offer`; only where its packs do not lie in
        memory as a whole it is waited for all the same.
        """
        wanted = check_durability(durability)
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        may_wait = timeout_seconds > 0 and wanted is not Durability.REMOTE
        skipped = frozenset(skip)
        while True:
            found = await self._pick(
                run, selector, wanted, skipped, may_wait or wanted is Durability.RAM
            )
            try:
                info = await self._until_readable(found, wanted, deadline)
            except DeadlineExceeded:
                if may_wait:
                    raise
                skipped |= {Point(found.attempt, found.step)}
                continue
            if info is not None and (look_only or await self._lend(found)):
                return info

    async def _lend(self, generation: GenerationId) -> bool:
        """Have retention leave *generation* alone for a while; False if it went meanwhile."""
        async with self._readers.settled(generation.run):
            found = await self._catalog.read(
                lambda connection: find_generation(connection, generation)
            )
            if found is not None:
                self._readers.lend(generation)
            return found is not None

    async def _pick(
        self, run: str, selector: str, wanted: Durability, skip: frozenset[Point], sealed: bool
    ) -> GenerationId:
        check_name("run", run)
        if "/" in selector:
            parse_point(selector)

        def look(connection: Connection) -> tuple[Lineage, set[Point], _Named]:
            lineage = load_lineage(connection, run)
            if lineage is None:
                raise NothingSaved(f"there is no run {run}: nothing has been saved under that name")
            named = _Named(fork=fork_at_root(connection, run))
            if _has_any(lineage) or named.fork is not None:
                named = _named(connection, run, selector)
            return lineage, remote_points(connection, run), named

        lineage, remote, named = await self._catalog.read(look)
        if wanted is Durability.REMOTE:
            skip = skip | {point for point in lineage.states if point not in remote}
        states = COMMITTED_OR_LANDING if sealed else COMMITTED
        point = _select(lineage, selector, states, skip, named)
        if point is None and selector in ("", "latest") and named.fork is not None:
            is_taken = lineage.latest(states) is not None
            start = Point(named.fork.attempt, named.fork.step)
            if not is_taken and start not in skip:
                return await self._fork(named.fork, wanted)
        if point is None:
            text = _nothing_found(run, selector, lineage, wanted, skip)
            if wanted is Durability.REMOTE and self._why_not_remote:
                raise InvalidRequest(f"{text}. Nothing becomes remote: {self._why_not_remote}")
            is_none = named.fork is None and not _has_any(lineage)
            raise (NothingSaved if is_none or selector in ("", "latest") else NotFound)(text)
        return GenerationId(run, *point)

    async def _fork(self, generation: GenerationId, wanted: Durability) -> GenerationId:
        """What a run without anything of its own was forked from, if it is *wanted* enough."""
        info = await self.look(generation)
        if not reaches(Durability(info.durability), wanted):
            raise NotFound(f"generation {generation}, which was forked, is not {wanted}")
        return generation

    async def _until_readable(
        self, generation: GenerationId, wanted: Durability, deadline: float
    ) -> GenerationInfo | None:
        """The generation once it is committed, or in memory if that is *wanted*; None if it was
        given up."""
        with self._changes.watch(str(generation)) as changed:
            while True:
                changed.clear()
                in_memory = None
                if wanted is Durability.RAM:
                    in_memory = await self._sealed.offer(generation)
                info = await self.look(generation)
                if info.state is not GenerationState.SEALED:
                    await self._sealed.forget_if_final(generation)
                    return info if info.state is GenerationState.COMMITTED else None
                if in_memory is not None:
                    return replace(info, manifest=in_memory)
                try:
                    async with asyncio.timeout_at(deadline):
                        await changed.wait()
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"generation {generation} is sealed by all ranks and still landing: wait "
                        "longer, or name an older generation as ATTEMPT/STEP"
                    ) from None

    def manifest_in_memory(self, manifest: str) -> bytes | None:
        """The bytes of the manifest of a generation in memory that :meth:`resolve` answered with.

        None once that is committed (the catalog has it then) or given up.
        """
        return self._sealed.read(manifest)

    # --------------------------------------------------------------------------- looking ----------

    async def list_runs(self, after: str, limit: int) -> tuple[list[RunInfo], str]:
        """A page of runs by name, and the name after which the next page begins (empty: none)."""
        size = _page(limit)
        found = await self._catalog.read(lambda connection: list_runs(connection, after, size + 1))
        return found[:size], found[size - 1].run if len(found) > size else ""

    async def list_generations(
        self, run: str, after: str, limit: int
    ) -> tuple[list[AttemptInfo], list[GenerationInfo], str]:
        """A page of a run's generations, of the attempts down to there (both newest first), and
        where the next page begins (empty: none)."""
        check_name("run", run)
        size = _page(limit)
        before = parse_point(after) if after else None

        def look(connection: Connection) -> tuple[list[AttemptInfo], list[GenerationInfo], str]:
            newest = before.attempt if before is not None else None
            attempts = list_attempts(connection, run, newest, MAX_PAGE_ROWS + 1)
            lowest = attempts[-1].attempt if len(attempts) > MAX_PAGE_ROWS else 0
            page, more = list_generations(connection, run, before, lowest, size)
            if more:
                last = page[-1].id
                attempts = [one for one in attempts if one.attempt >= last.attempt]
                return attempts, page, f"{last.attempt}/{last.step}"
            return attempts, page, f"{lowest}/0" if lowest else ""

        attempts, page, after = await self._catalog.read(look)
        if not attempts:
            raise NotFound(f"there is no run {run}: nothing has been saved under that name")
        return attempts, page, after


def _not_there(generation: GenerationId) -> NotFound:
    return NotFound(
        f"there is no generation {generation}: no rank has begun to save it, or it was deleted"
    )


def _was_local(generation: GenerationId) -> GenerationInfo:
    """What is told of a generation that was committed and is gone."""
    return GenerationInfo(
        id=generation,
        state=GenerationState.COMMITTED,
        durability=Durability.LOCAL,
        manifest=None,
        num_ranks=0,
        num_sealed=0,
        num_bytes=0,
        created_unix=0.0,
        metrics_json="",
        parent=None,
        error="it was deleted",
    )


def parse_point(text: str) -> Point:
    """The generation that ``ATTEMPT/STEP`` names within its run."""
    attempt, _, step = text.partition("/")
    if not (attempt.isdecimal() and step.isdecimal()):
        raise InvalidRequest(f"{text!r} names no generation: write ATTEMPT/STEP, as in 2/500")
    return Point(int(attempt), check_step(int(step)))


@dataclass(frozen=True)
class _Named:
    """What the catalog says about the words of a selector."""

    tag: Point | None = None
    best: tuple[Point, ...] = ()
    """By the metric of the run's policy, best first."""
    fork: GenerationId | None = None
    """What the lineage begins with, in another run."""


def _named(connection: Connection, run: str, selector: str) -> _Named:
    fork = fork_at_root(connection, run)
    if selector == "best":
        return _Named(best=tuple(_best(connection, run)), fork=fork)
    if selector in ("", "latest") or selector.isdecimal() or "/" in selector:
        return _Named(fork=fork)
    found = find_tag(connection, run, selector)
    if found is None:
        names = ", ".join(one.tag for one in list_tags(connection, run)) or "none"
        raise (NotFound if is_tag(selector) else InvalidRequest)(
            f"run {run} has no tag {selector!r}, it has {names}; a generation is named by "
            "'latest', 'best', STEP, ATTEMPT/STEP (as in 2/500) or a tag"
        )
    return _Named(Point(found.attempt, found.step), fork=fork)


def _has_any(lineage: Lineage) -> bool:
    """Whether anything of the run is committed, or about to be."""
    return any(state in COMMITTED_OR_LANDING for state in lineage.states.values())


def _best(connection: Connection, run: str) -> list[Point]:
    keep = Keep.from_json(read_keep(connection, run))
    if keep is None or not keep.best:
        raise InvalidRequest(
            f"run {run} says no metric by which one of its generations is the best: give "
            "keep=forebay.Keep(best=...), or name one by its tag or as ATTEMPT/STEP"
        )
    metrics = metrics_by_point(connection, run)
    return best_first(keep.best, keep.mode, dict(sorted(metrics.items(), reverse=True)))


def _select(
    lineage: Lineage,
    selector: str,
    states: Collection[GenerationState],
    skip: Collection[Point],
    named: _Named,
) -> Point | None:
    if selector in ("", "latest"):
        return lineage.latest(states, skip)
    if selector.isdecimal():
        found = lineage.at_step(check_step(int(selector)), states)
        return found if found not in skip else None
    if selector == "best":
        walked = set(lineage.candidates(COMMITTED, skip))
        return next((point for point in named.best if point in walked), None)
    if named.tag is None and "/" not in selector:
        return None
    point = named.tag or parse_point(selector)
    return point if lineage.states.get(point) in states and point not in skip else None


def _nothing_found(
    run: str, selector: str, lineage: Lineage, wanted: Durability, skip: Collection[Point]
) -> str:
    committed = [point for point, state in lineage.states.items() if state in COMMITTED]
    skipped = sum(point in skip for point in committed)
    where = (
        f"run {run} has no {'remote ' if wanted is Durability.REMOTE else ''}committed generation"
    )
    if selector in ("", "latest", "best"):
        newest = max(lineage.parents)
        text = f"{where} that its newest attempt {newest} stands on"
    else:
        text = f"{where} {selector} on the lineage of its newest attempt"
        if "/" in selector:
            text = f"{where} {selector}"
    elsewhere = sorted(str(point) for point in committed if point not in skip)[-3:]
    if skipped:
        text += f"; {skipped} were skipped"
    if elsewhere:
        text += f"; there are, among others, {', '.join(elsewhere)}: name one as ATTEMPT/STEP"
    return text


def _raise_if_ended(info: GenerationInfo) -> None:
    """Raise if the generation cannot become more durable as things stand."""
    if info.state is GenerationState.ABORTED:
        kind: type[ForebayError] = Conflict if "daemon" in info.error else Fenced
        raise kind(f"generation {info.id} was aborted: {info.error}")
    if info.state is GenerationState.FAILED:
        raise StorageError(f"generation {info.id} failed: {info.error}; save another step")
    if info.state is GenerationState.OPEN and info.error:
        raise Conflict(f"generation {info.id} cannot be completed as things stand: {info.error}")


def _progress_text(info: GenerationInfo, wanted: Durability) -> str:
    if info.state is GenerationState.OPEN:
        return (
            f"generation {info.id} is not {wanted} yet: {info.num_sealed} of {info.num_ranks} "
            "ranks have sealed their packs"
        )
    return f"generation {info.id} is {info.durability or info.state} and not {wanted} yet: wait on"


def check_step(step: int) -> int:
    """*step* if the catalog can hold it."""
    if not 0 <= step <= MAX_STEP:
        raise InvalidRequest(f"step {step} is not allowed: 0 to {MAX_STEP}")
    return step


def _page(limit: int) -> int:
    return min(limit or MAX_PAGE_ROWS, MAX_PAGE_ROWS)
