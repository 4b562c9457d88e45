"""What checkpoints cost in bytes: a second save of a mostly frozen model, a load by other ranks."""

from __future__ import annotations

from pathlib import Path

from children import Family
from harness import MIB, Report

from forebay_server.testing.daemon import DaemonProcess

SHARD_BYTES = 64 * MIB
SAVING_RANKS, LOADING_RANKS = 2, 8
CUTS = {"rows": 0, "columns": 1}


def tier_bytes(data: Path) -> int:
    """In the files of the ssd tier."""
    return sum(path.stat().st_size for path in (data / "ssd").rglob("*") if path.is_file())


def measure_frozen(family: Family, daemon: DaemonProcess, report: Report) -> None:
    """Two saves, between which only the adapters and their moments change."""
    frozen = family["frozen"]
    frozen.ask("open", address=daemon.address()["rpc"])
    frozen.ask("save", step=1)
    before = tier_bytes(daemon.data)
    changed = frozen.ask("save", step=2)["changed_bytes"]
    added = tier_bytes(daemon.data) - before
    report.ratio("frozen_second_save_bytes", [added / changed], at_most=1.05)
    frozen.ask("close")


def save_sharded(family: Family, daemon: DaemonProcess) -> None:
    """Tensors cut by rows and by columns. What the daemon then has in memory has to go before
    :func:`measure_reshard`."""
    what = {"address": daemon.address()["rpc"], "cuts": CUTS, "shard_bytes": SHARD_BYTES}
    family["ranks"].ask("run", work="save_sharded", size=SAVING_RANKS, what=what)


def measure_reshard(family: Family, daemon: DaemonProcess, report: Report) -> None:
    """Each loaded by more ranks, cold."""
    what = {
        "address": daemon.address()["rpc"],
        "data": str(daemon.data),
        "daemon": daemon.pid,
        "cuts": CUTS,
        "num_bytes": SAVING_RANKS * SHARD_BYTES,
    }
    loaded = family["ranks"].ask("run", work="load_sharded", size=LOADING_RANKS, what=what)
    for cut in CUTS:
        ranks = [one[cut] for one in loaded["ranks"]]
        needed = sum(one["needed_bytes"] for one in ranks)
        read = sum(one["disk_bytes"] for one in ranks)
        asked = sum(one["asked_bytes"] for one in ranks)
        report.value(f"reshard_{cut}_asked_amplification", [asked / needed])
        report.ratio("reshard_node_read_amplification", [read / needed], at_most=1.1)
