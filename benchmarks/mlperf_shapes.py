"""The loader under the loads of MLPerf Storage, scaled down: unofficial, for orientation only.

The data have the sizes, batches and accelerator times of that benchmark's training workloads
(unet3d, resnet50, cosmoflow, dlrm; v2.0 and the B200 configurations), fewer of them; the
accelerator is a sleep. *Utilisation* is the compute time over the time of the run, the first step
left out. Time and bytes are scaled by the same factor where one accelerator wants more than a
machine of two cores can move, so the demand in bytes per second that is printed is what was asked
of this machine, not what the published rules ask.

And its checkpoints of the 8B model: 8 ranks with an eighth of weights and optimizer state each
(13.1 GiB there), which all save and then, as fresh processes from cold files, all load, a number of
times; a save ends when it is synced. In the benchmark's form: the duration is that of the slowest
rank, the throughput that of the slowest rank over all of its saves or loads. Scaled down to
``CHECKPOINT_SCALE``, on as many cores as there are.

Nothing here is a result of MLPerf, nor verified by MLCommons.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from children import Family
from harness import Options, Phases, Report, parse_options
from raw_disk import drop_cached

import forebay
from forebay_server.testing.daemon import DaemonProcess


@dataclass(frozen=True)
class Shape:
    """One workload, for one accelerator."""

    name: str
    sample_bytes: int
    spread_bytes: int
    """Standard deviation of the sizes; 0: all alike."""
    batch: int
    step_seconds: float
    """Of the accelerator."""
    num_samples: int
    at_least: float
    """The utilisation that the benchmark wants."""
    columns: tuple[int, int] = (1, 1)
    """How many there are, and how many are read."""

    @property
    def wanted_bytes_per_second(self) -> float:
        share = self.columns[1] / self.columns[0]
        return self.batch * self.sample_bytes * share / self.step_seconds


CHECKPOINT_RANKS = 8
CHECKPOINT_RANK_BYTES = 105 * 2**30 // CHECKPOINT_RANKS
CHECKPOINT_SCALE = {False: 1 / 100, True: 1 / 400}
"""Quickly or not: of the bytes of each rank."""

PART_BYTES = 8 * 256 * 4
"""A rank's state is eight matrices of float32, 256 columns wide."""

CHECKPOINT_TIMES = {False: 10, True: 3}

SHAPES = (
    # a fifth of an A100: volumes of 146.6 MB, 7 a step of 0.636 s; here 29.3 MB
    Shape("unet3d", 29_320_126, 13_668_362, 7, 0.636, 42, 0.90),
    # an H100: 114,660 bytes, 400 a step of 0.224 s
    Shape("resnet50", 114_660, 0, 400, 0.224, 6_000, 0.90),
    # an A100: 2.83 MB, one a step of 5.5 ms
    Shape("cosmoflow", 2_828_486, 71_311, 1, 0.00551, 300, 0.70),
    # a twentieth of a B200: 761 bytes in 200 columns of which 40 are read, 16,384 a step
    Shape("dlrm", 800, 0, 16_384, 0.0075, 16_384 * 20, 0.70, (200, 40)),
)


