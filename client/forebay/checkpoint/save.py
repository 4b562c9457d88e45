"""Saving one generation: all ranks go by the plan they agreed on, or make a new one together.

A rank looks at its state and asks the daemon, which tells all of them the same: to copy by the plan
they hold, or to plan. Then each copies and seals, and one exchange says how it went everywhere.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from forebay.checkpoint.ahead import Ahead
from forebay.checkpoint.cached_plan import CachedPlan, LocalState, offer, plan_globally
from forebay.checkpoint.components import Component
from forebay.checkpoint.group import Json, Ranks
from forebay.checkpoint.lease import Prepared
from forebay.checkpoint.objects import Path
from forebay.checkpoint.service import CheckpointService, PackTerms, PlanAsk, to_json
from forebay.checkpoint.snapshot import Pack
from forebay.checkpoint.upload import RESTART_SECONDS, REUSE, PackUpload, past_restart
from forebay.waiting import Deadline
from forebay_wire.errors import Conflict, DaemonUnavailable, ForebayError, InvalidRequest, NotFound
from forebay_wire.ids import GenerationId

_log = logging.getLogger(__name__)

NEW: Final = "new"
BEGUN: Final = "begun"
SEALED: Final = "sealed"
REPLAN: Final = "replan"
SKIP: Final = "skip"
STOP: Final = "stop"
"""How far a rank has come, or what it was told to do."""

TELL_SECONDS: Final = 10.0
"""For telling the daemon that a rank cannot save."""


@dataclass(frozen=True)
class SaveRequest:
    """What one rank's ``save()`` was called with."""

    generation: GenerationId
    metrics: Mapping[str, Any] | None
    raw: Mapping[str, Any] | None
    deadline: Deadline
    tags: tuple[str, ...] = ()
    note_json: str = ""
    may_skip: bool = False
    is_overlapped: bool = False


@dataclass
class SaveWork:
    """One save on this rank, as far as it has come."""

    request: SaveRequest
    terms: PackTerms
    state: str = NEW
    local: LocalState | None = None
    pack: Pack | None = None
    uploads: list[PackUpload] = field(default_factory=list)
    prepared: Prepared | None = None
    """Memory that was asked for ahead."""
    reason: str = ""
    """Why the daemon had it do what it does."""

    @property
    def what(self) -> str:
        """For messages."""
        generation = self.request.generation
        return f"save step {generation.step} of run {generation.run}"

    @property
    def upload(self) -> PackUpload:
        return self.uploads[-1]

    @property
    def said(self) -> Json:
        """What the other ranks are told, however it went."""
        return [self.request.generation.step, self.request.generation.attempt, self.state]

    def drop(self) -> None:
        """End what is not sealed; the memory goes, too."""
        for upload in self.uploads:
            upload.abort()
        self.uploads.clear()


