"""Who saves what: torch's planner on our flattening, plans as JSON, and a rank's pack of one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from forebay.checkpoint.flatten import check_plain, flatten
from forebay.checkpoint.manifest import decode_place, encode_place
from forebay.checkpoint.objects import EncodedObject, Json, Path, dtype_name, dtype_of, encode
from forebay.checkpoint.snapshot import Pack, Part, build_pack
from forebay_wire.errors import UnsupportedObject


class StateSavePlanner(DefaultSavePlanner):
    """DCP's planner on our flattening, which tells an integer key from a string.

    Items named in ``lowest`` that several ranks have are kept from the lowest of them, so that
    values that belong together come from one rank; all other copies are spread by size.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=True, flatten_sharded_tensors=False)
        self.lowest: Collection[str] = ()

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        flat = flatten(state_dict)
        self.state_dict = flat.items
        self.mappings = flat.paths
        self.is_coordinator = is_coordinator

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        taken: set[MetadataIndex] = set()
        trimmed = []
        for plan in all_plans:
            items = [item for item in plan.items if item.index not in taken]
            taken.update(
                item.index
                for item in items
                if item.type is WriteItemType.BYTE_IO or item.index.fqn in self.lowest
            )
            trimmed.append(replace(plan, items=items))
        return super().create_global_plan(trimmed)


def encode_plan(plan: SavePlan) -> Json:
    """A rank's plan as JSON: what rank 0 needs to know of its items."""
    return {
        "items": [_encode_item(item) for item in plan.items],
        "places": [encode_place(name, path) for name, path in (plan.planner_data or {}).items()],
    }


def decode_plan(json: Json) -> SavePlan:
    """The inverse of :func:`encode_plan`."""
    return SavePlan(
        [_decode_item(item) for item in json["items"]],
        planner_data=dict(decode_place(place) for place in json["places"]),
    )


def _encode_item(item: WriteItem) -> Json:
    data = item.tensor_data
    if data is None:
        return [item.index.fqn]
    return [
        item.index.fqn,
        item.type.name,
        dtype_name(data.properties.dtype),
        list(data.size),
        list(data.chunk.offsets),
        list(data.chunk.sizes),
    ]


def _decode_item(json: Json) -> WriteItem:
    if len(json) == 1:
        return WriteItem(MetadataIndex(json[0]), WriteItemType.BYTE_IO)
    name, kind, dtype, size, offsets, sizes = json
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    return WriteItem(
        MetadataIndex(name, offsets),
        WriteItemType[kind],
        tensor_data=TensorWriteData(
            chunk, TensorProperties(dtype=dtype_of(dtype)), torch.Size(size)
        ),
    )


def pack_of(
    plan: SavePlan,
    planner: SavePlanner,
    structure: dict[str, Path],
    frozen: Collection[str] = (),
) -> Pack:
    """The pack that *plan* asks this rank for; *planner* resolves the tensors."""
    parts, objects = [], {}
    for item in plan.items:
        name = item.index.fqn
        if item.type is WriteItemType.BYTE_IO:
            objects[name] = _object_of(planner, item)
            continue
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        assert item.tensor_data is not None
        check_plain(tensor, (name,))
        if tensor.shape != item.tensor_data.chunk.sizes:
            raise UnsupportedObject(
                f"{name}: this rank holds {tuple(tensor.shape)} where its plan says "
                f"{tuple(item.tensor_data.chunk.sizes)}: padded shards cannot be saved"
            )
        parts.append(
            Part(
                name,
                tuple(item.tensor_data.size),
                tuple(item.tensor_data.chunk.offsets),
                tensor,
                name in frozen,
            )
        )
    return build_pack(parts, objects, structure)


def _object_of(planner: SavePlanner, item: WriteItem) -> EncodedObject:
    """The object itself, encoded: what DCP's planners would give is a pickle."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise UnsupportedObject(
            f"{item.index.fqn}: {type(planner)} gives objects only as pickles; use a planner that "
            "has lookup_object(), like torch's DefaultSavePlanner"
        )
    value = look_up(item.index)
    return value if isinstance(value, EncodedObject) else encode(value, (item.index.fqn,))
