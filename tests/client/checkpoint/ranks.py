"""What each rank of a test's job does: run as a program, once per rank, by test_ranks.py.

    python ranks.py SCENARIO RANK SIZE INIT_FILE DATA_FOLDER SCRATCH_FOLDER

Exits with 0 if everything held. Starting processes is dear, so a job walks through many cases.
"""

from __future__ import annotations

import faulthandler
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks_common import (
    HANG_SECONDS,
    Holder,
    Model,
    World,
    assert_same,
    assert_same_parts,
    fsdp,
    raised,
    raw_tensors,
    sharded,
    trained,
    whole_state,
)
from ranks_overlapped import overlapped, overlapped_error
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import forebay
from forebay.checkpoint import StorageReader, StorageWriter
from forebay.checkpoint.group import Ranks
from forebay.checkpoint.service import CheckpointService


def reshard(world: World) -> None:
    """Saved by 4 ranks under FSDP2, loaded by 1, 2, 3, 4 and 6."""
    reference = world.scratch / "reference.pt"
    for size in (4, 1, 2, 3, 6):
        world.group(size)
    mesh = world.mesh(4)
    with world.among(4) as takes_part:
        if takes_part:
            model = fsdp(Model(1), mesh)
            optimizer = trained(model)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 5])
            saver = world.checkpointer(
                "reshard", 4, model=model, optimizer=optimizer, scheduler=scheduler
            )
            state = {"raw": sharded(raw_tensors(), mesh), "note": (1, "two")}
            expected = whole_state(model, optimizer)
            for step in (1, 2):  # the second one reuses the plan
                saver.save(step, metrics={"accuracy": 0.5}, state=state).wait("local")
            assert_same(whole_state(model, optimizer), expected, "saving changes nothing")
            if world.rank == 0:
                torch.save(expected, reference)
            saver.close()
    expected = torch.load(reference, weights_only=True)
    for size in (1, 2, 3, 4, 6):
        mesh = world.mesh(size)
        with world.among(size) as takes_part:
            if takes_part:
                _load_reshard(world, size, mesh, expected)


def _load_reshard(
    world: World, size: int, mesh: DeviceMesh | None, expected: dict[str, Any]
) -> None:
    model = fsdp(Model(2), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    loader = world.checkpointer(
        "reshard", size, model=model, optimizer=optimizer, scheduler=scheduler
    )
    zeros = {
        name: torch.zeros(tensor.shape, dtype=torch.uint8).to(tensor.dtype)
        for name, tensor in raw_tensors().items()
    }
    resumed = loader.restore(state={"raw": sharded(zeros, mesh)})
    assert resumed is not None
    assert (resumed.step, resumed.metrics) == (2, {"accuracy": 0.5})
    assert resumed.state["note"] == (1, "two")
    assert_same(whole_state(model, optimizer), expected, f"loaded by {size}")
    assert_same_parts(resumed.state["raw"], raw_tensors(), mesh)
    assert scheduler.milestones == {1: 1, 5: 1}
    loader.close()


def wrappers(world: World) -> None:
    """DDP to plain, plain to FSDP2, FSDP2 back to DDP; each goes on training the same."""
    plain = Model(3)
    reference = whole_state(plain, trained(plain))
    for size in (2, 1, 3):
        world.group(size)
    with world.among(2) as takes_part:
        if takes_part:
            model = DistributedDataParallel(
                Model(3), process_group=world.group(2), find_unused_parameters=True
            )
            with world.checkpointer("wrappers", 2, model=model, optimizer=trained(model)) as saver:
                saver.save(1).wait("local")
    for step, size in ((1, 1), (2, 3), (3, 2)):
        mesh = world.mesh(3) if size == 3 else None
        with world.among(size) as takes_part:
            if takes_part:
                model: Any = fsdp(Model(4), mesh)
                if size == 2:
                    model = DistributedDataParallel(model, process_group=world.group(2))
                optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
                with world.checkpointer(
                    "wrappers", size, model=model, optimizer=optimizer
                ) as checkpointer:
                    resumed = checkpointer.restore()
                    assert resumed is not None
                    assert resumed.step == step
                    assert_same(whole_state(model, optimizer), reference, f"on {size} ranks")
                    checkpointer.save(step + 1).wait("local")


def errors(world: World) -> None:
    """One rank's error is every rank's, nothing hangs, and the next save works."""
    size, rank = world.size, world.rank
    everyone = list(range(size))
    holder = Holder(1)
    checkpointer = world.checkpointer("errors", size, holder=holder)
    assert checkpointer.restore(missing_ok=True) is None
    messages = []

    holder.value = object() if rank == 1 else 1
    messages.append(raised(lambda: checkpointer.save(1), forebay.UnsupportedObject))
    assert "holder.value: <class 'object'>" in messages[-1]
    assert "rank 1 failed" in messages[-1]

    holder.value = OSError("my own disk") if rank == 2 % size else 1
    messages.append(raised(lambda: checkpointer.save(1), forebay.ForebayError))
    assert "OSError: my own disk" in messages[-1]

    holder.value = 1
    messages.append(raised(lambda: checkpointer.save(1 + rank), forebay.InvalidRequest))
    assert "rank 0: 1, rank 1: 2" in messages[-1]

    checkpointer.save(1).wait("local")
    messages.append(raised(lambda: checkpointer.save(1), forebay.AlreadyExists))
    messages.append(raised(lambda: checkpointer.restore("77"), forebay.NotFound))
    which = "latest" if rank == 0 else "99"
    messages.append(raised(lambda: checkpointer.restore(which), forebay.InvalidRequest))
    assert "rank 0: latest local, rank 1: 99 local" in messages[-1]

    holder.value = 2
    checkpointer.save(2).wait("local")
    other = world.checkpointer("errors", size, holder=holder, more=Holder(0))
    messages.append(raised(other.restore, forebay.InvalidRequest))
    assert "more: it is here and was not saved" in messages[-1]

    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, messages)
    assert all(gathered[one] == messages for one in everyone), gathered

    resumed = checkpointer.restore("1")
    assert resumed is not None
    assert (resumed.step, holder.value) == (1, 1)
    checkpointer.save(2).wait("local")
    other.close()
    checkpointer.close()