def write(client: forebay.Client, shape: Shape) -> None:
    """The samples of *shape*: bytes, or numbers in many columns."""
    rng = np.random.default_rng(3)
    if shape.columns[0] > 1:
        names = [f"f{number}" for number in range(shape.columns[0])]
        schema = pa.schema({name: pa.float32() for name in names})
        with client.create_dataset(shape.name, schema) as writer:
            rows = shape.num_samples // 10
            for _ in range(10):
                values = [pa.array(rng.random(rows, dtype=np.float32)) for _ in names]
                writer.write_table(pa.table(values, schema=schema))
        return
    noise = rng.bytes(2 * shape.sample_bytes + 8 * shape.spread_bytes)
    options = {"shard_bytes": 256 << 20, "batch_bytes": 4 << 20}
    fixed = {"x": forebay.Array("uint8", (shape.sample_bytes,))}
    with client.create_dataset(
        shape.name, {"x": "binary"} if shape.spread_bytes else fixed, **options
    ) as writer:
        for _ in range(shape.num_samples):
            size = shape.sample_bytes
            if shape.spread_bytes:
                size = max(1, int(rng.normal(size, shape.spread_bytes)))
            start = int(rng.integers(0, shape.sample_bytes // 2))
            data = noise[start : start + size]
            writer.write(x=data if shape.spread_bytes else np.frombuffer(data, np.uint8))


def train(client: forebay.Client, shape: Shape, epoch: int) -> tuple[float, float]:
    """Utilisation, and bytes that were taken per second, over one epoch."""
    columns = [f"f{number}" for number in range(shape.columns[1])] if shape.columns[0] > 1 else None
    loader = forebay.DataLoader(
        client.dataset(shape.name),
        batch_size=shape.batch,
        shuffle="full",
        seed=epoch,
        last_batch="drop",
        columns=columns,
        num_threads=2,
    )
    with loader:
        batches = iter(loader)
        next(batches)
        start, steps = time.perf_counter(), 0
        for _ in batches:
            time.sleep(shape.step_seconds)
            steps += 1
        taken = time.perf_counter() - start
        num_bytes = loader.report().bytes_read
    return steps * shape.step_seconds / taken, num_bytes / taken


def checkpoint(options: Options, data: Path, report: Report) -> None:
    """Saves and loads of 8 ranks."""
    data.parent.mkdir(parents=True)
    scaled = int(CHECKPOINT_RANK_BYTES * CHECKPOINT_SCALE[options.quick])
    rank_bytes = scaled // PART_BYTES * PART_BYTES
    ram = str(3 * CHECKPOINT_RANKS * rank_bytes)
    daemon = DaemonProcess(data, "--object-url", "none", "--hdd-path", "none", "--ram-bytes", ram)
    log = data.parent / "ranks.log"
    with daemon, Family("checkpoint_ranks", ["ranks"], log=log) as family:
        for name, work in (("save", "save_many"), ("load", "load_many")):
            if name == "load":
                daemon.restart()  # a load is that of another machine: nothing is in memory
                drop_cached(data)
            what = {
                "address": daemon.address()["rpc"],
                "run": "llama3-8b",
                "rank_bytes": rank_bytes,
                "times": CHECKPOINT_TIMES[options.quick],
            }
            found = family["ranks"].ask("run", work=work, size=CHECKPOINT_RANKS, what=what)
            seconds = [one["seconds"] for one in found["ranks"]]
            slowest = [max(at_once) for at_once in zip(*seconds, strict=True)]
            rates = [rank_bytes * len(one) / 1e9 / sum(one) for one in seconds]
            report.value(f"checkpoint_8b_{name}_max_duration_s", slowest)
            report.value(f"checkpoint_8b_{name}_min_throughput_gb_per_s", [min(rates)])
    report.details["checkpoint_8b_rank_bytes"] = rank_bytes


def run(options: Options, folder: Path) -> Report:
    report = Report("shapes of MLPerf Storage, scaled down: unofficial, not verified by MLCommons")
    phases = Phases()
    with forebay.connect(folder / "data") as client:
        for shape in SHAPES:
            write(client, shape)
            train(client, shape, 0)
            ran = [train(client, shape, 1 + repeat) for repeat in range(options.repeats)]
            found = [utilisation for utilisation, _ in ran]
            report.ratio(f"{shape.name}_utilisation", found, at_least=shape.at_least)
            report.value(f"{shape.name}_mb_per_s", [rate / 1e6 for _, rate in ran])
            wanted = shape.wanted_bytes_per_second / 1e6
            report.value(f"{shape.name}_mb_per_s_wanted", [wanted])
            phases.ended(shape.name)
    checkpoint(options, folder / "checkpoint" / "data", report)
    phases.ended("checkpoints of 8 ranks")
    return report


def main() -> int:
    options = parse_options(__doc__ or "")
    if options.quick:
        options = Options(options.quick, options.json_file, 2, options.work)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        report = run(options, Path(folder))
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
