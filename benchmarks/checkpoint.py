"""What does a checkpoint cost, in stalled training and in bytes, against other means and peers?

The state is a transformer's weights with AdamW's moments, all float32 (``--state-gb``). Every
contender is a process of its own over the same memory; they take turns on one disk, alone on the
machine as far as this script goes, each saving bytes that were never saved before. A *stall* is the
time from the call of a save until the state may change; *durable* is the time from the call until
all is synced, folders too, which for the peers is added where they leave it out; their state dicts
are made beforehand, ours is made by ``save``.

* ``stall_vs_warm_copy``: ours over a copy of each tensor into memory used before.
* ``stall_vs_dcp_async``: ours over ``dcp.async_save``'s with a stager that is kept, the faster of
  thread and process. ``first_stall_vs_dcp_first``: the same of the first save of a fresh process
  (and of a fresh daemon).
* ``overlapped_extra_vs_sync_extra``: a few training steps with ``save_overlapped`` before the
  first, less the same without, over those with ``save`` less those without.
* ``local_write_vs_raw``: bare O_DIRECT writes of the same bytes, the best of some ways, over ours
  from the return of ``save`` to ``local``. ``local_write_vs_best_peer``: durable of the fastest of
  torch.save and dcp.* over ours; both count from the call.
* ``restore_vs_raw_read``: bare cold reads of as many bytes into warm memory, the best of some ways,
  over a verified ``restore`` by a fresh connection to a restarted daemon; both after DONTNEED on
  every file. ``restore_ram_vs_copy``: a warm copy over a ``restore`` of what the daemon still has
  in memory, after it has landed.
* ``reshard_node_read_amplification``: saved by 2 ranks, loaded by 8, tensors cut by rows and by
  columns, shards of 64 MiB: bytes that the daemon and all ranks had the disk read, cold, over those
  of the tensors. ``frozen_second_save_bytes``: what a save adds to the ssd tier over the bytes that
  changed since the one before, of a model of which nine tenths are frozen.

Values: stalls, durable rates, the slowdown of the steps after a save, the peak of own memory over
the size of the state, for all; the daemon's processor seconds for each GB that lands. The daemon
hashes each byte of a pack once, trainers hash none.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from checkpoint_cold import drop_cached
from checkpoint_contender import PEERS_PYTHON, Contender, PeakMemory
from checkpoint_extra import measure_frozen, measure_reshard
from checkpoint_state import SharedState, shape_of
from harness import MIB, Options, Report, Samples, percentile
from write_path import DISK_WAYS, fastest, timed, write_raw

from forebay_server.testing.daemon import DaemonProcess

GB = 1_000_000_000
OURS = "forebay"
ASYNC_PEERS = ("dcp_thread", "dcp_process")
WRITING_PEERS = ("torch", "dcp", *ASYNC_PEERS)
ALL_PEERS = (*WRITING_PEERS, "tcp")
EVERYBODY = (OURS, "copy", "raw", *ALL_PEERS)

RACES = ((OURS, "copy", "raw"), (OURS, "torch", "dcp"), *((OURS, p) for p in (*ASYNC_PEERS, "tcp")))
"""Who takes turns where there is no memory for all at once."""

WARM_UP = 2
"""Saves until every buffer was used before; the first of them is measured for itself."""

QUICK_STEPS = (OURS, "dcp_thread")
"""Whose training steps are measured quickly."""

STEPS = 3
"""After a save: as long as it takes to become durable, about."""

READ_WAYS = ((4 * MIB, 1), (4 * MIB, 2), (4 * MIB, 4), (-4 * MIB, 2), (-4 * MIB, 4))
"""Bytes of a read (negative: with O_DIRECT), threads."""


@dataclass(frozen=True)
class Settings:
    """Beside the options of all benchmarks."""

    state_bytes: int
    device: str
    at_once: bool
    """All contenders have memory at the same time."""


@dataclass
class Saves:
    """What contenders' saves took, in seconds."""

    stall: Samples = field(default_factory=Samples)
    durable: Samples = field(default_factory=Samples)
    landing: Samples = field(default_factory=Samples)
    """From the end of the stall."""
    first: Samples = field(default_factory=Samples)
    """Stalls of first saves."""

    def add(self, name: str, answer: dict[str, float]) -> None:
        self.stall.add(name, answer["stall"])
        self.durable.add(name, answer["durable"])
        self.landing.add(name, answer["durable"] - answer["stall"])


