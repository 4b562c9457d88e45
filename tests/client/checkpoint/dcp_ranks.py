"""One rank of a pool that walks through torch's distributed checkpoint functions, job after job.

    python dcp_ranks.py

Reads jobs as lines of JSON (scenario, rank, size, init_file, address, arguments), answers each with
one line. A job is a world of its own: starting processes is dear, forming a world is not.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import forebay
from forebay.checkpoint import StorageReader, StorageWriter

HANG_SECONDS = 100.0
RESULT = "RESULT "

Json = Any


def whole_of(spec: Json) -> torch.Tensor:
    """The same values on every rank: all bit patterns that the dtype has, NaNs among them."""
    dtype = getattr(torch, spec["dtype"])
    shape = spec["shape"]
    generator = torch.Generator().manual_seed(spec["seed"])
    high = 2 if dtype is torch.bool else 256
    count = prod(shape) * dtype.itemsize
    raw = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Equal values with other strides."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps" and tensor.dim():
        room = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
        room[..., 0].copy_(tensor)
        return room[..., 0]
    return tensor.clone(memory_format=torch.contiguous_format)


def placements_of(texts: list[str]) -> list[Any]:
    return [Replicate() if text == "R" else Shard(int(text[1:])) for text in texts]


def held(spec: Json, how: Json, mesh: DeviceMesh | None, filled: bool) -> torch.Tensor:
    """The tensor of *spec* as this rank holds it, its values or others."""
    whole = whole_of(spec)
    if mesh is None or how["placements"] is None:
        return laid_out(whole if filled else torch.zeros_like(whole), how["layout"])
    placements = placements_of(how["placements"])
    shape, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    local = whole
    for dimension, (offset, length) in enumerate(zip(offsets, shape, strict=True)):
        local = local.narrow(dimension, min(offset, whole.shape[dimension]), length)
    local = laid_out(local if filled else torch.zeros_like(local), how["layout"])
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def bits(tensor: torch.Tensor) -> list[Any]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    data = local.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    data = data.view(torch.uint8).numpy().tobytes()
    return [str(local.dtype), list(local.shape), data]


def mesh_of(shape: list[int] | None) -> DeviceMesh | None:
    if not shape:
        return None
    return DeviceMesh("cpu", torch.arange(prod(shape)).reshape(shape))


class Job:
    def __init__(self, job: Json) -> None:
        self.rank, self.size = job["rank"], job["size"]
        self.client = forebay.connect(job["address"])
        self.arguments = job["arguments"]

    def state(self, filled: bool) -> dict[str, Any]:
        """As the arguments say: tensors by name, and a few values that are none."""
        a = self.arguments
        mesh = mesh_of(a["mesh"])
        state: dict[str, Any] = {
            spec["name"]: held(spec, how, mesh, filled)
            for spec, how in zip(a["tensors"], a["how"], strict=True)
        }
        state["more"] = {"step": 7 if filled else 0, "pair": (1, "x") if filled else None}
        return state


# ------------------------------------------------------------------------------------- scenarios


def save_both(job: Job) -> None:
    """The same state through us and through torch's files."""
    warnings.filterwarnings("ignore")
    state, a = job.state(True), job.arguments
    dcp.save(state, checkpoint_id=a["run"], storage_writer=StorageWriter(job.client))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(a["folder"], sync_files=False))


def load_both(job: Job) -> None:
    """Both come back bit for bit, whatever the ranks are now."""
    warnings.filterwarnings("ignore")
    a, expected = job.arguments, job.state(True)
    ours, theirs = job.state(False), job.state(False)
    dcp.load(ours, checkpoint_id=a["run"], storage_reader=StorageReader(job.client))
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(a["folder"]))
    for name in expected:
        if name == "more":
            assert ours[name] == theirs[name] == expected[name], (ours[name], theirs[name])
            continue
        assert bits(ours[name]) == bits(expected[name]), name
        assert bits(theirs[name]) == bits(ours[name]), f"{name}: torch's own differs"


class Faulty(StorageWriter):
    """Fails in one phase on one rank."""

    def __init__(self, client: forebay.Client, run: str, phase: str, here: bool) -> None:
        super().__init__(client, run, timeout=30.0)
        self.phase = phase if here else ""

    def _fail(self, phase: str) -> None:
        if self.phase == phase:
            raise ValueError(f"no {phase} today")

    def prepare_local_plan(self, plan: Any) -> Any:
        self._fail("prepare_local_plan")
        return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: Any) -> Any:
        self._fail("prepare_global_plan")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._fail("write_data")
        done = super().write_data(plan, planner)
        self._fail("write_data after the copy")
        if self.phase == "loses a result":
            done.value().pop()
        if self.phase == "says one twice":
            done.value().append(done.value()[0])
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        self._fail("finish")
        super().finish(metadata, results)


