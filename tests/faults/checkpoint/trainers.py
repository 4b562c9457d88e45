"""Forks trainers, so that each starts in no time; run as a program, told what to do by lines.

``{"fork": {...}}`` starts one and answers its process id, ``{"wait": PID}`` answers how it ended. A
trainer restores the newest generation of its run and saves the next step; what came of it is
written to ``result``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import forebay
from forebay_wire import failpoints

TIMEOUT_SECONDS = 40.0


def state_at(step: int, num_values: int = 60_000) -> dict[str, Any]:
    """What is saved at *step*, whole: known to whoever checks it."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(num_values // 50, 50, generator=generator),
        "bias": torch.randn(700, generator=generator).bfloat16(),
        "frozen": torch.arange(80_000, dtype=torch.int32),
        "step": step,
    }


def mine(step: int, rank: int, num_ranks: int) -> dict[str, Any]:
    """The part of a rank: its rows of the weight, beside what all have."""
    state = state_at(step)
    if num_ranks > 1:
        mesh = init_device_mesh("cpu", (num_ranks,))
        rows = state["weight"].chunk(num_ranks)[rank].clone()
        state["weight"] = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
    return state


def train(
    address: str, run: str, step: int, rank: int, num_ranks: int, meet: str, durability: str
) -> None:
    if num_ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=num_ranks
        )
    state = mine(step, rank, num_ranks)
    with (
        forebay.connect(address) as client,
        forebay.Checkpointer(client, run, timeout=TIMEOUT_SECONDS) as checkpointer,
    ):
        resumed = checkpointer.restore("latest", state={"weight": state["weight"]})
        assert resumed is not None
        assert resumed.step < step
        state = mine(step, rank, num_ranks)  # the restored values lie in the other one's tensor
        checkpointer.save(step, state=state).wait(durability, timeout=TIMEOUT_SECONDS)


def child(what: dict[str, Any]) -> None:
    """In the forked process: never returns."""
    failpoints.arm(what.pop("failpoints"))
    result, status = Path(what.pop("result")), 1
    torch.set_num_threads(1)
    try:
        train(**what)
        result.write_text("saved")
        status = 0
    except forebay.ForebayError as error:
        result.write_text(f"{type(error).__name__}: {error}")
        status = 3
    except BaseException:  # noqa: BLE001 - the end of the process
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    for line in sys.stdin:
        told = json.loads(line)
        if "wait" in told:
            answer = os.waitstatus_to_exitcode(os.waitpid(told["wait"], 0)[1])
        elif not (answer := os.fork()):
            child(told["fork"])
        print(answer, flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