class Stage:
    """The disk, the state, one daemon, and the contenders that run now. A context manager."""

    def __init__(self, folder: Path, state: SharedState, settings: Settings) -> None:
        self.folder = folder
        self.state = state
        self.settings = settings
        self.contenders: dict[str, Contender] = {}
        self._starts = 0
        ram = 4 * state.num_bytes + (1 << 30)
        self.daemon = DaemonProcess(
            folder / "data",
            *("--object-url", "none", "--hdd-path", "none", "--ram-bytes", str(ram)),
        )
        self._way: tuple[int, int] | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exception: object) -> None:
        for contender in self.contenders.values():
            contender.kill()
        self.daemon.kill()

    def start(self, names: Sequence[str]) -> None:
        """Fresh processes for *names*, a fresh daemon for ours."""
        self._starts += 1
        for name in names:
            if name == OURS:
                self.daemon.start().wait_ready()
            if name != "raw":
                self.contenders[name] = Contender(
                    name,
                    {
                        "state": str(self.state.path),
                        "state_bytes": self.settings.state_bytes,
                        "device": self.settings.device,
                        "folder": str(self.folder / f"{name}-{self._starts}"),
                        "address": self.address if name == OURS else "",
                    },
                    self.folder / f"{name}.log",
                )
        for contender in self.contenders.values():
            contender.send("facts")
        for contender in self.contenders.values():
            contender.answer()

    @property
    def address(self) -> str:
        return str(self.daemon.address()["rpc"])

    def stop(self) -> None:
        """End all of them, at once: what they hold is of no use any more."""
        for contender in self.contenders.values():
            contender.kill()
        self.contenders.clear()
        self.daemon.kill()

    def ask(self, name: str, do: str, **what: Any) -> dict[str, Any]:
        return self.contenders[name].ask(do, **what)

    def call(self, name: str, method: str, **what: Any) -> dict[str, Any]:
        return self.ask(name, "call", method=method, what=what)

    def save(self, name: str) -> dict[str, float]:
        if name != "raw":
            return self.ask(name, "save")
        return {"stall": 0.0, "durable": self.write_raw()}

    def write_raw(self) -> float:
        """The bytes of the state, by the best of some ways on this disk."""
        data = memoryview(self.state.map)
        folder = self.folder / "raw"
        folder.mkdir(exist_ok=True)
        if self._way is None:
            self._way = fastest(DISK_WAYS, lambda way: write_raw(folder, data, way))
            print(f"disk: best with writes of {self._way[0] // MIB} MiB, {self._way[1]} at a time")
        return write_raw(folder, data, self._way)

    def pids(self, name: str) -> list[int]:
        """Of all that works for it."""
        return [self.contenders[name].pid, *([self.daemon.pid] if name == OURS else [])]


# ------------------------------------------------------------------------------------------- saves


def race(stage: Stage, names: Sequence[str], repeats: int, saves: Saves) -> None:
    """*names* save in turn, one later in each repeat."""
    begun = time.perf_counter()
    for repeat in range(-WARM_UP, repeats):
        shift = repeat % len(names)
        for name in (*names[shift:], *names[:shift]):
            answer = stage.save(name)
            if repeat == -WARM_UP:
                saves.first.add(name, answer["stall"])
            elif repeat >= 0:
                saves.add(name, answer)
    print(f"race of {', '.join(names)}: {time.perf_counter() - begun:.0f} s")


def growth(samples: Samples, yardstick: str) -> list[float]:
    """Repeat by repeat: ours over the yardstick's time."""
    return [1 / number for number in samples.ratio(yardstick, OURS)]


def report_race(report: Report, names: Sequence[str], saves: Saves, num_bytes: int) -> None:
    if "copy" in names:
        report.ratio("stall_vs_warm_copy", growth(saves.stall, "copy"), at_most=1.15)
    for peer in ASYNC_PEERS:
        if peer in names:
            report.ratio("stall_vs_dcp_async", growth(saves.stall, peer), at_most=1.0)
            report.ratio("first_stall_vs_dcp_first", growth(saves.first, peer), at_most=0.35)
    if "raw" in names:
        raw = zip(saves.durable.by_case["raw"], saves.landing.by_case[OURS], strict=True)
        report.ratio("local_write_vs_raw", [one / ours for one, ours in raw], at_least=0.8)
    for peer in WRITING_PEERS:
        if peer in names:
            rates = saves.durable.ratio(peer, OURS)
            report.ratio("local_write_vs_best_peer", rates, at_least=1.5)
    if "tcp" in names:
        report.value("local_write_vs_tcp", saves.durable.ratio("tcp", OURS))
    for name in names:
        report_contender(report, name, saves, num_bytes)


