"""What checkpoints cost in bytes: a second save of a mostly frozen model, a load by other ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoint_own import settle
from harness import MIB, Report

import forebay
from forebay_server.testing.daemon import DaemonProcess

FROZEN_BYTES = 144 * MIB
ADAPTER_BYTES = 8 * MIB
"""Of each of two; AdamW has two moments for them."""

SHARD_BYTES = 64 * MIB
SAVING_RANKS, LOADING_RANKS = 2, 8
CUTS = {"rows": 0, "columns": 1}

HERE = Path(__file__).resolve().parent


class Adapted(torch.nn.Module):
    """A frozen base with two adapters."""

    def __init__(self) -> None:
        super().__init__()
        rows = 1024
        self.base = torch.nn.ParameterList(
            torch.nn.Parameter(
                torch.randn(rows, FROZEN_BYTES // 6 // 4 // rows), requires_grad=False
            )
            for _ in range(6)
        )
        self.adapters = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(rows, ADAPTER_BYTES // 4 // rows)) for _ in range(2)
        )


def tier_bytes(data: Path) -> int:
    """In the files of the ssd tier."""
    return sum(path.stat().st_size for path in (data / "ssd").rglob("*") if path.is_file())


def measure_frozen(folder: Path, report: Report) -> None:
    """Two saves, between which only the adapters and their moments change."""
    model = Adapted()
    optimizer = torch.optim.AdamW(model.adapters.parameters(), fused=True)

    def change() -> int:
        for adapter in model.adapters:
            adapter.grad = torch.randn_like(adapter)
        optimizer.step()
        return sum(3 * adapter.nbytes for adapter in model.adapters)

    changed = change()
    with (
        DaemonProcess(folder / "data", "--object-url", "none", "--hdd-path", "none") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, "frozen", model=model, optimizer=optimizer) as checkpointer,
    ):
        checkpointer.save(1).wait("local", timeout=60)
        before = tier_bytes(daemon.data)
        change()
        checkpointer.save(2).wait("local", timeout=60)
        added = tier_bytes(daemon.data) - before
    report.ratio("frozen_second_save_bytes", [added / changed], at_most=1.05)


def ranks(do: str, num_ranks: int, **what: Any) -> list[dict[str, Any]]:
    """What each of *num_ranks* fresh processes answers."""
    command = [sys.executable, str(HERE / "checkpoint_ranks.py"), do, str(num_ranks)]
    done = subprocess.run(
        [*command, json.dumps(what)], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{do} by {num_ranks} ranks failed:\n{done.stderr[-4000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_reshard(folder: Path, report: Report) -> None:
    """Tensors cut by rows and by columns, each loaded by more ranks, cold."""
    daemon = DaemonProcess(
        folder / "data",
        *("--object-url", "none", "--hdd-path", "none", "--ram-bytes", str(8 * SHARD_BYTES)),
    )
    with daemon:
        for cut, dimension in CUTS.items():
            where = {"address": daemon.address()["rpc"], "run": cut, "dimension": dimension}
            ranks("save_sharded", SAVING_RANKS, **where, shard_bytes=SHARD_BYTES)
        with forebay.connect(daemon.address()["rpc"]) as client:
            settle(client)
        daemon.terminate()  # what it has in memory goes
        daemon.start().wait_ready()
        for cut, dimension in CUTS.items():
            where = {"address": daemon.address()["rpc"], "run": cut, "dimension": dimension}
            where |= {"data": str(daemon.data), "daemon": daemon.pid}
            num_bytes = SAVING_RANKS * SHARD_BYTES
            loaded = ranks("load_sharded", LOADING_RANKS, **where, num_bytes=num_bytes)
            needed = sum(one["needed_bytes"] for one in loaded)
            read = sum(one["disk_bytes"] for one in loaded)
            asked = sum(one["asked_bytes"] for one in loaded)
            report.value(f"reshard_{cut}_asked_amplification", [asked / needed])
            report.ratio("reshard_node_read_amplification", [read / needed], at_most=1.1)