class Saver:
    """Saves the generations of one run from these ranks. Not thread-safe."""

    def __init__(
        self,
        service: CheckpointService,
        ranks: Ranks,
        components: Sequence[Component],
        ahead: Ahead,
    ) -> None:
        self._service = service
        self._ranks = ranks
        self._ahead = ahead
        self._components = components
        self._attempt = 0
        self._number = 0
        self._plan: CachedPlan | None = None
        self.num_reused = self.num_planned = 0
        """Saves by the plan that the ranks had, and saves for which they made one."""

    def save(self, request: SaveRequest) -> PackUpload | None:
        """The sealed upload of this rank; on return no rank needs its state any more.

        None if all ranks skip it. Any rank's error is raised on all ranks; then nothing of the step
        is left behind.
        """
        work = self.begin(request, self._copy_and_seal)
        return work.upload if work is not None else None

    def begin(self, request: SaveRequest, act: Callable[[SaveWork], None]) -> SaveWork | None:
        """Plan if need be, and *act* on every rank on what is to be copied and sealed."""
        work = SaveWork(request, self._terms(request, ""), prepared=self._ahead.take())
        try:
            return self._save(work, act)
        finally:
            self._ahead.put_back(work.prepared)

    def _save(self, work: SaveWork, act: Callable[[SaveWork], None]) -> SaveWork | None:
        error = self._ask(work)
        state = self._join(work, lambda: _go_on(work, error, act))
        if state == SKIP:
            return None
        if state == SEALED:
            self.num_reused += 1
            return work
        self._plan_together(work)
        self._join_sealed(work, lambda: self._act_by_new_plan(work, act))
        return work

    def begin_overlapped(
        self,
        request: SaveRequest,
        start: Callable[[SaveWork], None],
        rest: Callable[[SaveWork], None],
    ) -> tuple[SaveWork, Callable[[], None]] | None:
        """Plan if need be and *start* here; what is left to do on another thread: *rest*, and to
        hear of the other ranks, whose errors that raises. None if all ranks skip it."""
        work = SaveWork(request, self._terms(request, ""), prepared=self._ahead.take())
        try:
            return self._save_overlapped(work, start, rest)
        finally:
            self._ahead.put_back(work.prepared)

    def _save_overlapped(
        self,
        work: SaveWork,
        start: Callable[[SaveWork], None],
        rest: Callable[[SaveWork], None],
    ) -> tuple[SaveWork, Callable[[], None]] | None:
        error = self._ask(work)
        if error is None and work.state == BEGUN:
            error = _caught(lambda: start(work))
            if error is None:
                self.num_reused += 1
                return work, lambda: self._join_sealed(work, lambda: rest(work))
        if self._join(work, lambda: _go_on(work, error, _nothing)) == SKIP:
            return None
        self._plan_together(work)
        error = _caught(lambda: self._act_by_new_plan(work, start))
        if error is not None:  # the others hear of it while they copy
            self._join(work, lambda: _go_on(work, error, _nothing))
        return work, lambda: self._join_sealed(work, lambda: rest(work))

    def _join_sealed(self, work: SaveWork, act: Callable[[], None]) -> None:
        if self._join(work, act) != SEALED:
            work.drop()
            raise _lost(work)

    # ------------------------------------------------------------------------------------ asking

    def _ask(self, work: SaveWork) -> Exception | None:
        """Look at the state and ask the daemon how to go on: begins, or says in the state why not.

        The error is not raised: the other ranks have to hear of it first.
        """
        attempt = work.request.generation.attempt
        if self._attempt != attempt:
            self._attempt, self._number, self._plan = attempt, 0, None
        self._number += 1
        try:
            self._look(work)
        except Exception as error:  # noqa: BLE001 - a user's state_dict() may raise anything
            self._tell_failed(work)
            return error
        try:
            work.state = self._begin_by_plan(work)
        except DaemonUnavailable as error:  # another one knows no plan
            _log.warning("could not ask how to %s (%s); planning it anew", work.what, error)
            work.state = REPLAN
        except Exception as error:  # noqa: BLE001 - every rank must hear of it
            return error
        return None

    def _look(self, work: SaveWork) -> None:
        work.local = LocalState.of(self._components, work.request.raw)
        work.terms = self._terms(work.request, _dataset_json(work.local.values.values()))
        if self._plan is not None and self._plan.fits(work.local):
            work.pack = self._plan.pack(work.local)

    def _begin_by_plan(self, work: SaveWork) -> str:
        assert work.local is not None
        may_skip, deadline = work.request.may_skip, work.request.deadline
        if work.pack is None or self._plan is None:
            ask = PlanAsk(self._number, work.local.digest, 0, may_skip)
            answer = self._service.begin_pack(work.terms, 0, 0, deadline.remaining, ask)
            work.reason = answer.reason
            if answer.session:
                self._service.abort(answer.session)
            return REPLAN if answer.verdict == REUSE else str(answer.verdict)
        ask = PlanAsk(self._number, self._plan.digest, self._plan.number, may_skip)
        upload = PackUpload(self._service, work.terms, work.pack)
        # To skip must not cost a copy, and what overlaps is copied behind.
        copies = not (may_skip or work.request.is_overlapped)
        verdict = upload.begin(deadline, ask, work.prepared, copies=copies)
        if upload.is_begun:
            work.uploads.append(upload)
            return BEGUN
        work.reason = upload.reason
        return verdict

    def _tell_failed(self, work: SaveWork) -> None:
        """The others need not wait for this rank."""
        try:
            self._service.begin_pack(work.terms, 0, 0, TELL_SECONDS, PlanAsk(self._number, ""))
        except ForebayError as error:
            _log.debug("could not tell the daemon that this rank cannot save: %s", error)

    def _terms(self, request: SaveRequest, dataset_json: str) -> PackTerms:
        first = self._ranks.rank == 0
        return PackTerms(
            request.generation,
            self._ranks.rank,
            self._ranks.size,
            to_json(checked_metrics(request.metrics)) if first else "",
            dataset_json if first else "",
            request.tags if first else (),
            request.note_json if first else "",
        )

    # ---------------------------------------------------------------------------------- planning

    def _plan_together(self, work: SaveWork) -> None:
        """Agree on who saves what; then hold that plan."""
        what, local = work.what, work.local
        assert local is not None
        self._plan = None
        offered, _ = self._ranks.together(what, lambda: offer(local))
        plans = self._ranks.gather(what, offered.encoded)
        structure: dict[str, Path] = {}
        answers: list[Json] | None = None
        error: Exception | None = None
        if plans is not None:
            try:
                answers, structure = plan_globally(plans)
                if not structure:
                    raise InvalidRequest(
                        "there is nothing to save: give the Checkpointer a model, an optimizer or "
                        "another thing with a state_dict(), or save(step, state={...})"
                    )
            except Exception as caught:  # noqa: BLE001 - every rank must hear of it
                error, answers = caught, [None] * len(plans)
        keep = self._ranks.scatter(what, answers)
        self._ranks.together(what, lambda: _raise(error, keep))
        self._plan = CachedPlan(self._number, local, offered, keep, structure)
        self.num_planned += 1
        work.state = NEW

    def _act_by_new_plan(self, work: SaveWork, act: Callable[[SaveWork], None]) -> None:
        assert self._plan is not None
        assert work.local is not None
        work.pack = self._plan.pack(work.local)
        work.uploads.append(self._begun(work))
        work.state = BEGUN
        act(work)

    def _begun(self, work: SaveWork) -> PackUpload:
        def begin() -> PackUpload:
            assert work.pack is not None
            upload = PackUpload(self._service, work.terms, work.pack)
            upload.begin(work.request.deadline, prepared=work.prepared)
            return upload

        return past_restart(self._service, work.terms, begin, Deadline(RESTART_SECONDS))

    # ------------------------------------------------------------------------------- copy, seal

    def _copy_and_seal(self, work: SaveWork) -> None:
        self.copy(work)
        seal_work(work)

    def copy(self, work: SaveWork) -> None:
        """All of the pack, on this thread."""
        try:
            work.upload.copy(work.request.deadline)
        except (NotFound, DaemonUnavailable) as error:
            # A session that is gone means a restarted daemon: the state is still here.
            _log.warning("the daemon went away while a pack was copied (%s); copying again", error)
            work.drop()
            work.uploads.append(self._copied_anew(work))

    def _copied_anew(self, work: SaveWork) -> PackUpload:
        def copy() -> PackUpload:
            assert work.pack is not None
            upload = PackUpload(self._service, work.terms, work.pack)
            try:
                upload.copy(work.request.deadline)
            except BaseException:
                upload.abort()
                raise
            return upload

        return past_restart(self._service, work.terms, copy, Deadline(RESTART_SECONDS))

    # ---------------------------------------------------------------------------------- settling

    def _join(self, work: SaveWork, act: Callable[[], None]) -> str:
        """*act* on every rank, then how all of them stand: sealed, to plan, or skipping.

        Raises any rank's error on all, and leaves nothing behind then.
        """
        try:
            outcome = self._ranks.attempt(work.what, act, aside=lambda: work.said)
        except BaseException as error:  # a rank is gone: each is on its own from here
            self._leave_nothing(work)
            if work.reason and isinstance(error, ForebayError):
                raise type(error)(f"{error.message}; {work.reason}") from error
            raise
        states = {state for *_, state in outcome.asides}
        if outcome.failures:
            if states & {BEGUN, SEALED} and self._all_sealed(work):
                return SEALED
            work.drop()
            outcome.raise_first()
        try:
            _check_same_step(outcome.asides)
            if STOP in states:
                raise Conflict(f"could not {work.what}: {work.reason or 'another rank stopped'}")
        except ForebayError:
            work.drop()
            raise
        if len(states) == 1:
            return work.state
        if states & {BEGUN, SEALED}:  # the daemon restarted between one rank's answer and another's
            self._all_sealed(work)
        work.drop()
        if work.request.is_overlapped:
            raise _lost(work)
        return REPLAN

    def _leave_nothing(self, work: SaveWork) -> None:
        is_sealed = work.state == SEALED or any(upload.is_begun for upload in work.uploads)
        work.drop()
        if is_sealed:
            self._is_saved(work.request.generation)

    def _all_sealed(self, work: SaveWork) -> bool:
        """Some ranks failed to seal, or did not hear that they had: whether all packs are sealed.

        If not, no rank's is from here on, so that the step can be saved again.
        """
        # What is open by now is never sealed: else it could be after rank 0 has looked.
        self._ranks.attempt(work.what, lambda: _end_unsealed(work.uploads))
        generation = work.request.generation
        return bool(self._ranks.decide(work.what, lambda: self._is_saved(generation)))

    def _is_saved(self, generation: GenerationId) -> bool:
        """Whether all ranks have sealed; drops what only some have."""
        try:
            found = self._service.look(generation)
            if found is not None and found.state in ("sealed", "committed"):
                _log.warning("generation %s was sealed by all ranks: it is saved", generation)
                return True
            if found is not None:
                self._service.delete(generation)
        except ForebayError as error:
            _log.warning("could not settle generation %s: %s", generation, error)
        return False