def report_contender(report: Report, name: str, saves: Saves, num_bytes: int) -> None:
    durable = saves.durable.by_case[name]
    if name != "copy":
        report.value(f"{name}_durable_gb_s", [num_bytes / GB / one for one in durable])
    if name == OURS:
        landing = saves.landing.by_case[name]
        report.value("forebay_ssd_gb_s", [num_bytes / GB / one for one in landing])
    if name == "raw":
        return
    stalls = [1e3 * one for one in saves.stall.by_case[name]]
    report.value(f"{name}_stall_p50_ms", [statistics.median(stalls)])
    report.value(f"{name}_stall_p99_ms", [percentile(stalls, 0.99)])
    report.value(f"{name}_first_stall_ms", [1e3 * one for one in saves.first.by_case[name]])


def measure_memory(stage: Stage, names: Sequence[str], report: Report) -> None:
    """In a save of its own, for looking at memory takes time."""
    for name in names:
        if name in ("raw", "copy"):
            continue
        with PeakMemory(stage.pids(name)) as memory:
            stage.save(name)
        report.value(f"{name}_peak_memory", [memory.peak_bytes / stage.state.num_bytes])


def measure_landing_cpu(stage: Stage, report: Report) -> None:
    daemon = psutil.Process(stage.daemon.pid)
    before = sum(daemon.cpu_times()[:2])
    stage.save(OURS)
    seconds = sum(daemon.cpu_times()[:2]) - before
    report.value("daemon_cpu_s_per_gb", [seconds * GB / stage.state.num_bytes])


def measure_steps(stage: Stage, names: Sequence[str], repeats: int, report: Report) -> None:
    """Steps after a save, and ours with one that overlaps them."""
    modes: dict[str, tuple[str, ...]] = {
        name: ("none", "save") for name in names if name not in ("raw", "copy")
    }
    modes[OURS] = ("none", "save", "overlapped")
    for name in modes:
        stage.ask(name, "train", mode="none", steps=2)  # memory of activations and gradients
    took: dict[str, Samples] = {name: Samples() for name in modes}
    steps: dict[str, Samples] = {name: Samples() for name in modes}
    for _ in range(repeats):
        for name, some in modes.items():
            for mode in some:
                found = stage.ask(name, "train", mode=mode, steps=STEPS)
                if "missing" not in found:
                    took[name].add(mode, found["seconds"])
                    steps[name].add(mode, sum(found["steps"]))
    for name in modes:
        slowdown = [1 / one for one in steps[name].ratio("none", "save")]
        report.value(f"{name}_slowdown_after", slowdown)
    bound = 0.3 if stage.settings.device == "cuda" else 1.1
    report.ratio("overlapped_extra_vs_sync_extra", extras(took[OURS]), at_most=bound)


def extras(took: Samples) -> list[float] | None:
    """Added time with overlapped saves over that with blocking ones: of medians, for an added time
    is the small difference of two large ones."""
    if "overlapped" not in took.by_case:
        return None
    none, save, overlapped = (
        statistics.median(took.by_case[mode]) for mode in ("none", "save", "overlapped")
    )
    return [(overlapped - none) / (save - none)]


# ---------------------------------------------------------------------------------------- restores


def read_raw(path: Path, into: memoryview, way: tuple[int, int]) -> float:
    """Seconds of a plain cold read of all of *path*."""
    piece_bytes, num_threads = way
    drop_cached(path.parent)
    flags = os.O_RDONLY | (os.O_DIRECT if piece_bytes < 0 else 0)
    descriptor = os.open(path, flags)
    piece_bytes = abs(piece_bytes)

    def read(start: int) -> None:
        part = into[start : start + piece_bytes]
        if os.preadv(descriptor, [part], start) != len(part):
            raise OSError("short read of a benchmark file")

    try:
        with ThreadPoolExecutor(num_threads) as threads:
            starts = range(0, len(into), piece_bytes)
            return timed(lambda: list(threads.map(read, starts)))
    finally:
        os.close(descriptor)


