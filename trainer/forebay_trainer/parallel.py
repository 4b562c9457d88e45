"""The process group that this rank belongs to: its device, its collectives, its shared fate."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final, Literal, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest

PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    backend: Literal["auto", "gloo", "nccl"] = setting(
        "auto", "collectives; auto: nccl where there is a GPU, else gloo"
    )
    timeout_seconds: float = setting(300.0, "how long a collective waits for the other ranks")

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0:
            raise InvalidRequest(f"timeout_seconds must be above 0, not {self.timeout_seconds}")

    def build(self) -> Parallel:
        """This process's place as torchrun says it; without torchrun the only rank."""
        use_cuda = torch.cuda.is_available() and self.backend != "gloo"
        backend = ("nccl" if use_cuda else "gloo") if self.backend == "auto" else self.backend
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return Parallel(
            rank=int(os.environ.get("RANK", "0")),
            num_ranks=int(os.environ.get("WORLD_SIZE", "1")),
            device=torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"),
            backend=backend,
            timeout=timedelta(seconds=self.timeout_seconds),
        )


class Parallel:
    """A context manager around the process group; used from the thread that trains."""

    def __init__(
        self, *, rank: int, num_ranks: int, device: torch.device, backend: str, timeout: timedelta
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._backend = backend
        self._timeout = timeout

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()
        if self.num_ranks > 1:
            dist.init_process_group(self._backend, timeout=self._timeout)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error other ranks may sit in a collective: nccl would wait for them here.
        if dist.is_initialized() and error is None:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks for all."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on this rank's device, its gradients averaged over the ranks."""
        model = model.to(self.device)
        if self.num_ranks == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of the values over all ranks, in float64; a collective."""
        if self.num_ranks == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: float) -> list[float]:
        """The value of every rank, in order of rank; a collective."""
        return self.sum([value if rank == self.rank else 0.0 for rank in range(self.num_ranks)])


def end_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel to send this process ``signum`` when its parent dies.

    torchrun gives each rank a session of its own, so a torchrun that is killed would leave its
    ranks waiting for each other. Linux only, and does nothing elsewhere.
    """
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
