"""torch's distributed checkpoint (DCP) over Forebay: its planners plan, the daemon stores."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.storage import StorageReader as TorchStorageReader
from torch.futures import Future

from forebay.checkpoint.dcp_writer import StorageWriter
from forebay.checkpoint.identity import CheckpointName
from forebay.checkpoint.manifest import SavedState
from forebay.checkpoint.objects import decode, dtype_name
from forebay.checkpoint.read import PackReader
from forebay.checkpoint.service import CheckpointService, Client
from forebay_wire.errors import Conflict, InvalidRequest
from forebay_wire.ids import GenerationId
from forebay_wire.manifest import GenerationManifest

__all__ = ["StorageReader", "StorageWriter"]


class StorageReader(TorchStorageReader):
    """For ``dcp.load(state, checkpoint_id="my-run", storage_reader=StorageReader(client))``.

    What it reads is verified. Every rank makes its own; it may be pickled, and connects anew then.
    """

    def __init__(
        self,
        client: Client,
        run: str | None = None,
        selector: str = "latest",
        *,
        durability: str = "local",
        timeout: float = 600.0,
    ) -> None:
        """*run* and *selector* (``latest``, ``STEP``, ``ATTEMPT/STEP``) say what is read, unless
        a ``checkpoint_id`` does: ``RUN`` or ``RUN@SELECTOR``."""
        self._client: Client | None = client
        self._connect: Callable[[], Any] | None = None
        self._name = CheckpointName(run, selector) if run is not None else None
        self._selector = selector
        self._durability = durability
        self._timeout = timeout
        self._rank = 0
        self._manifest: GenerationManifest | None = None
        self._saved: dict[int | None, SavedState] = {}

    def __getstate__(self) -> dict[str, Any]:
        connect = self._client.reconnect() if self._client is not None else self._connect
        return {**self.__dict__, "_client": None, "_connect": connect, "_saved": {}}

    @property
    def checkpoint_id(self) -> str:
        """``RUN@SELECTOR``; empty if nobody has named one."""
        return f"{self._name.run}@{self._name.selector}" if self._name is not None else ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """What is read next; the newest is looked for again."""
        self._manifest = None
        self._saved = {}
        if checkpoint_id is not None:
            name = CheckpointName.of(checkpoint_id)
            self._name = replace(name, selector=name.selector or self._selector)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the generation holds; of ``rank=`` alone if its ranks saved without each other."""
        return self._state(kwargs.get("rank")).metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        found = self._found()
        return replace(plan, storage_data=(found.run, found.attempt, found.step))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        found = {plan.storage_data for plan in plans}
        if len(found) > 1:
            names = ", ".join(f"{attempt}/{step}" for _, attempt, step in sorted(found))
            raise Conflict(
                f"the ranks found different newest generations of run {self._found().run} "
                f"({names}), for one was saved meanwhile: load again, or name it: RUN@ATTEMPT/STEP"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        saved = self._state(self._rank if self._found_separate() else None)
        with PackReader(self._service().transfer, saved) as reader:
            tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
            reader.read(tensors, _Uncast(planner, saved.metadata))
            for item in plan.items:
                if item.type is LoadItemType.BYTE_IO:
                    planner.load_bytes(item, _as_torch_save(reader, item))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: torch would have to guess a client, so the reader has to be passed."""
        return False

    def _service(self) -> CheckpointService:
        if self._name is None:
            raise InvalidRequest(
                "no run is named: StorageReader(client, run), or checkpoint_id= of dcp.load"
            )
        if self._client is None:
            assert self._connect is not None
            self._client = self._connect()
        return CheckpointService(self._client, self._name.run)

    def _found(self) -> GenerationManifest:
        if self._manifest is None:
            service = self._service()
            assert self._name is not None
            selector = self._name.selector or "latest"
            found = service.resolve(selector, self._durability, (), self._timeout)
            generation = GenerationId(found.run, found.attempt, found.step)
            self._manifest = service.manifest(found.manifest, generation)
        return self._manifest

    def _found_separate(self) -> bool:
        return SavedState.is_separate(self._found())

    def _state(self, rank: int | None) -> SavedState:
        manifest = self._found()
        if not SavedState.is_separate(manifest):
            rank = None  # all ranks' packs make one state
        if rank not in self._saved:
            self._saved[rank] = SavedState.of(manifest, rank)
        return self._saved[rank]


class _Uncast:
    """A planner that hands out no tensor of another dtype than was saved: torch's reader would
    cast into it without a word."""

    def __init__(self, planner: LoadPlanner, metadata: Metadata) -> None:
        self._planner = planner
        self._metadata = metadata
        self.commit_tensor = planner.commit_tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._planner.resolve_tensor(read_item)
        name = read_item.storage_index.fqn
        whole = self._metadata.state_dict_metadata[name]
        assert isinstance(whole, TensorStorageMetadata)
        if tensor.dtype != whole.properties.dtype:
            raise InvalidRequest(
                f"{name}: it is {dtype_name(tensor.dtype)} here and was saved as "
                f"{dtype_name(whole.properties.dtype)}; nothing is cast silently: load it as it "
                "was saved, or with a planner whose resolve_tensor() gives that dtype and whose "
                "commit_tensor() casts"
            )
        return tensor


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
