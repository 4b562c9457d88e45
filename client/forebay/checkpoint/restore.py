"""Restoring a generation in place: all ranks the same one, or none."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from forebay.checkpoint.choice import ALL, Choice, near
from forebay.checkpoint.components import (
    RAW_STATE,
    Component,
    OptimizerComponent,
    SavedComponent,
    placeless,
    targets_like,
)
from forebay.checkpoint.flatten import nest, overlaid
from forebay.checkpoint.group import Outcome, Ranks
from forebay.checkpoint.manifest import SavedState
from forebay.checkpoint.objects import Path, decode
from forebay.checkpoint.read import PackReader
from forebay.checkpoint.service import CheckpointService
from forebay.waiting import Deadline
from forebay_wire.errors import (
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    NothingSaved,
)
from forebay_wire.ids import GenerationId

_log = logging.getLogger(__name__)

SHOWN_NAMES = 20
"""Of those that an error lists because one was not found."""


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
    left: tuple[str, ...] = ()
    """Names of what the generation holds and ``only`` or ``ignore`` left alone."""
    run: str = ""
    """That saved it: another one for a fork that has nothing of its own yet."""


@dataclass(frozen=True)
class _Prepared:
    """A generation that fits here: what of it is read, and to where. Nothing is written yet."""

    saved: SavedState
    names: frozenset[str]
    """Of the items of the structure that are restored."""
    whole: frozenset[str]
    """The components that are restored as a whole."""
    targets: Mapping[str, torch.Tensor]
    planner: DefaultLoadPlanner
    plan: LoadPlan
    left: tuple[str, ...]


@dataclass(frozen=True)
class _Loaded:
    """A generation's bytes, read and verified; what is no live tensor is not yet applied."""

    values: Mapping[str, Sequence[tuple[Path, Any]]]
    """Component to paths below it with their values."""
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
        choice: Choice = ALL,
    ) -> Resumed | None:
        """The generation restored, None if there is none.

        Damage makes all ranks go back together to the newest generation that all can verify, if
        *selector* is ``latest``; otherwise it is an :class:`IntegrityError`. What does not fit on
        any rank is an error on all before any of them writes.
        """
        self._agree(selector, durability)
        skipped: list[Skipped] = []
        has_written = False
        while True:
            try:
                found = self._resolve(selector, durability, skipped, deadline)
            except ForebayError as error:
                raise _with_warning(error, has_written) from error
            if found is None:
                return None
            run, attempt, step, manifest = found
            generation = GenerationId(run, attempt, step)
            what = f"restore generation {generation}"
            prepared = self._ranks.attempt(
                what, partial(self._prepare, generation, manifest, raw, choice)
            )
            outcome: Outcome[Any] = prepared
            if not prepared.failures:
                assert prepared.result is not None
                has_written = True
                outcome = self._ranks.attempt(what, partial(self._load, prepared.result))
            damaged = bool(outcome.failures) and outcome.failed_only_with(IntegrityError)
            if damaged and selector == "latest":
                rank, (_, reason) = min(outcome.failures.items())
                if self._ranks.size > 1:
                    reason = f"rank {rank}: {reason}"
                _log.warning("generation %s is damaged, going back further: %s", generation, reason)
                skipped.append(Skipped(attempt, step, reason))
                continue
            try:
                outcome.raise_first(unless=IntegrityError)
            except ForebayError as error:
                raise _with_warning(error, has_written) from error
            assert prepared.result is not None
            assert outcome.result is not None
            return self._finish(generation, prepared.result, outcome.result, tuple(skipped))

    def _agree(self, selector: str, durability: str) -> None:
        """All ranks mean the same, or none of them restores."""
        told = self._ranks.exchange("choose what to restore", [selector, durability])
        if any(one != told[0] for one in told):
            said = ", ".join(f"rank {rank}: {' '.join(one)}" for rank, one in enumerate(told))
            raise InvalidRequest(f"the ranks are to restore different generations ({said})")

    def _finish(
        self,
        generation: GenerationId,
        prepared: _Prepared,
        loaded: _Loaded,
        skipped: tuple[Skipped, ...],
    ) -> Resumed:
        self._ranks.together(
            f"apply generation {generation}", partial(self._apply, prepared, loaded)
        )
        self.bytes_read = loaded.bytes_read
        state = nest(loaded.values.get(RAW_STATE, ()))
        metrics = prepared.saved.manifest.metrics
        return Resumed(
            generation.step,
            generation.attempt,
            metrics,
            skipped,
            {str(name): value for name, value in state.items()},
            prepared.left,
            generation.run,
        )

    def _resolve(
        self, selector: str, durability: str, skipped: Sequence[Skipped], deadline: Deadline
    ) -> list[Any] | None:
        """[run, attempt, step, manifest] on all ranks; None if there is no such generation."""
        skip = [f"{one.attempt}/{one.step}" for one in skipped]

        def resolve() -> list[Any] | None:
            try:
                found = self._service.resolve(selector, durability, skip, deadline.remaining)
            except NotFound as error:
                if skipped:
                    raise IntegrityError(
                        f"run {self._service.run}: no generation could be verified; damaged are "
                        f"{'; '.join(map(str, skipped))}; restore the files from the object tier "
                        "(forebay recover) or delete the run"
                    ) from None
                if not isinstance(error, NothingSaved):
                    raise
                return None
            return [found.run, found.attempt, found.step, found.manifest]

        what = f"find generation {selector} of run {self._service.run}"
        answer: list[Any] | None = self._ranks.decide(what, resolve)
        return answer

    def _prepare(
        self,
        generation: GenerationId,
        manifest: str,
        raw: Mapping[str, Any] | None,
        choice: Choice,
    ) -> _Prepared:
        with _gone_is_damage(generation):
            saved = SavedState.of(self._service.manifest(manifest, generation))
        places = _places(saved)
        names = frozenset(name for name in saved.structure if choice.takes(name))
        targets, problems = self._targets(saved, places, raw, choice, names)
        if problems:
            raise InvalidRequest(
                f"generation {generation} does not fit what is here, in {len(problems)} "
                f"{'place' if len(problems) == 1 else 'places'}; nothing is cast or left out "
                f"silently: build it as it was saved, or use only= and ignore={self._way(problems)}"
                "\n  " + "\n  ".join(problems)
            )
        if not choice.is_all and not names:
            raise InvalidRequest(
                f"{choice} takes nothing of generation {generation}; "
                f"{near(choice.only[0].rstrip('.*') if choice.only else '', saved.structure)}"
            )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), saved.metadata, self._ranks.rank == 0)
        left = tuple(sorted(saved.structure.keys() - names))
        broken = {str(saved.structure[name][0]) for name in left}
        return _Prepared(
            saved,
            names,
            frozenset(places.keys() - broken),
            targets,
            planner,
            planner.create_local_plan(),
            left,
        )

    def _way(self, problems: Sequence[str]) -> str:
        """What else to do about an optimizer: it may be another one on purpose."""
        for one in self._components:
            named = (f"{one.name}.", f"{one.name}:")
            if isinstance(one, OptimizerComponent) and any(p.startswith(named) for p in problems):
                return (
                    f'; ignore=["{one.name}*"], or a Checkpointer without it, leaves an optimizer '
                    "that differs on purpose as it is here"
                )
        return ""

    def _targets(
        self,
        saved: SavedState,
        places: Mapping[str, Mapping[Path, str]],
        raw: Mapping[str, Any] | None,
        choice: Choice,
        names: frozenset[str],
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The tensors to read into, by saved name; and what does not fit."""
        problems: list[str] = []
        targets: dict[str, torch.Tensor] = {}
        sources = [(component.name, component.targets) for component in self._components]
        if RAW_STATE in places:
            sources.append((RAW_STATE, partial(targets_like, RAW_STATE, dict(raw or {}))))
        for name, find in sources:
            if name not in places:
                if not choice.is_all and not _may_take(choice, name):
                    continue
                problems.append(f"{name}: it is here and was not saved, {_instead(name, places)}")
                continue
            component = _component(name, saved, places, choice, names)
            if choice.is_all or component.tensors or component.objects:
                for path, tensor in find(component).items():
                    targets[places[name][path]] = tensor
                problems += component.problems
        return targets, problems

    def _load(self, prepared: _Prepared) -> _Loaded:
        saved, targets = prepared.saved, prepared.targets
        values: dict[str, list[tuple[Path, Any]]] = {}
        taking = {component.name for component in self._components} | {RAW_STATE}
        manifest = saved.manifest
        generation = GenerationId(manifest.run, manifest.attempt, manifest.step)
        with _gone_is_damage(generation), PackReader(self._service.transfer, saved) as reader:
            reader.read(prepared.plan.items, prepared.planner)
            for name, path in saved.structure.items():
                component = str(path[0])
                if name in prepared.names and component in taking:
                    value = targets[name] if name in targets else _decoded(reader, name, targets)
                    values.setdefault(component, []).append((path[1:], value))
        return _Loaded(values, reader.bytes_read)

    def _apply(self, prepared: _Prepared, loaded: _Loaded) -> None:
        for component in self._components:
            values = loaded.values.get(component.name)
            if component.name in prepared.whole:
                component.apply(_as_saved(values or ()))
            elif values:
                component.apply(overlaid(component.state(), values))


def _as_saved(values: Sequence[tuple[Path, Any]]) -> Any:
    """Nested as it was; a component may have saved one value that is no dict."""
    if len(values) == 1 and values[0][0] == ():
        return values[0][1]
    return nest(values)


def _decoded(reader: PackReader, name: str, targets: Mapping[str, torch.Tensor]) -> Any:
    stored = reader.saved.objects[name]
    return decode(stored.json, lambda at, size: reader.read_bytes(stored.pack, at, size), targets)


@contextlib.contextmanager
def _gone_is_damage(generation: GenerationId) -> Iterator[None]:
    try:
        yield
    except NotFound as error:
        raise IntegrityError(
            f"generation {generation}: its manifest, or bytes that it names, are gone "
            f"({error.message})"
        ) from error


def _with_warning(error: ForebayError, has_written: bool) -> ForebayError:
    """*error*, which may come of an older generation that was to take the place of a damaged one:
    with what it has to say once some of that has been read into place."""
    if not has_written:
        return error
    return type(error)(
        f"{error.message}; what was to be restored holds a part of it: do not train on, restore "
        "another generation or start anew"
    )


def _instead(name: str, places: Mapping[str, Mapping[Path, str]]) -> str:
    """What a generation without the component *name* has; and how a bare state dict gets it."""
    held = sorted(places)
    more = f" and {len(held) - SHOWN_NAMES} more" if len(held) > SHOWN_NAMES else ""
    text = f"only {', '.join(held[:SHOWN_NAMES])}{more}"
    if any(() in paths for paths in places.values()) and any("." in one for one in held):
        text += (
            f"; a plain state_dict() is imported with --add-prefix {name}. (forebay checkpoint "
            "import; what is exported with its own prefix, with export --strip-prefix before)"
        )
    return text


def _may_take(choice: Choice, component: str) -> bool:
    """Whether a component that was not saved has been asked for."""
    if choice.ignore and not Choice(ignore=choice.ignore).takes(component):
        return False
    return not choice.only or any(
        pattern == component or pattern.startswith(f"{component}.") for pattern in choice.only
    )


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
    name: str,
    saved: SavedState,
    places: Mapping[str, Mapping[Path, str]],
    choice: Choice,
    names: frozenset[str],
) -> SavedComponent:
    tensors, objects, same = {}, set(), {}
    for path, saved_name in places[name].items():
        item = saved.metadata.state_dict_metadata.get(saved_name)
        if saved_name in saved.structure:
            is_wanted = saved_name in names
        else:  # a tensor inside an object, which is wanted with that
            is_wanted = choice.is_all or any(saved_name.startswith(f"{one}.") for one in names)
        if not is_wanted:
            continue
        if isinstance(item, TensorStorageMetadata):
            tensors[path] = item
            if (memory := saved.memory_of(saved_name)) is not None:
                same[path] = memory
        elif saved_name in saved.objects:
            objects.add(path)
        else:
            raise IntegrityError(f"{saved_name} has a place in the state and is in no pack")
    return SavedComponent(
        name,
        tensors,
        frozenset(objects),
        choice,
        same,
        outline=lambda path: _outline(saved, places[name][path]),
        shape_of=partial(_shape_of, saved),
    )


def _shape_of(saved: SavedState, name: str) -> torch.Size | None:
    item = saved.metadata.state_dict_metadata.get(name)
    return torch.Size(item.size) if isinstance(item, TensorStorageMetadata) else None


def _outline(saved: SavedState, name: str) -> Any:
    """The object *name* without reading a pack: tensors are on no device, long bytes are zeros."""
    empty = {
        one: torch.empty(item.size, dtype=item.properties.dtype, device="meta")
        for one, item in saved.metadata.state_dict_metadata.items()
        if one.startswith(f"{name}.") and isinstance(item, TensorStorageMetadata)
    }
    return decode(saved.objects[name].json, lambda at, size: bytes(size), empty)
