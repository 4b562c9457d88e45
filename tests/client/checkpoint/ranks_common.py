"""What the scenarios of ``ranks.py`` share: models, states, and this process among all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import forebay

HANG_SECONDS = 90.0

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int": torch.int32,
    "bool": torch.bool,
}


class Model(torch.nn.Module):
    """Small and awkward: rows that no number of ranks divides, two dtypes, all kinds of buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(11, 7)
        self.second = torch.nn.Linear(7, 2, bias=False)
        self.narrow = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
        self.unused = torch.nn.Parameter(torch.randn(4))
        self.frozen = torch.nn.Parameter(torch.randn(13), requires_grad=False)
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("mask", torch.rand(9) > 0.5)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scratch", torch.rand(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        y = self.second(torch.relu(self.first(x))).sum()
        return y + self.narrow(x[:, :5].to(torch.bfloat16)).sum().float()


def trained(model: torch.nn.Module, steps: int = 3) -> torch.optim.AdamW:
    """An optimizer of *model* after some steps: float32 and bfloat16 moments, one unused weight."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    torch.manual_seed(7)
    for _ in range(steps):
        model(torch.randn(4, 11)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def raw_tensors() -> dict[str, torch.Tensor]:
    """Tensors of all dtypes and awkward shapes, the same on every rank."""
    generator = torch.Generator().manual_seed(5)

    def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        high = 2 if dtype is torch.bool else 100
        raw = torch.randint(0, high, (*shape, dtype.itemsize), generator=generator)
        return raw.to(torch.uint8).view(dtype).reshape(shape)

    tensors = {}
    for name, dtype in DTYPES.items():
        tensors[f"{name}_rows"] = of(dtype, 5, 4)
        tensors[f"{name}_columns"] = of(dtype, 3, 10)
        tensors[f"{name}_few"] = of(dtype, 2)
        tensors[f"{name}_empty"] = of(dtype, 0, 4)
        tensors[f"{name}_scalar"] = of(dtype)
        tensors[f"{name}_replicated"] = of(dtype, 6)
    return tensors


def placement_of(name: str) -> Shard | Replicate:
    if name.endswith(("scalar", "replicated")):
        return Replicate()
    return Shard(1) if name.endswith("columns") else Shard(0)


def local_of(name: str, whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's part of *whole*; by hand, for not every dtype can be scattered."""
    shape, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, (placement_of(name),))
    for dimension, (offset, length) in enumerate(zip(offsets, shape, strict=True)):
        whole = whole.narrow(dimension, min(offset, whole.shape[dimension]), length)
    return whole.clone(memory_format=torch.contiguous_format)


def sharded(tensors: dict[str, torch.Tensor], mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    if mesh is None:
        return dict(tensors)
    return {
        name: DTensor.from_local(
            local_of(name, whole, mesh),
            mesh,
            (placement_of(name),),
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        for name, whole in tensors.items()
    }


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything in full, by qualified name: what has to be equal however it is sharded."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    found = {name: whole(value).clone() for name, value in model_state.items()}
    for name, held in optimizer_state["state"].items():
        found |= {f"{name}/{key}": whole(value).clone() for key, value in held.items()}
    found["groups"] = optimizer_state["param_groups"]
    return found


def same_bits(one: Any, other: Any) -> bool:
    if not isinstance(other, torch.Tensor):
        return bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not other.numel():
        return True
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def assert_same(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    assert found.keys() == expected.keys(), (case, found.keys() ^ expected.keys())
    wrong = [name for name, value in expected.items() if not same_bits(found[name], value)]
    assert not wrong, (case, wrong)


def assert_same_parts(
    found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], mesh: DeviceMesh | None
) -> None:
    for name, tensor in tensors.items():
        expected = tensor if mesh is None else local_of(name, tensor, mesh)
        have = found[name].to_local() if mesh is not None else found[name]
        assert same_bits(have, expected), (name, mesh)


class World:
    """This process among all, with groups of the first n ranks."""

    def __init__(self, rank: int, size: int, data: str, scratch: Path) -> None:
        self.rank = rank
        self.size = size
        self.scratch = scratch
        self.client = forebay.connect(data)
        self._groups: dict[int, dist.ProcessGroup] = {}

    def group(self, size: int) -> dist.ProcessGroup:
        """The first *size* ranks; every process asks in the same order."""
        if size not in self._groups:
            self._groups[size] = dist.new_group(list(range(size)), backend="gloo")
        return self._groups[size]

    def mesh(self, size: int) -> DeviceMesh | None:
        """Every process makes it, for groups are made by all; None for one rank."""
        return DeviceMesh("cpu", list(range(size))) if size > 1 else None

    def checkpointer(self, run: str, size: int, **state: Any) -> forebay.Checkpointer:
        return forebay.Checkpointer(
            self.client, run, process_group=self.group(size), timeout=60, **state
        )

    @contextmanager
    def among(self, size: int) -> Iterator[bool]:
        """Whether this process is one of the first *size*; all go on together after it."""
        yield self.rank < size
        dist.barrier()


def fsdp(model: Model, mesh: DeviceMesh | None) -> Model:
    if mesh is not None:
        fully_shard(model.first, mesh=mesh)
        fully_shard(model.narrow, mesh=mesh)  # a group has one dtype
        fully_shard(model, mesh=mesh)
    return model


class Holder:
    """A stateful of one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.value, Exception):
            raise self.value
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def raised(act: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        act()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
