"""The ranks of this run: which part each one has, in one mesh, and what they add up together.

The mesh has four dimensions, each of any size: pipeline ``stage``, ``replica`` (equal weights),
``shard`` (weights cut, FSDP2), ``tensor`` (matrices cut). Ranks that differ in replica or shard
read different samples; those of one tensor group, and the stages of one pipeline, read the same.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Final, Literal, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore

from forebay_trainer import meeting
from forebay_trainer.compression.config import CompressionConfig
from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest
from forebay_wire.meeting import meet

PR_SET_PDEATHSIG: Final = 1

DIMENSIONS: Final = ("stage", "replica", "shard", "tensor")


@dataclass(frozen=True)
class Shape:
    """Sizes of the mesh's dimensions."""

    stages: int = 1
    replicas: int = 1
    shards: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.stages, self.replicas, self.shards, self.tensor

    @property
    def num_data(self) -> int:
        """Into how many parts a global batch is cut."""
        return self.replicas * self.shards

    @property
    def is_sharded(self) -> bool:
        """Whether weights are kept by FSDP2. With replicas of a tensor group too: DDP knows no
        tensors that are cut."""
        return self.shards > 1 or (self.tensor > 1 and self.replicas > 1)

    def __str__(self) -> str:
        kinds = {
            "pipeline": self.stages,
            "HSDP" if self.is_sharded and self.shards > 1 else "DDP": self.replicas,
            "FSDP2": self.shards,
            "TP": self.tensor,
        }
        return " x ".join(f"{kind} {size}" for kind, size in kinds.items() if size > 1) or "alone"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    backend: Literal["auto", "gloo", "nccl"] = setting(
        "auto", "collectives; auto: nccl where there is a GPU, else gloo"
    )
    timeout_seconds: float = setting(300.0, "how long a collective waits for the other ranks")
    num_replicas: int = setting(
        0, "groups of ranks with equal weights (DDP; with shards: HSDP); 0: as many as are left"
    )
    num_shards: int = setting(1, "ranks that share the weights (FSDP2); 0: as many as are left")
    num_tensor: int = setting(1, "ranks that share each matrix (tensor parallelism)")
    num_stages: int = setting(1, "stages of a pipeline")
    num_microbatches: int = setting(4, "of a pipeline: pieces of a batch that are under way")
    compression: CompressionConfig = field(default_factory=CompressionConfig)

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0:
            raise InvalidRequest(f"timeout_seconds must be above 0, not {self.timeout_seconds}")
        for name, least in (("num_replicas", 0), ("num_shards", 0), ("num_tensor", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("num_stages", "num_microbatches"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")

    def shape(self, num_ranks: int) -> Shape:
        """The mesh on so many ranks, or InvalidRequest if they cannot make it up."""
        replicas, shards = self.num_replicas, self.num_shards
        fixed = self.num_stages * self.num_tensor * max(1, replicas) * max(1, shards)
        if shards == 0:
            shards, replicas = max(1, num_ranks // fixed), max(1, replicas)
        elif replicas == 0:
            replicas = max(1, num_ranks // fixed)
        found = Shape(self.num_stages, replicas, shards, self.num_tensor)
        if math.prod(found.sizes) != num_ranks:
            raise InvalidRequest(
                f"parallel: {found.stages} stages x {found.replicas} replicas x {found.shards} "
                f"shards x {found.tensor} tensor make {math.prod(found.sizes)} ranks, and "
                f"{num_ranks} run: change the keys, or torchrun --nproc-per-node"
            )
        self.compression.check(**asdict(found))
        return found

    def build(self) -> Parallel:
        """This process's place as torchrun says it; without torchrun the only rank."""
        use_cuda = torch.cuda.is_available() and self.backend != "gloo"
        backend = ("nccl" if use_cuda else "gloo") if self.backend == "auto" else self.backend
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        return Parallel(
            rank=int(os.environ.get("RANK", "0")),
            shape=self.shape(num_ranks),
            device=torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"),
            backend=backend,
            timeout_seconds=self.timeout_seconds,
        )


class Parallel:
    """A context manager around the process group; used from the thread that trains."""

    def __init__(
        self,
        *,
        rank: int,
        shape: Shape,
        device: torch.device,
        backend: str,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.num_ranks = math.prod(shape.sizes)
        self.shape = shape
        self.device = device
        self.mesh: DeviceMesh | None = None
        """None where there is one rank."""
        self.ranks: DeviceMesh | None = None
        """All ranks in one line."""
        self.start = ""
        """A name of this start of all ranks, never used before."""
        self._backend = backend
        self._timeout = timedelta(seconds=timeout_seconds)
        self.stage, rest = divmod(rank, self.num_ranks // shape.stages)
        self.data_rank, self.tensor_rank = divmod(rest, shape.tensor)

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()
        if self.num_ranks > 1:
            store = meeting.open_store(self.rank, self._timeout)
            own = PrefixStore("forebay", store)
            self.start = meet(own, self.rank, self.num_ranks, self._timeout)
            dist.init_process_group(
                self._backend,
                store=meeting.part_of(store, self.start),
                rank=self.rank,
                world_size=self.num_ranks,
                timeout=self._timeout,
            )
            kind = self.device.type
            self.mesh = init_device_mesh(kind, self.shape.sizes, mesh_dim_names=DIMENSIONS)
            self.ranks = init_device_mesh(kind, (self.num_ranks,), mesh_dim_names=("rank",))
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
        """True on the one rank that writes for all."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """True on one rank of all that read the same samples: the one that has their loss."""
        return self.tensor_rank == 0 and self.stage == self.shape.stages - 1

    @property
    def num_alike(self) -> int:
        """How many ranks read the same samples."""
        return self.shape.stages * self.shape.tensor

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of the values over all ranks, in float64; a collective."""
        if self.num_ranks == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def sum_parts(self, values: Sequence[float]) -> list[float]:
        """The sums over the parts of the global batch: each counts once, as the rank that `speaks`
        for it has it; a collective."""
        return self.sum([value if self.speaks else 0.0 for value in values])

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, however many each one has, in order of rank; a collective."""
        if self.num_ranks == 1:
            return [list(values)]
        longest = torch.tensor(len(values), device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        mine = torch.zeros(int(longest) + 1, dtype=torch.int64, device=self.device)
        mine[0] = len(values)
        mine[1 : len(values) + 1] = torch.tensor(values, dtype=torch.int64)
        rows = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(rows, mine)
        return [row[1 : int(row[0]) + 1].tolist() for row in rows]


def end_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel to send this process ``signum`` when its parent dies.

    torchrun gives each rank a session of its own, so a torchrun that is killed would leave its
    ranks waiting for each other. Linux only, and does nothing elsewhere.
    """
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