PHASES = {
    "prepare_local_plan": 1,
    "prepare_global_plan": 0,
    "write_data": 1,
    "write_data after the copy": 1,
    "loses a result": 1,
    "says one twice": 1,
    "finish": 0,
}


def sharded(job: Job, value: float, dimension: int = 0) -> DTensor:
    mesh = DeviceMesh("cpu", list(range(job.size)))
    whole = torch.full((job.size * 3, job.size * 2), value)
    local = whole.chunk(job.size, dimension)[job.rank].clone()
    return DTensor.from_local(local, mesh, [Shard(dimension)], run_check=False)


def faults(job: Job) -> None:
    """A save that fails on one rank fails on all of them and leaves what was there."""
    run = job.arguments["run"]
    dcp.save({"w": sharded(job, 1.0)}, storage_writer=StorageWriter(job.client, run))
    for phase, where in PHASES.items():
        writer = Faulty(job.client, run, phase, job.rank == where)
        with pytest.raises(CheckpointException) as caught:
            dcp.save({"w": sharded(job, 2.0)}, storage_writer=writer)
        expected = 0 if phase in ("loses a result", "says one twice") else where
        assert list(caught.value.failures) == [expected], (phase, caught.value)
        del caught
        dist.barrier()
        found = {"w": sharded(job, 0.0, 1)}
        dcp.load(found, storage_reader=StorageReader(job.client, run))
        assert found["w"].to_local().unique().tolist() == [1.0], phase
        dist.barrier()
        del writer
    dcp.save({"w": sharded(job, 3.0)}, storage_writer=StorageWriter(job.client, run))
    found = {"w": sharded(job, 0.0, 1)}
    dcp.load(found, storage_reader=StorageReader(job.client, run))
    assert found["w"].to_local().unique().tolist() == [3.0]
    states = [one.state for one in job.client.checkpoints(run)]
    assert states.count("committed") == 2, states
    assert "sealed" not in states, states


def separate(job: Job) -> None:
    """Without collectives each rank saves and loads a state of its own, under equal names."""
    run = job.arguments["run"]
    for value in (10.0, 20.0):
        mine = {"w": torch.full((5,), value + job.rank), "rank": job.rank}
        writer = StorageWriter(job.client, run, timeout=30.0)
        dcp.save(mine, storage_writer=writer, use_collectives=False)
    found = {"w": torch.zeros(5), "rank": -1}
    dcp.load(found, storage_reader=StorageReader(job.client, run))
    assert found["w"].tolist() == [20.0 + job.rank] * 5
    assert found["rank"] == job.rank


def asynchronous(job: Job) -> None:
    """async_save by a thread and by a process; the state changes right after the staging."""
    run, kind = job.arguments["run"], job.arguments["kind"]
    for value in (1.0, 2.0):
        state = {"w": sharded(job, value), "step": int(value)}
        done = dcp.async_save(
            state,
            checkpoint_id=run,
            storage_writer=StorageWriter(job.client, timeout=60.0),
            async_checkpointer_type=AsyncCheckpointerType[kind],
        )
        state["w"].to_local().fill_(-1.0)
        done.result()  # type: ignore[union-attr]
    found: dict[str, Any] = {"w": sharded(job, 0.0, 1), "step": 0}
    dcp.load(found, checkpoint_id=run, storage_reader=StorageReader(job.client))
    assert found["w"].to_local().unique().tolist() == [2.0]
    assert found["step"] == 2


def cached_plans(job: Job) -> None:
    """torch's planner keeps plans and forgets to compare dtypes: what is stored is right."""
    run = job.arguments["run"]
    for value, dtype in ((1.0, torch.float32), (2.0, torch.float32), (3.0, torch.bfloat16)):
        mesh = DeviceMesh("cpu", list(range(job.size)))
        local = torch.full((2, 3), value + job.rank, dtype=dtype)
        state = {"w": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, storage_writer=StorageWriter(job.client, run), planner=planner)
        reader = StorageReader(job.client, run)
        assert reader.read_metadata().state_dict_metadata["w"].properties.dtype is dtype
        zeros = DTensor.from_local(torch.zeros_like(local), mesh, [Shard(0)], run_check=False)
        dcp.load({"w": zeros}, storage_reader=reader)
        assert torch.equal(zeros.to_local(), local)


def local_value(tensor: DTensor) -> list[float]:
    return tensor.to_local().unique().tolist()