def measure_restores(stage: Stage, repeats: int, report: Report) -> None:
    """Cold from the disk, and from the daemon's memory; needs ours and the copy."""
    num_bytes = stage.state.num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    path = stage.folder / "read" / "raw"
    path.parent.mkdir()
    path.write_bytes(memoryview(stage.state.map)[:num_bytes])
    with mmap.mmap(-1, num_bytes) as memory, memoryview(memory) as into:
        way = fastest(READ_WAYS, lambda way: read_raw(path, into, way))
        samples = Samples()
        for repeat in range(repeats):
            stage.call(OURS, "keep", step=1000 + 2 * repeat)
            for _ in range(1 + (not repeat)):  # the first time also what no copy has been to
                copied = stage.call("copy", "back")["seconds"]
            stage.call(OURS, "keep", step=1001 + 2 * repeat)
            from_memory = stage.call(OURS, "restore", durability="ram")["seconds"]
            stage.daemon.terminate()
            stage.daemon.start().wait_ready()
            drop_cached(stage.daemon.data)
            cold = stage.call(OURS, "restore", durability="local", address=stage.address)
            samples.add("cold", cold["seconds"])
            samples.add("ram", from_memory)
            samples.add("copy", copied)
            samples.add("raw", read_raw(path, into, way))
    path.unlink()
    report.ratio("restore_vs_raw_read", samples.ratio("raw", "cold"), at_least=0.7)
    report.ratio("restore_ram_vs_copy", samples.ratio("copy", "ram"), at_least=0.5)
    for name, case in (
        ("forebay_restore", "cold"),
        ("forebay_restore_ram", "ram"),
        ("read", "raw"),
    ):
        report.value(f"{name}_gb_s", [num_bytes / GB / one for one in samples.by_case[case]])


# -------------------------------------------------------------------------------------------- all


def run(options: Options, settings: Settings, folder: Path) -> Report:
    """All figures of this script."""
    state = SharedState(shape_of(settings.state_bytes))
    state.fill()
    report = Report(f"Checkpoints of {state.num_bytes / GB:.2f} GB on {settings.device}")
    report.details["state_bytes"] = state.num_bytes
    races = (EVERYBODY,) if settings.at_once else RACES
    with Stage(folder, state, settings) as stage:
        for number, names in enumerate(races):
            saves = Saves()
            stage.start(names)
            race(stage, names, options.repeats, saves)
            report_race(report, names, saves, state.num_bytes)
            measure_memory(stage, names, report)
            stepping = [name for name in names if not options.quick or name in QUICK_STEPS]
            measure_steps(stage, stepping, 2 if options.quick else options.repeats, report)
            if not number:
                measure_landing_cpu(stage, report)
                measure_restores(stage, 2 if options.quick else options.repeats, report)
            stage.stop()
    for name in ("frozen", "reshard"):
        (folder / name).mkdir()
    measure_frozen(folder / "frozen", report)
    measure_reshard(folder / "reshard", report)
    return report


def parse(argv: Sequence[str] | None = None) -> tuple[Options, Settings]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="0.5 GB and few repeats, a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result here")
    parser.add_argument("--repeats", type=int, help="interleaved repeats (default 3 quick, 7)")
    parser.add_argument("--work", type=Path, help="folder for scratch data (default: a new one)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--state-gb", type=float, help="size of the state (default 3.6, quick 0.5, cuda 12)"
    )
    given = parser.parse_args(argv)
    default = 0.5 if given.quick else {"cpu": 3.6, "cuda": 12.0}[given.device]
    num_bytes = int((given.state_gb or default) * GB)
    free = psutil.virtual_memory().available
    settings = Settings(num_bytes, given.device, at_once=12 * num_bytes < free)
    repeats = given.repeats or (3 if given.quick else 7)
    return Options(given.quick, given.json, repeats, given.work), settings


def main() -> int:
    options, settings = parse()
    if not PEERS_PYTHON.exists():
        print("The peers are not installed: make peers", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="forebay-checkpoint-", dir=options.work) as folder:
        return run(options, settings, Path(folder)).finish(options)


if __name__ == "__main__":
    sys.exit(main())