def _go_on(work: SaveWork, error: Exception | None, act: Callable[[SaveWork], None]) -> None:
    if error is not None:
        raise error
    if work.state == BEGUN:
        act(work)


def seal_work(work: SaveWork) -> None:
    """Hand over what has been copied: the daemon lands it without this process."""
    deadline = work.request.deadline
    work.upload.stall_seconds = deadline.seconds - deadline.remaining
    seal(work.upload)
    work.state = SEALED


def _caught(act: Callable[[], None]) -> Exception | None:
    """The error of *act*, which other ranks have to hear of."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 - it is raised again on every rank
        return error
    return None


def _nothing(work: SaveWork) -> None:
    """What a rank does that only listens."""


def _lost(work: SaveWork) -> Conflict:
    return Conflict(
        f"could not {work.what}: the daemon restarted meanwhile, and the state has moved on since; "
        "nothing of it is saved: save another step"
    )


def _end_unsealed(uploads: Sequence[PackUpload]) -> None:
    for upload in uploads:
        upload.end_unsealed()


def seal(upload: PackUpload) -> None:
    """Seal; if the daemon restarted since the copy, offer it the slot's bytes again first."""
    try:
        upload.seal()
    except (NotFound, DaemonUnavailable, Conflict) as error:
        refused = isinstance(error, Conflict) and upload.is_current
        if refused or not upload.can_offer_again:
            raise
        _log.warning("the daemon went away while a pack was sealed (%s); offering it again", error)
        upload.offer_again(Deadline(RESTART_SECONDS))


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """*metrics* as floats. NaN and infinities have no JSON: they are left out, with a warning."""
    found: dict[str, float] = {}
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InvalidRequest(f"metrics={metrics!r} is no dict: pass {{name: number}}")
    for name, value in (metrics or {}).items():
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(name, str) or not isinstance(number, numbers.Real):
            raise InvalidRequest(f"metrics[{name!r}] = {value!r} is no number: pass name: number")
        if math.isfinite(number):
            found[name] = float(number)
        else:
            _log.warning("metric %s is %s and is left out of the saved metrics", name, number)
    return found


def _raise(error: Exception | None, keep: Json) -> None:
    if error is not None:
        raise error
    if keep is None:
        raise ForebayError("rank 0 could not plan the save")


def _check_same_step(asides: Sequence[Json]) -> None:
    if len({(step, attempt) for step, attempt, _ in asides}) > 1:
        steps = ", ".join(f"rank {rank}: {said[0]}" for rank, said in enumerate(asides))
        raise InvalidRequest(f"the ranks save different steps ({steps}): save the same on all")


def _dataset_json(states: Any) -> str:
    """What the loader says of its dataset version and position, if one is saved along."""
    for state in states:
        if not isinstance(state, dict):
            continue
        if {"dataset", "version"} <= set(state) or state.get("kind") == "mixture":
            try:
                return to_json(state)
            except (TypeError, ValueError):
                continue
    return ""