def lost_answer(world: World) -> None:
    """One rank hears nothing of its seal: saved on all ranks if all have sealed, else on none."""
    checkpointer = world.checkpointer("silent", world.size, holder=Holder(torch.ones(10)))
    real = CheckpointService.seal_pack

    def seal_pack(self: CheckpointService, request: Any) -> bool:
        CheckpointService.seal_pack = real  # type: ignore[method-assign]
        if is_sealed:
            real(self, request)
        raise forebay.DeadlineExceeded("no answer")

    for step, is_sealed in ((1, True), (2, False)):
        if world.rank == world.size - 1:
            CheckpointService.seal_pack = seal_pack  # type: ignore[method-assign]
        if is_sealed:
            checkpointer.save(step).wait("local")
        else:
            assert "no answer" in raised(lambda: checkpointer.save(2), forebay.DeadlineExceeded)
    checkpointer.save(2).wait("local")
    checkpointer.close()


def lost_rank(world: World) -> None:
    """A rank that dies in the middle of a save is an error for the others, not a hang."""
    checkpointer = world.checkpointer("lost", world.size, holder=Holder(torch.ones(10)))
    checkpointer.save(1).wait("local")
    message = raised(lambda: checkpointer.save(2), forebay.DeadlineExceeded)
    assert "another rank did not answer" in message


def lost_before_asking(world: World) -> None:
    """A rank that dies before it asks how to save is named to the others."""
    checkpointer = world.checkpointer("early", world.size, holder=Holder(torch.ones(10)))
    checkpointer.save(1).wait("local")
    message = raised(lambda: checkpointer.save(2), forebay.DeadlineExceeded)
    assert f"rank {world.size - 1} did not come in time" in message
    assert [one.step for one in world.client.checkpoints("early")] == [1]


def torch_functions(world: World) -> None:
    """``dcp.save`` and ``dcp.load`` with our writer and reader, rows to columns."""
    mesh = DeviceMesh("cpu", list(range(world.size)))
    expected = torch.arange(35.0).reshape(7, 5)
    state = {"w": distribute_tensor(expected, mesh, [Shard(0)]), "extra": {"step": (3, "x")}}
    dcp.save(state, storage_writer=StorageWriter(world.client, "torch", 1))
    zeros = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)])
    found: dict[str, Any] = {"w": zeros, "extra": {"step": None}}
    dcp.load(found, storage_reader=StorageReader(world.client, "torch"))
    assert torch.equal(found["w"].full_tensor(), expected)
    assert found["extra"] == {"step": (3, "x")}


def restart(world: World) -> None:
    """The daemon dies while it lands the ranks' packs; they give them to the next one again."""
    # Replicated tensors are dealt out by size: each rank has one.
    checkpointer = world.checkpointer("restart", world.size, model=torch.nn.Linear(300, 300))
    checkpointer.save(1).wait("local", 80)
    assert checkpointer.restore().step == 1  # type: ignore[union-attr]
    checkpointer.close()


def replicated(world: World) -> None:
    """Replicated tensors are spread over the ranks, objects and buffers come from rank 0."""
    model = Model(6)
    model.count += world.rank
    holder = Holder(world.rank)
    checkpointer = world.checkpointer("replicated", world.size, model=model, holder=holder)
    saved = checkpointer.save(1, metrics={"rank": world.rank, "nan": float("nan")})
    saved.wait("local")
    generation = world.client.checkpoints("replicated")[0]
    from forebay_wire.manifest import GenerationManifest, parse

    manifest = parse(world.client.read_manifest(generation.manifest), "test")
    assert isinstance(manifest, GenerationManifest)
    held = [{t["name"] for t in pack.description["tensors"]} for pack in manifest.packs]
    assert all(held), "every rank saves something"
    assert sum(map(len, held)) == len(set.union(*held)) == len(model.state_dict())
    assert {"model.count", "model.mask", "model.empty"} <= held[0]
    assert manifest.metrics == {"rank": 0.0}
    resumed = checkpointer.restore()
    assert resumed is not None
    assert int(model.count) == 0
    assert holder.value == 0
    checkpointer.close()


