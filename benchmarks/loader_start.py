"""How long until a loader of 10^10 samples says which samples its first batch has?

The version is a real one, in the catalog of a real daemon, with 100,000 shards; of the shards there
are rows and no bytes, which is all that a loader needs to know its order. Each start is a process
of its own that opens the dataset and stands somewhere in the epoch; timed is what follows, from
``DataLoader(…)`` to the ids of the first batch, and by how much memory grows meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path

import psutil
from catalog import BLOB_BYTES, blob_id, fill
from harness import Options, Report
from sqlalchemy import Connection

import forebay
from forebay.dataset.schema import Schema
from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.queries_datasets import insert_version
from forebay_wire.ids import new_random_name
from forebay_wire.manifest import DatasetManifest, ShardRef

NUM_ROWS = 10**10
NUM_SHARDS = 100_000
DATASET = "immense"
SHUFFLES = ("full", "block")

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
print("ready", flush=True)
sys.stdin.readline()
before, start = resident(), time.perf_counter()
loader = forebay.DataLoader(dataset, **options)
loader.load_state_dict(state)
ids = next(iter(loader))["_ids"]
seconds, grown = time.perf_counter() - start, resident() - before
assert len(ids.unique()) == 256
print(json.dumps({"ms": seconds * 1e3, "mb": grown / 1e6}))
"""


async def make_version(path: Path) -> None:
    """The version, in the catalog of a daemon that does not run."""
    rows = NUM_ROWS // NUM_SHARDS
    shards = tuple(
        ShardRef(blob_id(number), BLOB_BYTES, rows, (rows,)) for number in range(NUM_SHARDS)
    )
    schema = base64.b64encode(arrow_schema()).decode()
    manifest = DatasetManifest(DATASET, 1, None, schema, shards)
    manifest_id, data = manifest.encode()

    def apply(connection: Connection) -> None:
        fill(connection, 0, NUM_SHARDS, only="blobs")
        insert_version(connection, manifest, manifest_id, data, new_random_name())

    catalog = await asyncio.to_thread(Catalog.open, sqlite_url(path), owner="benchmark")
    try:
        await catalog.write(apply)
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


class ImmenseDataset:
    """A daemon that serves the version from *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._client: forebay.Client | None = None

    def make(self) -> None:
        forebay.connect(self.folder).close()  # makes the folder and its tiers
        stop_daemon(self.folder)
        asyncio.run(make_version(self.folder / "catalog.sqlite"))
        self._client = forebay.connect(self.folder)
        self._client.dataset(DATASET)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def measure_start(report: Report, immense: ImmenseDataset, options: Options) -> None:
    """The figures ``start_ms_1e10`` and ``start_mb_1e10``: the worse of two shuffles."""
    found: dict[str, list[dict[str, float]]] = {shuffle: [] for shuffle in SHUFFLES}
    for _ in range(1 if options.quick else 7):
        begun = {shuffle: begin(immense.folder, shuffle) for shuffle in SHUFFLES}
        for process in begun.values():
            wait_ready(process)
        for shuffle, process in begun.items():  # each alone: the others wait
            found[shuffle].append(finish(process))
    for shuffle, ran in found.items():
        report.value("start_ms_1e10", [one["ms"] for one in ran], at_most=50)
        report.value("start_mb_1e10", [one["mb"] for one in ran], at_most=100)
        report.value(f"start_ms_1e10_{shuffle}", [one["ms"] for one in ran])


def begin(folder: Path, shuffle: str) -> subprocess.Popen[str]:
    """A process of its own that is about to start."""
    return subprocess.Popen(
        [sys.executable, "-c", _START, str(folder), shuffle],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_ready(process: subprocess.Popen[str]) -> None:
    """It has imported, connected and opened the dataset."""
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise RuntimeError("a start failed: see above")


def finish(process: subprocess.Popen[str]) -> dict[str, float]:
    """What one start took."""
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        found: dict[str, float] = json.loads(process.stdout.readline())
    return found
