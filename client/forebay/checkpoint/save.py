"""Saving one generation: all ranks plan together, each copies its pack, then each seals it."""

from __future__ import annotations

import json
import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3
from torch.distributed.checkpoint.planner import SavePlan

from forebay.checkpoint.components import RAW_STATE, Component
from forebay.checkpoint.flatten import FlatState
from forebay.checkpoint.group import Json, Ranks
from forebay.checkpoint.objects import Path
from forebay.checkpoint.planning import StateSavePlanner, decode_plan, encode_plan, pack_of
from forebay.checkpoint.service import CheckpointService, PackTerms, to_json
from forebay.checkpoint.upload import RESTART_SECONDS, PackUpload, past_restart
from forebay.waiting import Deadline
from forebay_wire.errors import Conflict, DaemonUnavailable, ForebayError, InvalidRequest, NotFound
from forebay_wire.ids import GenerationId

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LocalPlan:
    """What this rank has to offer, before the ranks agreed who saves what."""

    planner: StateSavePlanner
    plan: SavePlan
    encoded: Json
    digest: str
    frozen: frozenset[str]
    dataset_json: str


@dataclass(frozen=True)
class _Agreed:
    """The outcome of the last planning; holds as long as no rank's own plan changes."""

    digests: tuple[str, ...]
    keep: tuple[int, ...]
    """The items of this rank's own plan that it saves."""
    structure: dict[str, Path]
    """Of all ranks, on rank 0."""


class Saver:
    """Saves the generations of one run from these ranks. Not thread-safe."""

    def __init__(
        self, service: CheckpointService, ranks: Ranks, components: Sequence[Component]
    ) -> None:
        self._service = service
        self._ranks = ranks
        self._components = components
        self._agreed: _Agreed | None = None

    def save(
        self,
        attempt: int,
        step: int,
        metrics: Mapping[str, Any] | None,
        raw: Mapping[str, Any] | None,
        deadline: Deadline,
    ) -> PackUpload:
        """The sealed upload of this rank; on return no rank needs its state any more.

        Any rank's error is raised on all ranks; then nothing of the step is left behind.
        """
        what = f"save step {step} of run {self._service.run}"
        generation = GenerationId(self._service.run, attempt, step)
        local, notes = self._ranks.together(
            what,
            lambda: self._plan_locally(raw),
            lambda local: [step, attempt, local.digest],
        )
        _check_same_step(notes)
        keep, structure = self._agree(what, local, tuple(note[2] for note in notes))
        plan = local.planner.finish_plan(
            replace(local.plan, items=[local.plan.items[index] for index in keep])
        )
        first = self._ranks.rank == 0
        terms = PackTerms(
            generation,
            self._ranks.rank,
            self._ranks.size,
            to_json(checked_metrics(metrics)) if first else "",
            local.dataset_json if first else "",
        )
        return self._upload(what, local, plan, structure, terms, deadline)

    def _plan_locally(self, raw: Mapping[str, Any] | None) -> _LocalPlan:
        state = {component.name: component.state() for component in self._components}
        if raw is not None:
            state[RAW_STATE] = dict(raw)
        planner = StateSavePlanner()
        planner.set_up_planner(state, None, self._ranks.rank == 0)
        flat = FlatState(planner.state_dict, planner.mappings)
        lowest = {name for name in flat.tensors() if name.startswith(f"{RAW_STATE}.")}
        frozen: set[str] = set()
        for component in self._components:
            lowest |= component.lowest(flat)
            frozen |= component.frozen(flat)
        planner.lowest = lowest
        plan = planner.create_local_plan()
        encoded = {**encode_plan(plan), "lowest": sorted(lowest)}
        digest = blake3(json.dumps(encoded, separators=(",", ":")).encode()).hexdigest()
        return _LocalPlan(
            planner, plan, encoded, digest, frozenset(frozen), _dataset_json(state.values())
        )

    def _agree(
        self, what: str, local: _LocalPlan, digests: tuple[str, ...]
    ) -> tuple[tuple[int, ...], dict[str, Path]]:
        """Which of its items this rank saves. No exchange if nothing changed since last time."""
        if self._agreed is None or self._agreed.digests != digests:
            plans = self._ranks.gather(what, local.encoded)
            structure: dict[str, Path] = {}
            answers: list[Json] | None = None
            error: Exception | None = None
            if plans is not None:
                try:
                    answers, structure = _plan_globally(local.planner, plans)
                except Exception as caught:  # noqa: BLE001 - every rank must hear of it
                    error, answers = caught, [None] * len(plans)
                    structure = {}
            keep = self._ranks.scatter(what, answers)
            self._ranks.together(what, lambda: _raise(error, keep))
            self._agreed = _Agreed(digests, tuple(keep), structure)
        return self._agreed.keep, self._agreed.structure

    def _upload(
        self,
        what: str,
        local: _LocalPlan,
        plan: SavePlan,
        structure: dict[str, Path],
        terms: PackTerms,
        deadline: Deadline,
    ) -> PackUpload:
        uploads: list[PackUpload] = []

        def copy() -> PackUpload:
            pack = pack_of(plan, local.planner, structure, local.frozen)
            uploads.append(PackUpload(self._service, terms, pack))
            uploads[-1].copy(deadline)
            return uploads[-1]

        try:
            upload, _ = self._ranks.together(what, lambda: self._copied(copy, uploads, terms))
        except BaseException:
            _abort(uploads)
            raise
        try:
            # Nobody seals before everybody has copied: a failure leaves nothing half-sealed.
            outcome = self._ranks.attempt(what, lambda: seal(upload))
        except BaseException:  # a rank is gone: each is on its own from here
            _abort(uploads)
            if not self._ranks.rank:
                self._is_saved(terms.generation)
            raise
        if outcome.failures and not self._all_sealed(what, upload):
            _abort(uploads)
            outcome.raise_first()
        return upload

    def _all_sealed(self, what: str, upload: PackUpload) -> bool:
        """Some ranks failed to seal, or did not hear that they had: whether all packs are sealed.

        If not, no rank's is from here on, so that the step can be saved again.
        """
        # What is open by now is never sealed: else it could be after rank 0 has looked.
        self._ranks.attempt(what, upload.end_unsealed)
        generation = upload.terms.generation
        return bool(self._ranks.decide(what, lambda: self._is_saved(generation)))

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

    def _copied(
        self, copy: Callable[[], PackUpload], uploads: list[PackUpload], terms: PackTerms
    ) -> PackUpload:
        """Copy; a session that is gone means a restarted daemon: the state is still here."""
        try:
            return past_restart(self._service, terms, copy, Deadline(RESTART_SECONDS))
        except (NotFound, DaemonUnavailable) as error:
            _log.warning("the daemon went away while a pack was copied (%s); copying again", error)
            _abort(uploads)
            return past_restart(self._service, terms, copy, Deadline(RESTART_SECONDS))


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
    for name, value in (metrics or {}).items():
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(name, str) or not isinstance(number, numbers.Real):
            raise InvalidRequest(f"metrics[{name!r}] = {value!r} is no number: pass name: number")
        if math.isfinite(number):
            found[name] = float(number)
        else:
            _log.warning("metric %s is %s and is left out of the saved metrics", name, number)
    return found


