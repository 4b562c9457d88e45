"""Gradients of FSDP2: between the replicas of HSDP, and a count of what FSDP2 sends itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from forebay_trainer.compression.averaging import Averaging, laid_out
from forebay_trainer.compression.wire import Wire
from forebay_wire.errors import InvalidRequest


def attach(module: nn.Module, prefix: str, averaging: Averaging, shards: Wire) -> None:
    """Averages between replicas. FSDP2 itself knows the shards only: *module* is sharded over one
    dimension, and after each reduce-scatter the hook gets this rank's pieces in one line."""
    device = next(module.parameters()).device
    for name, unit in units(module, prefix):
        pieces = dict(sharded_pieces(unit, name, shards.num_ranks))
        for piece, shape in pieces.items():
            averaging.expect(piece, torch.empty(shape, device=device))

        def hook(flat: Tensor, pieces: dict[str, torch.Size] = pieces) -> None:
            shards.saw_reduce_scatter(flat)
            is_known = sum(shape.numel() for shape in pieces.values()) == flat.numel()
            # Else some had no gradient, and nobody says which.
            averaging.average(flat, laid_out(flat, pieces) if is_known else {})

        unit.set_all_reduce_hook(hook)


def count(module: nn.Module, wires: Sequence[Wire]) -> None:
    """Adds what FSDP2 sends by itself to the counts of *wires*: between replicas, shards."""
    replicas, shards = wires

    def hook(flat: Tensor) -> None:
        shards.saw_reduce_scatter(flat)
        replicas.saw_all_reduce(flat)

    for _, unit in units(module, ""):
        unit.set_all_reduce_hook(hook)


def units(module: nn.Module, prefix: str) -> Iterator[tuple[str, FSDPModule]]:
    """What FSDP2 gathers and reduces at a time, by name."""
    for name, each in module.named_modules(prefix=prefix):
        if isinstance(each, FSDPModule):
            yield name, each


def sharded_pieces(
    unit: FSDPModule, prefix: str, num_shards: int
) -> Iterator[tuple[str, torch.Size]]:
    """The trained parameters that are reduced with this unit, in the order in which FSDP2 lays
    them out, and the shape of each rank's piece, padding included."""
    assert isinstance(unit, nn.Module)  # as every FSDPModule is
    for name, weight in own_parameters(unit, prefix):
        if weight.requires_grad:
            assert isinstance(weight, DTensor)
            num_rows, *rest = weight.shape if weight.dim() else (1,)
            yield name, torch.Size((-(-num_rows // num_shards), *rest))


def own_parameters(unit: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Those that no unit inside has; of a module after those of the modules in it."""
    for name, child in unit.named_children():
        if not isinstance(child, FSDPModule):
            yield from own_parameters(child, f"{prefix}.{name}")
    for name, weight in unit.named_parameters(recurse=False):
        yield f"{prefix}.{name}", weight


def check_sum(dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device) -> None:
    """Adds up a few numbers of this type, or says by name that the backend cannot: InvalidRequest.
    A collective."""
    values = torch.ones(group.size(), device=device).to(dtype)
    try:
        dist.all_reduce(values, group=group)
        dist.reduce_scatter_single(values[:1].clone(), values, group=group)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = str(dtype).removeprefix("torch.")
        reason = str(error).partition("\n")[0]
        raise InvalidRequest(
            f"parallel.compression.method: {dist.get_backend(group)} cannot add up {kind} "
            f"({reason}), and FSDP2 leaves that to it: use method=none, or DDP (num_shards=1)"
        ) from error
