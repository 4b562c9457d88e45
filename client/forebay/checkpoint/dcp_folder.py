"""A generation as a folder that stock ``torch.distributed.checkpoint`` loads."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from forebay.checkpoint.contents import TensorInfo
from forebay.checkpoint.export import Choice, Exported, Progress, choose, new_folder
from forebay.checkpoint.find import find, split
from forebay.checkpoint.flatten import nest
from forebay.checkpoint.manifest import decode_place
from forebay.checkpoint.objects import Path as ObjectPath
from forebay.checkpoint.objects import decode, dotted, dtype_of
from forebay.checkpoint.tensor_bytes import Block, TensorReader, blocks, raw_bytes
from forebay_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from forebay.client import Client

CHUNK_BYTES: Final = 64 << 20
"""Of a tensor that is written, and later read, at once."""


def export_dcp(
    client: Client,
    generation: str,
    output: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    strip_prefix: str = "",
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write *generation* as the new folder *output* in the format of torch's FileSystemWriter.

    Any number of ranks loads it with ``dcp.load``. Objects are written as torch pickles them: load
    only what you trust. Large tensors become chunks of 64 MiB, so memory is a few of those. Else as
    :func:`forebay.checkpoint.export_safetensors`; a tensor with several names is written for each.
    """
    contents = find(client, *split(generation)).committed()
    choice = choose(contents, only, tied="copies")
    path = Path(output)
    with TensorReader(client.transfer, contents) as reader, new_folder(path) as folder:
        leaves = _leaves(reader, choice, strip_prefix)
        planner = _Planner(reader, leaves, progress)
        writer = FileSystemWriter(folder, overwrite=False)
        with alone():
            save({}, storage_writer=writer, planner=planner, no_dist=True)
    return Exported(contents.name, sorted(path.iterdir()), len(leaves.tensors), planner.total_bytes)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, torch does not warn that there are no other ranks: none are meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


@dataclass(frozen=True)
class _Leaves:
    """A state as torch flattens it: lists of other than plain values are taken apart, too."""

    tensors: Mapping[str, TensorInfo]
    objects: Mapping[str, Any]
    paths: Mapping[str, ObjectPath]


def _leaves(reader: TensorReader, choice: Choice, prefix: str) -> _Leaves:
    contents = reader.contents
    stand_ins = _StandIns(contents.tensors)
    paths: dict[str, ObjectPath] = {}
    for pack in contents.packs.values():
        paths.update(decode_place(place) for place in pack.description.get("structure", []))
    values: dict[str, Any] = {}
    for name in choice.objects:
        json, pack = contents.objects[name]
        values[name] = decode(json, partial(reader.read_bytes, pack.rank), stand_ins)
    inside = set(stand_ins.made.values())
    values.update((name, stand_ins[name]) for name in choice.tensors if name not in inside)
    nested: dict[Any, Any] = nest(
        (paths.get(name, (name,)), value) for name, value in values.items()
    )
    flat, places = flatten_state_dict(nested)
    tensors, objects, kept = {}, {}, {}
    for old, value in flat.items():
        name = old.removeprefix(prefix)
        if not name or name in kept:
            raise InvalidRequest(f"without {prefix!r} a name is empty or twice there: {name!r}")
        kept[name] = _stripped(places[old], prefix) if name != old else places[old]
        if (stored := stand_ins.made.get(id(value))) is not None:
            tensors[name] = contents.tensors[stored]
        else:
            objects[name] = value
    return _Leaves(tensors, objects, kept)


class _StandIns(Mapping[str, torch.Tensor]):
    """A tensor without bytes for each that is asked for: what torch takes a state apart by."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = infos
        self._kept: list[torch.Tensor] = []
        self.made: dict[int, str] = {}
        """Identity of a stand-in to the name of its tensor."""

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        found = torch.empty(info.shape, dtype=dtype_of(info.dtype), device="meta")
        self._kept.append(found)
        self.made[id(found)] = name
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


class _Planner(SavePlanner):
    """Plans what a generation holds, and reads it when the writer asks for it."""

    def __init__(self, reader: TensorReader, leaves: _Leaves, progress: Progress) -> None:
        self._reader = reader
        self._leaves = leaves
        self._progress = progress
        self._done = 0
        self.total_bytes = sum(one.num_bytes for one in leaves.tensors.values())
        self._blocks: dict[MetadataIndex, tuple[TensorInfo, Block]] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing of the state dict, which is empty, is saved."""

    def create_local_plan(self) -> SavePlan:
        leaves = self._leaves
        items = [item for name, info in leaves.tensors.items() for item in self._items(name, info)]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in leaves.objects]
        return SavePlan(items, planner_data=dict(leaves.paths))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        (plan,) = all_plans
        found: dict[str, Any] = {}
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                found[item.index.fqn] = BytesStorageMetadata()
                continue
            whole = found.setdefault(
                item.index.fqn, TensorStorageMetadata(data.properties, data.size, [])
            )
            whole.chunks.append(data.chunk)
        return all_plans, Metadata(found, planner_data=plan.planner_data)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save(self._leaves.objects[write_item.index.fqn], stream)
            return stream
        info, block = self._blocks[write_item.index]
        found = _tensor(self._reader, info, block)
        self._done += block.num_elements * info.item_bytes
        self._progress(self._done, self.total_bytes)
        return found

    def _items(self, name: str, info: TensorInfo) -> Iterator[WriteItem]:
        properties = TensorProperties(dtype=dtype_of(info.dtype))
        whole = Block((0,) * len(info.shape), info.shape)
        cut = list(blocks(info.shape, info.item_bytes, CHUNK_BYTES)) or [whole]
        for block in cut:
            offsets, sizes = torch.Size(block.offsets), torch.Size(block.sizes)
            index = MetadataIndex(name, offsets)
            kind = WriteItemType.TENSOR if len(cut) == 1 else WriteItemType.SHARD
            chunk = ChunkStorageMetadata(offsets, sizes)
            data = TensorWriteData(chunk, properties, torch.Size(info.shape))
            self._blocks[index] = info, block
            yield WriteItem(index, kind, tensor_data=data)


def _tensor(reader: TensorReader, info: TensorInfo, block: Block) -> torch.Tensor:
    dtype = dtype_of(info.dtype)
    if not math.prod(block.sizes):
        return torch.empty(block.sizes, dtype=dtype)
    data = raw_bytes(reader.read(info, block))
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(block.sizes)


def _stripped(path: ObjectPath, prefix: str) -> ObjectPath:
    """*path* without its first words, which are *prefix*; one word if that ends within one."""
    for number in range(1, len(path)):
        if dotted(path[:number]) + "." == prefix:
            return path[number:]
    return (dotted(path).removeprefix(prefix),)
