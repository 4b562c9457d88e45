"""The ranks of a distributed job for the checkpoints' benchmarks, forked by a child that does
nothing else; see ``children.py``."""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from checkpoint_own import settle
from raw_disk import disk_reads, drop_cached
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import forebay

Answer = dict[str, Any]


def cut(num_bytes: int, dimension: int, mesh: DeviceMesh) -> DTensor:
    """This rank's part of an int32 matrix of *num_bytes*, all zeros."""
    columns = 1 << int(math.log2(num_bytes // 4) / 2)
    sizes = [num_bytes // 4 // columns, columns]
    sizes[dimension] //= mesh.size()
    return DTensor.from_local(
        torch.zeros(sizes, dtype=torch.int32), mesh, [Shard(dimension)], run_check=False
    )


def numbers(tensor: DTensor, dimension: int) -> torch.Tensor:
    """What a rank's part has to hold: each element its place in the whole, so that no two pieces
    are equal and stored once."""
    columns = tensor.shape[1]
    local = tensor.to_local()
    first = [0, 0]
    first[dimension] = dist.get_rank() * local.shape[dimension]
    down = torch.arange(first[0], first[0] + local.shape[0], dtype=torch.int32)
    across = torch.arange(first[1], first[1] + local.shape[1], dtype=torch.int32)
    return down[:, None] * columns + across


def save_sharded(address: str, cuts: dict[str, int], shard_bytes: int) -> Answer:
    """A run for each of *cuts*, which name the dimension that is cut; then the daemon rests."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    with forebay.connect(address) as client:
        for run, dimension in cuts.items():
            tensor = cut(shard_bytes * mesh.size(), dimension, mesh)
            tensor.to_local().copy_(numbers(tensor, dimension))
            with forebay.Checkpointer(client, run) as checkpointer:
                checkpointer.save(1, state={"weight": tensor}).wait("local", timeout=120)
        settle(client)
    return {}


def load_sharded(
    address: str, cuts: dict[str, int], num_bytes: int, data: str, daemon: int
) -> Answer:
    """Cold loads: by cut what the ranks had the disk read; rank 0 adds what the *daemon* had."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    with forebay.connect(address) as client:
        return {
            run: load_cold(client, run, cut(num_bytes, dimension, mesh), dimension, data, daemon)
            for run, dimension in cuts.items()
        }


def load_cold(
    client: forebay.Client, run: str, tensor: DTensor, dimension: int, data: str, daemon: int
) -> Answer:
    with forebay.Checkpointer(client, run) as checkpointer:
        dist.barrier()
        if not dist.get_rank():
            drop_cached(Path(data))
        dist.barrier()
        before = disk_reads()
        serving = disk_reads(daemon)
        resumed = checkpointer.restore("latest", state={"weight": tensor})
        dist.barrier()
        if not dist.get_rank():
            before -= disk_reads(daemon) - serving
        assert resumed is not None
        found = resumed.state["weight"].to_local()
        assert torch.equal(found, numbers(tensor, dimension)), "not what was saved"
        return {
            "needed_bytes": found.nbytes,
            "asked_bytes": checkpointer.report().restored_bytes,
            "disk_bytes": disk_reads() - before,
        }


def save_many(address: str, run: str, rank_bytes: int, times: int) -> Answer:
    """Saves one after another, each until it is synced: seconds of each."""
    tensors = {
        f"part{number}": torch.randn(rank_bytes // 8 // 4).view(-1, 256) for number in range(8)
    }
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    state = {
        name: DTensor.from_local(one, mesh, [Shard(0)], run_check=False)
        for name, one in tensors.items()
    }
    seconds = []
    with forebay.connect(address) as client, forebay.Checkpointer(client, run) as checkpointer:
        for step in range(1, times + 1):
            torch._foreach_mul_(list(tensors.values()), 1.001)
            dist.barrier()
            start = time.perf_counter()
            checkpointer.save(step, state=state).wait("local", timeout=300)
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "num_bytes": sum(one.nbytes for one in tensors.values())}


def load_many(address: str, run: str, rank_bytes: int, times: int) -> Answer:
    """Loads of the saves of :func:`save_many`, each by a connection of its own: seconds of each."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    state = {
        f"part{number}": DTensor.from_local(
            torch.zeros(rank_bytes // 8 // 4).view(-1, 256), mesh, [Shard(0)], run_check=False
        )
        for number in range(8)
    }
    seconds = []
    for step in range(1, times + 1):
        with forebay.connect(address) as client, forebay.Checkpointer(client, run) as checkpointer:
            dist.barrier()
            start = time.perf_counter()
            checkpointer.restore(f"1/{step}", state=state)
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def _rank(
    rank: int, size: int, rendezvous: str, work: Callable[..., Answer], what: Answer, out: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    out.send(work(**what))
    dist.barrier()
    dist.destroy_process_group()


def run(work: Callable[..., Answer], size: int, what: Answer) -> list[Answer]:
    """What *work* answers on each of *size* forked ranks."""
    context = multiprocessing.get_context("fork")
    ends, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            arguments = (rank, size, os.path.join(folder, "meet"), work, what, there)
            processes.append(context.Process(target=_rank, args=arguments))
            processes[-1].start()
            there.close()
            ends.append(here)
        try:
            return [end.recv() for end in ends]
        finally:
            for process in processes:
                process.join()


WORK = {one.__name__: one for one in (save_sharded, load_sharded, save_many, load_many)}


class Ranks:
    """Answers the lines."""

    def run(self, work: str, size: int, what: Answer) -> Answer:
        """What each of *size* ranks answers."""
        return {"ranks": run(WORK[work], size, what)}


def make(name: str) -> Ranks:
    return Ranks()