def late_state(world: World) -> None:
    """A rank whose state comes later than the others' has all ranks plan, and none wait."""
    rank, last = world.rank, world.size - 1
    mine: dict[str, Any] = {"a": torch.full((100,), float(rank))}
    checkpointer = world.checkpointer("late", world.size, holder=Holder({}))
    names = [("base",), ("base",), ("base", "late"), ("base", "late")]
    for step, found in enumerate(names, 1):
        state = {f"{rank}-{name}": mine["a"] + step for name in found if name == "base"}
        if "late" in found and rank == last:
            state["late"] = torch.full((9,), float(step))
        checkpointer.save(step, state=state).wait("local")
    # New, reused, new for all as the last rank looks different, reused.
    assert planned(checkpointer) == (2, 2), planned(checkpointer)
    resumed = checkpointer.restore()
    assert resumed is not None
    assert torch.equal(resumed.state["late"], torch.full((9,), 4.0))
    for one in range(world.size):
        assert torch.equal(resumed.state[f"{one}-base"], torch.full((100,), float(one + 4)))
    # A new attempt; then a dtype that changes on one rank, of the same size and shape.
    dtypes = {11: torch.float32, 12: torch.float32, 13: torch.int32, 14: torch.int32}
    for step, dtype in dtypes.items():
        value = torch.arange(5).to(dtype if rank == 0 else torch.float32)
        checkpointer.save(step, state={f"{rank}": value}).wait("local")
    assert planned(checkpointer) == (4, 4), planned(checkpointer)
    attempt = checkpointer.attempt
    for step, dtype in dtypes.items():
        resumed = checkpointer.restore(f"{attempt}/{step}")
        assert resumed is not None
        assert resumed.state["0"].dtype == dtype
        assert resumed.state["1"].dtype == torch.float32
    checkpointer.close()


def planned(checkpointer: forebay.Checkpointer) -> tuple[int, int]:
    """Saves that were planned, and that reused the plan."""
    report = checkpointer.report()
    return report.num_planned, report.num_reused


def restarted_plan(world: World) -> None:
    """A daemon that restarted knows no plan: all ranks make one, and then reuse it again."""
    checkpointer = world.checkpointer("restarted", world.size, model=Model(1))
    for step in (1, 2):
        checkpointer.save(step).wait("local")
    assert planned(checkpointer) == (1, 1)
    dist.barrier()
    if world.rank == 0:
        (world.scratch / "restart").touch()
    while not (world.scratch / "restarted").exists():
        time.sleep(0.05)
    for step in (3, 4):
        checkpointer.save(step).wait("local")
    assert planned(checkpointer) == (2, 2)
    checkpointer.close()


def steady(world: World) -> None:
    """What a save costs in calls while the plan is reused."""
    checkpointer = world.checkpointer("steady", world.size, model=Model(1))
    checkpointer.save(1).wait("local")
    calls: list[str] = []
    real_all, real_begin = Ranks._all, CheckpointService.begin_pack
    real_seal = CheckpointService.seal_pack

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        return call

    Ranks._all = counted("exchange", real_all)  # type: ignore[method-assign]
    CheckpointService.begin_pack = counted("begin", real_begin)  # type: ignore[method-assign]
    CheckpointService.seal_pack = counted("seal", real_seal)  # type: ignore[method-assign]
    checkpointer.save(2)
    Ranks._all = real_all  # type: ignore[method-assign]
    CheckpointService.begin_pack = real_begin  # type: ignore[method-assign]
    CheckpointService.seal_pack = real_seal  # type: ignore[method-assign]
    assert calls == ["begin", "seal", "exchange"]
    checkpointer.close()


def balanced(world: World) -> None:
    """Replicated tensors weigh about the same on all ranks; names of one memory stay together."""
    sizes = [900_000, 500_000, 400_000, 400_000, 300_000, 300_000, 200_000, *[10_000] * 20]
    holder = torch.nn.ParameterList(torch.randn(size // 4) for size in sizes)
    holder.append(holder[0])
    saved = world.checkpointer("balanced", world.size, model=holder).save(1)
    loads: list[Any] = [None] * world.size
    dist.all_gather_object(loads, saved.num_bytes)
    even = sum(sizes) / world.size
    assert sum(loads) < 1.01 * sum(sizes), loads  # the first one once
    assert max(loads) < 1.25 * max(even, 900_000), loads
    assert min(loads) > 0.75 * even, loads


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        reshard,
        wrappers,
        errors,
        lost_answer,
        lost_rank,
        lost_before_asking,
        restart,
        replicated,
        torch_functions,
        late_state,
        restarted_plan,
        steady,
        balanced,
        overlapped,
        overlapped_error,
    )
}


def main() -> None:
    warnings.simplefilter("error")
    names, rank, size, init_file, data, scratch = sys.argv[1:]
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=int(rank), world_size=int(size)
    )
    world = World(int(rank), int(size), data, Path(scratch))
    for name in names.split(","):
        SCENARIOS[name](world)
    world.client.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
