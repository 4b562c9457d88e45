"""What one rank saves of its state: worked out once, and used as long as the state looks alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from blake3 import blake3
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.tensor import DTensor

from forebay.checkpoint.balance import Offer, share
from forebay.checkpoint.components import RAW_STATE, Component
from forebay.checkpoint.flatten import FlatState, flatten, local_part
from forebay.checkpoint.objects import EncodedObject, Json, Path, unsupported
from forebay.checkpoint.planning import StateSavePlanner, decode_plan, encode_plan
from forebay.checkpoint.snapshot import Pack, PackTemplate, Part, shared_memory
from forebay_wire.errors import UnsupportedObject

Structure = tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class LocalState:
    """This rank's state as it is now; the tensors are the live ones."""

    flat: FlatState
    lowest: frozenset[str]
    """Names that several ranks have and that must all come from one."""
    frozen: frozenset[str]
    """Names of what the training leaves alone."""
    structure: Structure
    """Equal for states that are saved by the same plan, whatever their values."""
    values: Mapping[str, Any]
    """By component, as the components gave it."""

    @classmethod
    def of(cls, components: Sequence[Component], raw: Mapping[str, Any] | None) -> LocalState:
        """Ask all *components* for their state. Raises what they raise, and UnsupportedObject."""
        values = {component.name: component.state() for component in components}
        if raw is not None:
            values[RAW_STATE] = dict(raw)
        flat = flatten(values)
        for path, tensor in flat.wrappers.items():
            if path[0] == RAW_STATE:
                raise unsupported(tensor, path, "there is nothing here to rebuild it into")
        lowest = {name for name in flat.tensors() if name.startswith(f"{RAW_STATE}.")}
        frozen: set[str] = set()
        for component in components:
            lowest |= component.lowest(flat)
            frozen |= component.frozen(flat)
        structure = _structure(flat, lowest, frozen)
        return cls(flat, frozenset(lowest), frozenset(frozen), structure, values)

    @property
    def digest(self) -> str:
        """Of the structure: the same on this rank as long as that is equal."""
        return blake3(repr(self.structure).encode()).hexdigest()


def _structure(flat: FlatState, lowest: set[str], frozen: set[str]) -> Structure:
    """Keys, shapes, dtypes, meshes, placements, aliases, and what is frozen or kept together."""
    tensors = flat.tensors()
    local = {name: local_part(tensor) for name, tensor in tensors.items()}
    storages = {name: _storage(tensor) for name, tensor in local.items()}
    shared = Counter(storages.values())
    numbers: dict[object, int] = {}
    found: list[tuple[object, ...]] = []
    for name, item in flat.items.items():
        path = flat.paths.get(name)
        if not isinstance(item, torch.Tensor):
            found.append((name, path))
            continue
        part, storage = local[name], storages[name]
        alias: tuple[object, ...] = ()
        if shared[storage] > 1:
            number = numbers.setdefault(storage, len(numbers))
            bent = part.is_conj(), part.is_neg()
            alias = (number, part.storage_offset(), part.stride(), *bent)
        spread = (item.device_mesh, item.placements) if isinstance(item, DTensor) else ()
        groups = (name in lowest, name in frozen)
        found.append((name, path, item.dtype, item.shape, part.shape, spread, alias, groups))
    return tuple(found)


def _storage(tensor: torch.Tensor) -> tuple[object, ...]:
    if not tensor.numel():
        return (id(tensor),)
    return str(tensor.device), tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Offered:
    """What this rank has, before the ranks have agreed who saves what."""

    plan: SavePlan
    parts: Mapping[MetadataIndex, Part]
    encoded: Json
    """What rank 0 needs to know of it."""


def offer(state: LocalState) -> Offered:
    """All that *state* has to save on this rank."""
    planner = StateSavePlanner()
    planner.state_dict, planner.mappings = state.flat.items, state.flat.paths
    planner.is_coordinator = False
    plan = planner.create_local_plan()
    parts: dict[MetadataIndex, Part] = {}
    for item in plan.items:
        data = item.tensor_data
        if data is None:
            continue
        name = item.index.fqn
        tensor = local_part(state.flat.tensors()[name])
        if tensor.shape != data.chunk.sizes:
            raise UnsupportedObject(
                f"{name}: this rank holds {tuple(tensor.shape)} where its plan says "
                f"{tuple(data.chunk.sizes)}: padded shards cannot be saved"
            )
        offsets = tuple(data.chunk.offsets)
        parts[item.index] = Part(name, tuple(data.size), offsets, tensor, name in state.frozen)
    numbers = dict(zip(parts, shared_memory(list(parts.values())), strict=True))
    encoded = {
        **encode_plan(plan),
        "lowest": sorted(state.lowest),
        "memory": [numbers.get(item.index) for item in plan.items],
    }
    return Offered(plan, parts, encoded)


def plan_globally(plans: Sequence[Json]) -> tuple[list[Json], dict[str, Path]]:
    """For each rank the indices of its items that it saves, and the structure of the whole.

    Raises ValueError for what does not fit together (torch's planner checks that).
    """
    decoded = [decode_plan(plan) for plan in plans]
    lowest = {name for plan in plans for name in plan["lowest"]}
    offers = [
        [
            Offer(
                item.index,
                _num_bytes(item),
                memory,
                item.type is WriteItemType.BYTE_IO or item.index.fqn in lowest,
            )
            for item, memory in zip(plan.items, said["memory"], strict=True)
        ]
        for plan, said in zip(decoded, plans, strict=True)
    ]
    kept = share(offers)
    planner = StateSavePlanner()
    trimmed = [
        replace(plan, items=[plan.items[index] for index in keep])
        for plan, keep in zip(decoded, kept, strict=True)
    ]
    _, metadata = planner.create_global_plan(trimmed)
    return list(kept), metadata.planner_data


def _num_bytes(item: Any) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


class CachedPlan:
    """What this rank saves, by a plan that all ranks agreed on. Not thread-safe.

    Nothing in it refers to a tensor, and no save changes it.
    """

    def __init__(
        self,
        number: int,
        state: LocalState,
        offered: Offered,
        keep: Sequence[int],
        structure: Mapping[str, Path],
    ) -> None:
        """*keep*: the items of this rank's own plan that it saves."""
        self.number = number
        self.structure = state.structure
        self.digest = state.digest
        kept = [offered.plan.items[index] for index in keep]
        parts = [offered.parts[item.index] for item in kept if item.index in offered.parts]
        self._tensors = [part.name for part in parts]
        self._objects = [item.index.fqn for item in kept if item.tensor_data is None]
        self._template = PackTemplate(parts, structure)

    def fits(self, state: LocalState) -> bool:
        """Whether *state* looks like the one that was planned."""
        return self.structure == state.structure

    def pack(self, state: LocalState) -> Pack:
        """The pack of *state*, which has to fit."""
        items = state.flat.items
        tensors = [_tensor(items[name]) for name in self._tensors]
        return self._template.pack(tensors, {name: _object(items[name]) for name in self._objects})


def _tensor(item: torch.Tensor | EncodedObject) -> torch.Tensor:
    assert isinstance(item, torch.Tensor)
    return local_part(item)


def _object(item: torch.Tensor | EncodedObject) -> EncodedObject:
    assert isinstance(item, EncodedObject)
    return item