def _abort(uploads: Sequence[PackUpload]) -> None:
    for upload in uploads:
        upload.abort()


def _plan_globally(
    planner: StateSavePlanner, plans: Sequence[Json]
) -> tuple[list[Json], dict[str, Path]]:
    """For each rank the indices of its items that it saves, and the structure of the whole."""
    decoded = [decode_plan(plan) for plan in plans]
    for plan in plans:
        planner.lowest = {*planner.lowest, *plan["lowest"]}
    final, metadata = planner.create_global_plan(decoded)
    answers = []
    for local, kept in zip(decoded, final, strict=True):
        wanted = {item.index for item in kept.items}
        answers.append([i for i, item in enumerate(local.items) if item.index in wanted])
    return answers, metadata.planner_data


def _raise(error: Exception | None, keep: Json) -> None:
    if error is not None:
        raise error
    if keep is None:
        raise ForebayError("rank 0 could not plan the save")


def _check_same_step(notes: Sequence[Json]) -> None:
    if len({(step, attempt) for step, attempt, _ in notes}) > 1:
        steps = ", ".join(f"rank {rank}: {note[0]}" for rank, note in enumerate(notes))
        raise InvalidRequest(f"the ranks save different steps ({steps}): save the same on all")


def _dataset_json(states: Any) -> str:
    """What the loader says of its dataset version and position, if one is saved along."""
    for state in states:
        if isinstance(state, dict) and {"dataset", "version"} <= set(state):
            try:
                return to_json(state)
            except (TypeError, ValueError):
                continue
    return ""
