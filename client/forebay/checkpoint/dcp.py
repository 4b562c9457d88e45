"""torch's distributed checkpoint (DCP) over Forebay: its planners plan, the daemon stores."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from forebay.checkpoint.flatten import check_plain, flatten
from forebay.checkpoint.manifest import SavedState, decode_place, encode_place
from forebay.checkpoint.objects import (
    EncodedObject,
    Json,
    Path,
    decode,
    dtype_name,
    dtype_of,
    encode,
)
from forebay.checkpoint.read import PackReader
from forebay.checkpoint.service import CheckpointService, Client, PackTerms, to_json
from forebay.checkpoint.snapshot import Pack, Part, build_pack
from forebay.checkpoint.upload import PackUpload
from forebay.waiting import Deadline
from forebay_wire.errors import IntegrityError, InvalidRequest, UnsupportedObject
from forebay_wire.ids import GenerationId


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


class ForebayWriter(StorageWriter):
    """For ``dcp.save(state, storage_writer=ForebayWriter(client, "my-run", step))``.

    One object saves one generation. Every rank makes its own.
    """

    def __init__(
        self,
        client: Client,
        run: str,
        step: int,
        *,
        attempt: int | None = None,
        metrics: dict[str, float] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._service = CheckpointService(client, run)
        self._step = step
        self._attempt = attempt
        self._metrics = metrics or {}
        self._timeout = timeout
        self._rank = 0
        self._num_ranks = 1

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: the generation is named by run and step."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        if not kwargs.get("use_collectives", True) and self._attempt is None:
            raise InvalidRequest(
                "without collectives every rank must be given the same attempt=: open one on rank "
                "0 and tell the others"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if self._attempt is None:
            self._attempt = self._service.begin_attempt(None, len(plans))
        structure: dict[str, Path] = {}
        for plan in plans:
            structure.update(plan.planner_data or {})
        alone = len(plans) == 1 and self._num_ranks > 1
        num_ranks = self._num_ranks if alone else len(plans)
        return [
            replace(
                plan,
                storage_data={
                    "attempt": self._attempt,
                    "rank": self._rank if alone else rank,
                    "num_ranks": num_ranks,
                    "structure": structure if rank == 0 else {},
                },
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        place = plan.storage_data
        pack = pack_of(plan, planner, place["structure"])
        self._attempt = place["attempt"]
        rank = place["rank"]
        terms = PackTerms(
            GenerationId(self._service.run, place["attempt"], self._step),
            rank,
            place["num_ranks"],
            to_json(self._metrics) if rank == 0 else "",
        )
        upload = PackUpload(self._service, terms, pack)
        try:
            upload.copy(Deadline(self._timeout))
            upload.seal()
        except BaseException:
            upload.abort()
            raise
        upload.close()
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that every planned part was written; then wait until the generation is local."""
        written = {result.index for rank in results for result in rank}
        lost = [index for index in _planned(metadata) if index not in written]
        assert self._attempt is not None
        generation = GenerationId(self._service.run, self._attempt, self._step)
        if lost:
            self._service.delete(generation)
            raise IntegrityError(
                f"generation {generation}: {len(lost)} planned parts were not written, first "
                f"{lost[0]}; it was deleted"
            )
        self._service.wait(generation, "local", self._timeout)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # torch would have to guess a client: pass the writer


class ForebayReader(StorageReader):
    """For ``dcp.load(state, storage_reader=ForebayReader(client, "my-run", "latest"))``."""

    def __init__(
        self,
        client: Client,
        run: str,
        selector: str = "latest",
        *,
        durability: str = "local",
        timeout: float = 600.0,
    ) -> None:
        self._service = CheckpointService(client, run)
        self._selector = selector
        self._durability = durability
        self._timeout = timeout
        self._saved: SavedState | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        self._saved = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._state().metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._state()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with PackReader(self._service.transfer, self._state()) as reader:
            tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
            reader.read(tensors, planner)
            for item in plan.items:
                if item.type is LoadItemType.BYTE_IO:
                    planner.load_bytes(item, _as_torch_save(reader, item))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def _state(self) -> SavedState:
        if self._saved is None:
            found = self._service.resolve(self._selector, self._durability, (), self._timeout)
            generation = GenerationId(found.run, found.attempt, found.step)
            self._saved = SavedState.of(self._service.manifest(found.manifest, generation))
        return self._saved


def _as_torch_save(reader: PackReader, item: ReadItem) -> io.BytesIO:
    """What ``LoadPlanner.load_bytes`` takes; made here and in memory, no pickle is ever stored."""
    stored = reader.saved.objects[item.storage_index.fqn]
    value = decode(
        stored.json, lambda offset, size: reader.read_bytes(stored.pack, offset, size), {}
    )
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data


def _planned(metadata: Metadata) -> Sequence[MetadataIndex]:
    indices = []
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            indices += [MetadataIndex(name, chunk.offsets) for chunk in item.chunks]
        else:
            indices.append(MetadataIndex(name))
    return indices
