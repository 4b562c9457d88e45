"""How long until a loader of 10^10 samples says which samples its first batch has?

The version is a real one, in the catalog of a real daemon, with 100,000 shards; of the shards there
are rows and no bytes, which is all that a loader needs to know its order. Each start is a process
of its own that opens the dataset and stands somewhere in the epoch; timed is what follows, from
``DataLoader(…)`` to the ids of the first batch, and by how much memory grows meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil
from catalog import UID, seal_all
from harness import Options, Report

import forebay
from forebay.dataset.schema import Schema
from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.shards import ShardCommit
from forebay_wire.ids import new_random_name

NUM_ROWS = 10**10
NUM_SHARDS = 100_000
SHARD_BYTES = 64 << 20
DATASET = "immense"

_START = """
import json, sys, time
import numpy as np
import forebay

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

client = forebay.connect(sys.argv[1])
dataset = client.dataset("immense")
position = int(np.random.default_rng().integers(0, dataset.num_rows - 10_000))
options = {"global_batch_size": 256, "columns": [], "include_ids": True, "shuffle": sys.argv[2]}
state = {**forebay.DataLoader(dataset, **options).state_dict(), "position": position}
dataset = client.dataset("immense")  # one that no loader has seen
before, start = resident(), time.perf_counter()
loader = forebay.DataLoader(dataset, **options)
loader.load_state_dict(state)
ids = next(iter(loader))["_ids"]
seconds, grown = time.perf_counter() - start, resident() - before
assert len(ids.unique()) == 256
print(json.dumps({"ms": seconds * 1e3, "mb": grown / 1e6}))
"""


class _Quiet:
    """The daemon's other parts, which a commit tells and does not wait for."""

    def committed(self, sessions: object) -> None:
        """The sessions have ended."""

    def wake(self) -> None:
        """There may be new work."""


async def make_version(path: Path) -> None:
    """The version, in the catalog of a daemon that does not run."""
    rows = NUM_ROWS // NUM_SHARDS
    shards = tuple(
        ShardCommit(new_random_name(), new_random_name() * 2, SHARD_BYTES, rows, (rows,))
        for _ in range(NUM_SHARDS)
    )
    catalog = await asyncio.to_thread(Catalog.open, sqlite_url(path), owner="benchmark")
    try:
        await catalog.write(lambda connection: seal_all(connection, shards))
        quiet = _Quiet()
        datasets = Datasets(catalog, quiet, quiet)  # type: ignore[arg-type]
        commit = VersionCommit(DATASET, 0, arrow_schema(), shards, new_random_name())
        await datasets.commit_version(commit, UID)
    finally:
        await asyncio.to_thread(catalog.close)


def arrow_schema() -> bytes:
    """Some columns, as the manifest holds them."""
    schema = Schema.of({"x": forebay.Array("uint8", (600,)), "y": "int64"})
    return bytes(schema.arrow.serialize().to_pybytes())


def stop_daemon(folder: Path) -> None:
    """End the daemon that serves *folder*, and wait for it."""
    daemon = psutil.Process(json.loads((folder / "daemon.json").read_text())["pid"])
    daemon.terminate()
    daemon.wait(timeout=30)


def measure_start(report: Report, folder: Path, options: Options) -> None:
    """The figures ``start_ms_1e10`` and ``start_mb_1e10``: the worse of two shuffles."""
    forebay.connect(folder).close()  # makes the folder and its tiers
    stop_daemon(folder)
    asyncio.run(make_version(folder / "catalog.sqlite"))
    client = forebay.connect(folder)
    client.dataset(DATASET)
    for shuffle in ("full", "block"):
        ran = [start_once(folder, shuffle) for _ in range(1 if options.quick else 7)]
        report.value("start_ms_1e10", [one["ms"] for one in ran], at_most=50)
        report.value("start_mb_1e10", [one["mb"] for one in ran], at_most=100)
        report.value(f"start_ms_1e10_{shuffle}", [one["ms"] for one in ran])
    client.close()


def start_once(folder: Path, shuffle: str) -> dict[str, float]:
    """One start, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _START, str(folder), shuffle],
        check=True,
        stdout=subprocess.PIPE,
        timeout=120,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found
