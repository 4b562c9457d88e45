"""Restoring a generation in place: all ranks the same one, or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from forebay.checkpoint.components import (
    RAW_STATE,
    Component,
    SavedComponent,
    Targets,
    placeless,
    targets_like,
)
from forebay.checkpoint.flatten import nest
from forebay.checkpoint.group import Ranks
from forebay.checkpoint.manifest import SavedState
from forebay.checkpoint.objects import Path, decode
from forebay.checkpoint.read import PackReader
from forebay.checkpoint.service import CheckpointService
from forebay.waiting import Deadline
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound
from forebay_wire.ids import GenerationId

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A newer generation that could not be verified, and why."""

    attempt: int
    step: int
    reason: str

    def __str__(self) -> str:
        return f"{self.attempt}/{self.step}: {self.reason}"


@dataclass(frozen=True)
class Resumed:
    """What :meth:`Checkpointer.restore` brought back."""

    step: int
    attempt: int
    """The attempt that saved it; what is saved from here on belongs to a new one."""
    metrics: Mapping[str, float]
    skipped: tuple[Skipped, ...]
    """Newer generations that were passed over because their bytes are damaged."""
    state: Mapping[str, Any]
    """What was given to ``save(step, state=...)``; tensors whole, on the CPU."""


@dataclass(frozen=True)
class _Loaded:
    """A generation's bytes, read and verified, not yet applied."""

    manifest_metrics: Mapping[str, float]
    state: Mapping[str | int, Any]
    bytes_read: int


class Restorer:
    """Restores generations of one run into these components. Not thread-safe."""

    def __init__(
        self, service: CheckpointService, ranks: Ranks, components: Sequence[Component]
    ) -> None:
        self._service = service
        self._ranks = ranks
        self._components = components
        self.bytes_read = 0
        """Of the last restore, on this rank."""

    def restore(
        self,
        selector: str,
        durability: str,
        raw: Mapping[str, Any] | None,
        deadline: Deadline,
    ) -> Resumed | None:
        """The generation restored, None if there is none.

        Damage makes all ranks go back together to the newest generation that all can verify, if
        *selector* is ``latest``; otherwise it is an :class:`IntegrityError`.
        """
        skipped: list[Skipped] = []
        while True:
            found = self._resolve(selector, durability, skipped, deadline)
            if found is None:
                return None
            attempt, step, manifest = found
            generation = GenerationId(self._service.run, attempt, step)
            what = f"restore generation {generation}"
            outcome = self._ranks.attempt(what, partial(self._load, generation, manifest, raw))
            damaged = bool(outcome.failures) and outcome.failed_only_with(IntegrityError)
            if damaged and selector == "latest":
                reason = min(outcome.failures.items())[1][1]
                _log.warning("generation %s is damaged, going back further: %s", generation, reason)
                skipped.append(Skipped(attempt, step, reason))
                continue
            outcome.raise_first(unless=IntegrityError)
            loaded = outcome.result
            assert loaded is not None
            self._ranks.together(f"apply generation {generation}", partial(self._apply, loaded))
            self.bytes_read = loaded.bytes_read
            state = loaded.state.get(RAW_STATE, {})
            return Resumed(step, attempt, loaded.manifest_metrics, tuple(skipped), state)

    def _resolve(
        self, selector: str, durability: str, skipped: Sequence[Skipped], deadline: Deadline
    ) -> list[Any] | None:
        """[attempt, step, manifest] on all ranks; None if there is no such generation."""
        skip = [f"{one.attempt}/{one.step}" for one in skipped]

        def resolve() -> list[Any] | None:
            try:
                found = self._service.resolve(selector, durability, skip, deadline.remaining)
            except NotFound:
                if skipped:
                    raise IntegrityError(
                        f"run {self._service.run}: no generation could be verified; damaged are "
                        f"{'; '.join(map(str, skipped))}; restore the files from the object tier "
                        "(forebay recover) or delete the run"
                    ) from None
                return None
            return [found.attempt, found.step, found.manifest]

        what = f"find generation {selector} of run {self._service.run}"
        answer: list[Any] | None = self._ranks.decide(what, resolve)
        return answer

    def _load(
        self, generation: GenerationId, manifest: str, raw: Mapping[str, Any] | None
    ) -> _Loaded:
        try:
            saved = SavedState.of(self._service.manifest(manifest, generation))
            names, targets = self._targets(saved, raw)
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(dict(targets), saved.metadata, self._ranks.rank == 0)
            with PackReader(self._service.transfer, saved) as reader:
                reader.read(planner.create_local_plan().items, planner)
                state = _nested(saved, names, targets, reader)
        except NotFound as error:
            raise IntegrityError(
                f"generation {generation}: its manifest, or bytes that it names, are gone "
                f"({error.message})"
            ) from error
        return _Loaded(saved.manifest.metrics, state, reader.bytes_read)

    def _targets(
        self, saved: SavedState, raw: Mapping[str, Any] | None
    ) -> tuple[set[str], dict[str, torch.Tensor]]:
        """The components that take part, and the tensors to read into, by saved name."""
        places = _places(saved)
        wanted: dict[str, Targets] = {}
        for component in self._components:
            if component.name not in places:
                raise InvalidRequest(
                    f"generation {saved.manifest.run}@{saved.manifest.attempt}/"
                    f"{saved.manifest.step} holds no {component.name!r}, only "
                    f"{', '.join(sorted(places))}: make the Checkpointer without it to restore"
                )
            wanted[component.name] = component.targets(_component(component.name, saved, places))
        if RAW_STATE in places:
            held = _component(RAW_STATE, saved, places)
            wanted[RAW_STATE] = targets_like(RAW_STATE, dict(raw or {}), held)
        targets = {
            places[name][path]: tensor
            for name, found in wanted.items()
            for path, tensor in found.items()
        }
        return set(wanted), targets

    def _apply(self, loaded: _Loaded) -> None:
        for component in self._components:
            component.apply(loaded.state[component.name])


def _places(saved: SavedState) -> dict[str, dict[Path, str]]:
    """Component to (path below it to saved name)."""
    places: dict[str, dict[Path, str]] = {}
    for name, path in saved.structure.items():
        places.setdefault(str(path[0]), {})[path[1:]] = name
    for name, item in saved.metadata.state_dict_metadata.items():
        if name not in saved.structure and isinstance(item, TensorStorageMetadata):
            component = next((one for one in places if name.startswith(f"{one}.")), None)
            if component is not None:
                places[component][placeless(name)] = name
    return places


def _component(
    name: str, saved: SavedState, places: Mapping[str, Mapping[Path, str]]
) -> SavedComponent:
    tensors, objects = {}, set()
    for path, saved_name in places[name].items():
        item = saved.metadata.state_dict_metadata.get(saved_name)
        if isinstance(item, TensorStorageMetadata):
            tensors[path] = item
        elif saved_name in saved.objects:
            objects.add(path)
        else:
            raise IntegrityError(f"{saved_name} has a place in the state and is in no pack")
    return SavedComponent(name, tensors, frozenset(objects))


def _nested(
    saved: SavedState, names: set[str], targets: Mapping[str, torch.Tensor], reader: PackReader
) -> dict[str | int, Any]:
    """The state as it was saved: tensors that were read, objects decoded."""

    def value_of(name: str) -> Any:
        if name in targets:
            return targets[name]
        stored = saved.objects[name]
        return decode(
            stored.json, lambda at, size: reader.read_bytes(stored.pack, at, size), targets
        )

    return nest(
        (path, value_of(name)) for name, path in saved.structure.items() if str(path[0]) in names
    )
