"""The compression of a run's gradients: put on its modules, counted, saved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from forebay_trainer.compression import ddp, fsdp
from forebay_trainer.compression.averaging import Averaging
from forebay_trainer.compression.config import CompressionConfig
from forebay_trainer.compression.wire import Wire
from forebay_trainer.parallel import Parallel
from forebay_trainer.per_rank import from_rows, to_rows
from forebay_trainer.precision import LossScaler
from forebay_wire.errors import InvalidRequest


class Compression:
    """A checkpoint item of every run, so that a generation can be restored whether or not gradients
    were compressed when it was saved.

    What a rank keeps (the error that it feeds back, PowerSGD's Q) is its own: on the mesh that
    saved it a restored run goes on exactly; on another one it begins anew, and `resume_note` says
    so.
    """

    def __init__(self, config: CompressionConfig, parallel: Parallel) -> None:
        self.resume_note = ""
        self._config = config
        self._parallel = parallel
        self._wires: list[Wire] = []
        self._averaging: Averaging | None = None
        """None if there is nothing to keep."""

    def attach(self, modules: Mapping[str, nn.Module], scaler: LossScaler, seed: int) -> None:
        """Puts the hooks on *modules*, which lie on the mesh already; a collective. InvalidRequest
        for a type that the backend cannot add up."""
        config, mesh = self._config, self._parallel.mesh
        if config.method == "none" or mesh is None:
            return
        if self._parallel.shape.is_sharded and config.dtype is not None:
            check_type(config.dtype, self._parallel, scaler)
        replicas, shards = self._wires = [Wire(mesh[n].get_group()) for n in ("replica", "shard")]
        averaging = Averaging(
            config.build(seed), replicas, start_step=config.start_step, scale=lambda: scaler.scale
        )
        if config.has_state:
            self._averaging = averaging
        for name, module in modules.items():
            if isinstance(module, DistributedDataParallel):
                ddp.attach(module, name, averaging)
            elif config.has_state:
                fsdp.attach(module, name, averaging, shards)
            else:
                fsdp.count(module, self._wires)

    @property
    def _mesh(self) -> str:
        return str(self._parallel.shape)

    def taken(self) -> dict[str, int]:
        """What this rank sent of gradients since it was last asked, and what it would have sent
        without compression; nothing if nothing is compressed."""
        if not self._wires:
            return {}
        taken = [wire.taken() for wire in self._wires]
        sent, plain = (round(sum(each)) for each in zip(*taken, strict=True))
        return {"wire_bytes": sent, "wire_bytes_plain": plain}

    def state_dict(self) -> dict[str, Any]:
        keeps = self._averaging is not None
        state: dict[str, Any] = {"method": self._config.method, "mesh": self._mesh, "keeps": keeps}
        if self._averaging is not None:
            state["rounds"] = torch.tensor(list(self._averaging.rounds.values()))
            state["kept"] = {
                name: {key: to_rows(value, self._parallel.ranks) for key, value in kept.items()}
                for name, kept in self._averaging.states.items()
                if kept
            }
        return state

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        method, mesh = saved["method"], saved["mesh"]
        self.resume_note = ""
        if self._averaging is not None and method == self._config.method:
            rounds = self._averaging.rounds
            if saved["keeps"] and len(saved["rounds"]) == len(rounds):
                rounds.update(zip(rounds, saved["rounds"].tolist(), strict=True))
            own, kept = dict(leaves(self.state_dict()["kept"])), dict(leaves(saved.get("kept", {})))
            fits = {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in kept.items()}
            if mesh == self._mesh and fits:
                self._take(own, kept)
                return
        if saved["keeps"]:
            self.resume_note = f"what {method} on {mesh} had left out of gradients is dropped"

    def _take(self, own: Mapping[Leaf, Tensor], kept: Mapping[Leaf, Tensor]) -> None:
        for name, rows in kept.items():
            row, mine = from_rows(rows, self._parallel.ranks), own[name]
            assert row is not None  # the mesh is the same
            (mine.to_local() if isinstance(mine, DTensor) else mine)[0].copy_(row)


Leaf = tuple[str, str]
"""A parameter, and what is kept of it."""


def leaves(tree: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[Leaf, Tensor]]:
    for name, kept in tree.items():
        for key, value in kept.items():
            yield (name, key), value


def check_type(dtype: torch.dtype, parallel: Parallel, scaler: LossScaler) -> None:
    """Whether FSDP2 can have the backend add up gradients of this type; a collective."""
    assert parallel.mesh is not None
    if dtype is torch.float16 and not scaler.is_used:
        raise InvalidRequest(
            "parallel.compression.method=fp16: FSDP2 adds up fp16 as it is, so small gradients "
            "need a scaled loss: set precision=fp16, or use method=bf16"
        )
    for name in ("shard", "replica"):
        fsdp.check_sum(dtype, parallel.mesh[name].get_group(), parallel.device)