def damaged(job: Job) -> None:
    """One file of the newest generation is bad, which only rank 2 needs: all go back together.

    First they save, and the file is damaged; then, behind a restart of the daemon, whose memory has
    it still, they restore."""
    a = job.arguments
    mesh = DeviceMesh("cpu", list(range(job.size)))
    weight = DTensor.from_local(torch.zeros(150, 1000), mesh, [Shard(0)], run_check=False)
    checkpointer = forebay.Checkpointer(job.client, a["run"])
    if a["saves"]:
        for step in (1, 2):
            weight.to_local().fill_(a["base"] + 10.0 * step + job.rank)
            checkpointer.save(step, state={"weight": weight}).wait("local", 60)
        dist.barrier()
        pattern = torch.full((300,), a["base"] + 22.0).numpy().tobytes()
        if job.rank == 0:
            damage(Path(a["data"]), a["kind"], pattern)
        checkpointer.close()
        return
    found = checkpointer.restore("latest", state={"weight": weight})
    assert found is not None
    assert (found.attempt, found.step) == (1, 1)
    assert [(one.attempt, one.step) for one in found.skipped] == [(1, 2)]
    assert found.skipped[0].reason.startswith("rank 2: "), found.skipped
    assert local_value(found.state["weight"]) == [a["base"] + 10.0 + job.rank]
    assert checkpointer.attempt == 2
    reasons: list[Any] = [None] * job.size
    dist.all_gather_object(reasons, found.skipped[0].reason)
    assert len(set(reasons)) == 1, reasons
    weight.to_local().fill_(a["base"] + 30.0 + job.rank)
    checkpointer.save(2, state={"weight": weight}).wait("local", 60)
    found = checkpointer.restore("latest", state={"weight": weight})
    assert found is not None
    assert (found.attempt, found.step, found.skipped) == (2, 2, ())
    assert local_value(found.state["weight"]) == [a["base"] + 30.0 + job.rank]
    checkpointer.close()


def damage(folder: Path, kind: str, pattern: bytes) -> None:
    """Spoil the one file below *folder* that holds *pattern*."""
    holding = [
        path
        for path in folder.rglob("*")
        if path.is_file() and "catalog" not in path.name and pattern in path.read_bytes()
    ]
    assert len(holding) == 1, holding
    (path,) = holding
    path.chmod(0o600)
    data = path.read_bytes()
    if kind == "flipped":
        at = data.index(pattern) + 99
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif kind == "cut short":
        path.write_bytes(data[: data.index(pattern) + 99])
    else:
        path.unlink()


def resharded(job: Job) -> None:
    """Bytes that this rank had read from the disk while it restored, and bytes that it needed."""
    a = job.arguments
    mesh = DeviceMesh("cpu", list(range(job.size)))
    placement = Shard(a["dimension"])
    shape, _ = compute_local_shape_and_global_offset(torch.Size(a["shape"]), mesh, (placement,))
    weight = DTensor.from_local(
        torch.zeros(shape),
        mesh,
        [placement],
        run_check=False,
        shape=torch.Size(a["shape"]),
        stride=(a["shape"][1], 1),
    )
    checkpointer = forebay.Checkpointer(job.client, a["run"])
    if a["saves"]:
        generator = torch.Generator().manual_seed(job.rank)
        weight.to_local().random_(generator=generator)
        checkpointer.save(1, state={"weight": weight}).wait("local", 60)
    else:
        before = read_bytes()
        found = checkpointer.restore("latest", state={"weight": weight})
        assert found is not None
        name = f"{job.rank}-{a['dimension']}.json"
        needed = found.state["weight"].to_local().nbytes
        Path(a["folder"], name).write_text(json.dumps([read_bytes() - before, needed]))
    checkpointer.close()


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


SCENARIOS: dict[str, Callable[[Job], None]] = {
    scenario.__name__: scenario
    for scenario in (
        save_both,
        load_both,
        faults,
        separate,
        asynchronous,
        cached_plans,
        damaged,
        resharded,
    )
}


def run_job(line: str) -> str:
    job = json.loads(line)
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    started = time.monotonic()
    dist.init_process_group(
        "gloo", init_method=f"file://{job['init_file']}", rank=job["rank"], world_size=job["size"]
    )
    try:
        one = Job(job)
        try:
            SCENARIOS[job["scenario"]](one)
        finally:
            one.client.close()
        return ""
    except Exception:  # noqa: BLE001 - whatever it is, the test shows it
        return traceback.format_exc()
    finally:
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        sys.stderr.write(f"{job['scenario']}: {time.monotonic() - started:.2f} s\n")


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        failure = run_job(line)
        sys.stdout.write(f"{RESULT}{json.dumps(failure)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
