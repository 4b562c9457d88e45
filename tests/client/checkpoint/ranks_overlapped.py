"""Overlapped saves of several ranks: scenarios of ``ranks.py``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks_common import (
    HANG_SECONDS,
    Holder,
    World,
    assert_same,
    raised,
    same_bits,
    whole_state,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import forebay
from forebay.checkpoint import overlapped as overlapped_module
from forebay.checkpoint.overlap import Snapshot


class Large(torch.nn.Module):
    """Weights that are copied in the background, and a buffer that every forward changes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(800, 800) for _ in range(2))
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().sum()


class HeldCopies:
    """Holds copies in the background up until the training waits for them."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def __enter__(self) -> HeldCopies:
        real_wait, real_copy = Snapshot.wait, overlapped_module.copy_quietly
        self._reals = real_wait, real_copy

        def wait(snapshot: Snapshot, *deadline: Any) -> None:
            self._opened.set()
            real_wait(snapshot, *deadline)

        def copy(*what: Any) -> None:
            assert self._opened.wait(HANG_SECONDS)
            real_copy(*what)

        Snapshot.wait, overlapped_module.copy_quietly = wait, copy  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Snapshot.wait, overlapped_module.copy_quietly = self._reals  # type: ignore[method-assign]


def _overlapped_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 800)).backward()
    optimizer.step()
    optimizer.zero_grad()


def overlapped(world: World) -> None:
    """Overlapped saves under DDP (which broadcasts buffers in forward), FSDP2, CPU offload."""
    mesh = DeviceMesh("cpu", list(range(world.size)))

    def sharded(**options: Any) -> torch.nn.Module:
        model = Large(1)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, **options)
        fully_shard(model, mesh=mesh, **options)
        return model

    made: dict[str, Callable[[], torch.nn.Module]] = {
        "ddp": lambda: DistributedDataParallel(Large(1)),
        "fsdp": sharded,
        "offload": lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    }
    for name, make in made.items():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        _overlapped_step(model, optimizer)
        checkpointer = world.checkpointer(
            f"overlapped-{name}", world.size, model=model, optimizer=optimizer
        )
        expected = whole_state(model, optimizer)
        with HeldCopies():
            saved = checkpointer.save_overlapped(1)
            _overlapped_step(model, optimizer)
        saved.wait("local")
        changed = whole_state(model, optimizer)
        assert not same_bits(changed["layers.0.weight"], expected["layers.0.weight"])
        assert checkpointer.report().overlapped_bytes > 0
        checkpointer.restore()
        assert_same(whole_state(model, optimizer), expected, name)
        checkpointer.close()


def overlapped_error(world: World) -> None:
    """One rank changes a tensor without a wait: all ranks hear of it, and nothing is saved."""
    model = Large(world.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _overlapped_step(model, optimizer)
    state = {"mine": {f"{world.rank}": model.layers[0].weight.detach()}}
    checkpointer = world.checkpointer(
        "overlapped-error", world.size, model=model, optimizer=optimizer
    )
    messages = []
    for step in (1, 2):  # planned, reused
        with HeldCopies():
            saved = checkpointer.save_overlapped(step, state=state)
            if world.rank == world.size - 1:
                with torch.no_grad():
                    for param in model.parameters():
                        param.add_(1.0)
            messages.append(raised(checkpointer.wait_snapshot, forebay.Conflict))
        messages.append(raised(saved.wait, forebay.Conflict))
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, [message.count("changed while") for message in messages])
    assert gathered == [[1] * 4] * world.size, messages
    assert world.client.checkpoints("overlapped-error") == []
    checkpointer.save_overlapped(3, state=state).wait("local")
    holder = Holder(object() if world.rank == 0 else 1)
    other = world.checkpointer("overlapped-other", world.size, model=model, holder=holder)
    raised(lambda: other.save_overlapped(1), forebay.UnsupportedObject)
    holder.value = 1
    other.save_overlapped(1).wait("local")
    for one in (checkpointer, other):
        one.close()
