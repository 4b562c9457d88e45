"""What does a checkpoint cost, in stalled training and in bytes, against other means and peers?

The state is a transformer's weights with AdamW's moments, all float32 (``--size``). Every contender
is a process of its own over the same memory, which lives as long as the race; they take turns on
one disk, alone on the machine as far as this script goes, each saving bytes that were never saved
before, with plans that are kept and into memory that was used before. A *stall* is the time from
the call of a save until the state may change; *durable* is the time from the call until all is
synced, folders too, which for the peers is added where they leave it out; their state dicts are
made beforehand, ours is made by ``save``.

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
  every file, and the bytes that then came from the disk are counted. ``restore_ram_vs_copy``: a
  warm copy over a ``restore`` of what the daemon still has in memory, after it has landed.
* ``reshard_node_read_amplification``: saved by 2 ranks, loaded by 8, tensors cut by rows and by
  columns, shards of 64 MiB: bytes that the daemon and all ranks had the disk read, cold, over those
  of the tensors. ``frozen_second_save_bytes``: what a save adds to the ssd tier over the bytes that
  changed since the one before, of a model of which nine tenths are frozen.

Values: stalls, durable rates, the slowdown of the steps after a save, the peak of own memory over
the size of the state, for all; the daemon's processor seconds for each GB that lands. The daemon
hashes each byte of a pack once, trainers hash none. Quickly, the slowdown of peers is that of one
of them, what no ratio needs is measured once, and first stalls of those that none needs are rough.

``--only`` measures what the named ratios need and nothing else. A line on standard error says how
long each phase took.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from checkpoint_extra import measure_frozen, measure_reshard, save_sharded
from checkpoint_memory import PeakMemory
from children import PEERS_PYTHON, Child, Family
from harness import MIB, Options, Phases, Report, Samples, percentile
from raw_disk import (
    DISK_WAYS,
    READ_WAYS,
    Way,
    disk_reads,
    drop_cached,
    fastest,
    read_raw,
    write_and_remove,
    write_raw,
)

from forebay_server.testing.daemon import DaemonProcess

GB = 1_000_000_000
OURS = "forebay"
OWN = (OURS, "copy")
ASYNC_PEERS = ("dcp_thread", "dcp_process")
WRITING_PEERS = ("torch", "dcp", *ASYNC_PEERS)
ALL_PEERS = (*WRITING_PEERS, "tcp")
EVERYBODY = (OURS, "copy", "raw", *ALL_PEERS)

RACES = ((OURS, "copy", "raw"), (OURS, "torch", "dcp"), *((OURS, p) for p in (*ASYNC_PEERS, "tcp")))
"""Who takes turns where there is no memory for all at once."""

RACED = {
    "stall_vs_warm_copy": ("copy",),
    "stall_vs_dcp_async": ASYNC_PEERS,
    "first_stall_vs_dcp_first": ASYNC_PEERS,
    "local_write_vs_raw": ("raw",),
    "local_write_vs_best_peer": WRITING_PEERS,
}
"""The ratios of a race: whom ours is compared with."""

STEPPED = ("overlapped_extra_vs_sync_extra",)
RESTORED = ("restore_vs_raw_read", "restore_ram_vs_copy")
FROZEN = "frozen_second_save_bytes"
RESHARDED = "reshard_node_read_amplification"
RATIOS = (*RACED, *STEPPED, *RESTORED, FROZEN, RESHARDED)

WARM_UP = 2
"""Saves until every buffer was used before; the first of them is measured for itself, in the last
one memory is looked at, which takes time."""

QUICK_ONCE = ("torch", "dcp", "tcp")
"""Quickly, one save has to warm up those: two of them have no buffers, no ratio needs the third.
Memory is looked at in it, so it is no good measure of their first stall."""

QUICK_STEPPING = (OURS, "dcp_thread")
"""Whose training steps are measured quickly; the peer's once."""

STEPS = 2
MAX_STEPS = {True: 3, False: 12}
"""After a save, quickly or not: for twice as long as it takes to become durable, about."""

FINGERPRINT_RATE = 1 << 40
"""What follows a commit follows at once, and is over before anybody saves again. The daemon's own
rate spreads it over seconds, no part of a save either; steps after a save feel this one more."""

TRIED_BYTES = 128 * MIB
"""Of the state, at most, to find the best way to write and to read."""

FIRST_KEPT = 1000
"""The step of the first save that is to be restored."""

COLD_SHARE = 0.9
"""Of the bytes of a cold restore has to come from the disk."""


@dataclass(frozen=True)
class Settings:
    """Beside the options of all benchmarks."""

    state_bytes: int
    device: str
    at_once: bool
    """All contenders have memory at the same time."""
    only: tuple[str, ...]
    """The ratios that are wanted."""

    @property
    def everything(self) -> bool:
        return self.only == RATIOS

    def racing(self) -> tuple[str, ...]:
        """Who has to save beside ours."""
        if self.everything:
            return EVERYBODY
        wanted = {name for ratio in self.only for name in RACED.get(ratio, ())}
        if set(self.only) & set(RESTORED):
            wanted.add("copy")
        if wanted or set(self.only) & set(STEPPED):
            wanted.add(OURS)
        return tuple(name for name in EVERYBODY if name in wanted)

    def races(self) -> list[tuple[str, ...]]:
        """Who takes turns with whom."""
        racing = self.racing()
        if not racing or self.at_once:
            return [racing]
        found = [tuple(name for name in names if name in racing) for names in RACES]
        return [found[0], *(names for names in found[1:] if len(names) > 1)]


@dataclass
class Saves:
    """What contenders' saves took, in seconds."""

    stall: Samples = field(default_factory=Samples)
    durable: Samples = field(default_factory=Samples)
    landing: Samples = field(default_factory=Samples)
    """From the end of the stall."""
    first: Samples = field(default_factory=Samples)
    """Stalls of first saves."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    daemon_seconds: list[float] = field(default_factory=list)
    """Processor time of the daemon for a save, all that follows it included."""

    def add(self, name: str, answer: dict[str, float]) -> None:
        self.stall.add(name, answer["stall"])
        self.durable.add(name, answer["durable"])
        self.landing.add(name, answer["durable"] - answer["stall"])


class Stage:
    """The disk, the state, one daemon, and the contenders that run now. A context manager."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.families: list[Family] = []
        self.contenders: dict[str, Child] = {}
        self.daemon = self.make_daemon()
        self._starts = 0
        self._way: Way | None = None

    def __enter__(self) -> Stage:
        """Start the family of ours: what stays, and who saves first."""
        savers = [name for name in self.settings.racing() if name in OWN]
        names = ("state", "ranks", "frozen", *savers)
        self.own = Family("checkpoint_own", names, log=self.folder / "own.log")
        self.own["state"].send("fill", state_bytes=self.settings.state_bytes)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self.own.kill()

    def start(self, names: Sequence[str]) -> None:
        """Fresh processes for *names*, a fresh daemon for ours."""
        self._starts += 1
        self.daemon = self.make_daemon().start()
        peers = [name for name in names if name in ALL_PEERS]
        own = [name for name in names if name in OWN]
        if peers:
            log = self.folder / "peers.log"
            self.families.append(Family("checkpoint_peers", peers, log=log, python=PEERS_PYTHON))
            self.contenders |= {name: self.families[-1][name] for name in peers}
        ours = self.own
        if self._starts > 1:
            ours = Family("checkpoint_own", own, log=self.folder / "own.log")
            self.families.append(ours)
        self.contenders |= {name: ours[name] for name in own}
        self.open_state()
        self.daemon.wait_ready()
        for name, contender in self.contenders.items():
            contender.send(
                "open",
                state=self.place,
                state_bytes=self.settings.state_bytes,
                device=self.settings.device,
                folder=str(self.folder / f"{name}-{self._starts}"),
                address=self.address if name == OURS else "",
            )
        for contender in self.contenders.values():
            contender.answer()

    def make_daemon(self) -> DaemonProcess:
        """With room for some saves in its memory."""
        ram = str(4 * self.settings.state_bytes + (1 << 30))
        tiers = ("--object-url", "none", "--hdd-path", "none", "--ram-bytes", ram)
        rate = ("--fingerprint-bytes-per-second", str(FINGERPRINT_RATE))
        return DaemonProcess(self.folder / "data", *tiers, *rate)

    def open_state(self) -> None:
        """Wait until it is filled, once."""
        if self._starts > 1:
            return
        found = self.own["state"].answer()
        self.place, self.num_bytes = str(found["state"]), int(found["num_bytes"])
        descriptor = os.open(self.place, os.O_RDWR)
        self.map = mmap.mmap(descriptor, self.num_bytes)
        os.close(descriptor)

    @property
    def address(self) -> str:
        return str(self.daemon.address()["rpc"])

    def stop(self) -> None:
        """End all of them, at once: what they hold is of no use any more."""
        for contender in self.contenders.values():
            contender.kill()
        for family in self.families:
            family.kill()
        self.families.clear()
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
        return write_and_remove(self.raw_folder(), self.whole_pages(), self.way())

    def whole_pages(self) -> memoryview:
        """Of the state."""
        return memoryview(self.map)[: self.num_bytes // mmap.PAGESIZE * mmap.PAGESIZE]

    def raw_folder(self) -> Path:
        folder = self.folder / "raw"
        folder.mkdir(exist_ok=True)
        return folder

    def way(self) -> Way:
        """The best way to write."""
        if self._way is None:
            folder, data = self.raw_folder(), self.whole_pages()[:TRIED_BYTES]
            self._way = fastest(DISK_WAYS, lambda way: write_and_remove(folder, data, way))
            print(f"disk: best with writes of {self._way[0] // MIB} MiB, {self._way[1]} at a time")
        return self._way

    def pids(self, name: str) -> list[int]:
        """Of all that works for it."""
        return [self.contenders[name].pid, *([self.daemon.pid] if name == OURS else [])]

    def daemon_seconds(self) -> float:
        return float(sum(psutil.Process(self.daemon.pid).cpu_times()[:2]))


# ------------------------------------------------------------------------------------------- saves


def race(stage: Stage, names: Sequence[str], repeats: int, saves: Saves, *, quick: bool) -> None:
    """*names* save in turn, one later in each repeat, after those that warm up."""
    for repeat in range(-WARM_UP, repeats):
        shift = repeat % len(names)
        for name in (*names[shift:], *names[:shift]):
            if repeat < 0:
                warm_up(stage, name, repeat, saves, once=quick and name in QUICK_ONCE)
            elif name != "tcp" or not quick or not repeat:
                before = stage.daemon_seconds()
                saves.add(name, stage.save(name))
                if name == OURS:
                    saves.daemon_seconds.append(stage.daemon_seconds() - before)


def warm_up(stage: Stage, name: str, repeat: int, saves: Saves, *, once: bool) -> None:
    is_first, is_last = repeat == -WARM_UP, repeat == (-WARM_UP if once else -1)
    if name == "raw":
        stage.way()
    elif not once or is_first:
        looks = is_last and name != "copy"
        with PeakMemory(stage.pids(name) if looks else ()) as memory:
            stall = stage.save(name)["stall"]
        if is_first:
            saves.first.add(name, stall)
        if looks:
            saves.peak_bytes[name] = memory.peak_bytes


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
    if "tcp" in names:  # quickly there is one of it
        both = zip(saves.durable.by_case["tcp"], saves.durable.by_case[OURS], strict=False)
        report.value("local_write_vs_tcp", [one / ours for one, ours in both])
    for name in names:
        report_contender(report, name, saves, num_bytes)


def report_contender(report: Report, name: str, saves: Saves, num_bytes: int) -> None:
    durable = saves.durable.by_case[name]
    if name != "copy":
        report.value(f"{name}_durable_gb_s", [num_bytes / GB / one for one in durable])
    if name == OURS:
        landing = saves.landing.by_case[name]
        report.value("forebay_ssd_gb_s", [num_bytes / GB / one for one in landing])
        seconds = [one * GB / num_bytes for one in saves.daemon_seconds]
        report.value("daemon_cpu_s_per_gb", seconds)
    if name == "raw":
        return
    stalls = [1e3 * one for one in saves.stall.by_case[name]]
    report.value(f"{name}_stall_p50_ms", [statistics.median(stalls)])
    report.value(f"{name}_stall_p99_ms", [percentile(stalls, 0.99)])
    report.value(f"{name}_first_stall_ms", [1e3 * one for one in saves.first.by_case[name]])
    if name in saves.peak_bytes:
        report.value(f"{name}_peak_memory", [saves.peak_bytes[name] / num_bytes])


# ------------------------------------------------------------------------------------------- steps


def measure_steps(
    stage: Stage, names: Sequence[str], repeats: int, saves: Saves, report: Report, *, quick: bool
) -> None:
    """Steps after a save, and ours with one that overlaps them."""
    for name in names:
        modes = ("none", "save", "overlapped") if name == OURS else ("none", "save")
        times = 1 if quick and name != OURS else repeats
        warm = stage.ask(name, "train", mode="none", steps=2)  # memory of activations, gradients
        durable = statistics.median(saves.durable.by_case.get(name, [0.0]))
        wanted = math.ceil(2 * durable / min(warm["steps"]))
        count = min(max(wanted, STEPS), MAX_STEPS[quick])
        took, steps, late = Samples(), Samples(), Samples()
        for repeat in range(times):
            shift = repeat % len(modes)
            for mode in (*modes[shift:], *modes[:shift]):
                found = stage.ask(name, "train", mode=mode, steps=count)
                took.add(mode, found["seconds"])
                steps.add(mode, sum(found["steps"]))
                late.add(mode, found["late"])
        report.value(f"{name}_slowdown_after", [1 / one for one in steps.ratio("none", "save")])
        if name == OURS:
            bound = 0.3 if stage.settings.device == "cuda" else 1.1
            report.ratio("overlapped_extra_vs_sync_extra", extras(took), at_most=bound)
            report.value("landing_after_overlapped_steps_s", late.by_case["overlapped"])


def extras(took: Samples) -> list[float] | None:
    """Added time with overlapped saves over that with blocking ones: of medians, for an added time
    is the small difference of two large ones."""
    none, save, overlapped = (
        statistics.median(took.by_case[mode]) for mode in ("none", "save", "overlapped")
    )
    if save <= none:  # there is nothing to compare with
        return None
    return [(overlapped - none) / (save - none)]


# -------------------------------------------------------------------------- restores, and all


def measure_memory_restores(stage: Stage, repeats: int, samples: Samples) -> None:
    """Saves to be restored, each at once from the daemon's memory; needs ours and the copy."""
    stage.call("copy", "back")
    for repeat in range(repeats):
        samples.add("copy", stage.call("copy", "back")["seconds"])
        stage.call(OURS, "keep", step=FIRST_KEPT + repeat)
        samples.add("ram", stage.call(OURS, "restore", number=-1, durability="ram")["seconds"])


def measure_cold_restores(stage: Stage, repeats: int, samples: Samples) -> None:
    """Of those saves, each read by nobody before, after a restart of the daemon."""
    path, num_bytes = stage.raw_folder() / "read", len(stage.whole_pages())
    with mmap.mmap(-1, num_bytes) as memory, memoryview(memory) as into:
        with into[:TRIED_BYTES] as some:
            way = fastest(READ_WAYS, lambda way: read_raw(path, some, way))
        read_raw(path, into, way)  # into memory that was used before
        for repeat in range(repeats):
            samples.add("cold", restore_cold(stage, repeat))
            samples.add("raw", read_raw(path, into, way))


def restore_cold(stage: Stage, number: int) -> float:
    """Seconds of a restore by a fresh connection, with nothing in the page cache."""
    stage.call(OURS, "reconnect", address=stage.address)
    drop_cached(stage.daemon.data)
    pids = stage.pids(OURS)
    before = sum(disk_reads(pid) for pid in pids)
    seconds: float = stage.call(OURS, "restore", number=number, durability="local")["seconds"]
    if sum(disk_reads(pid) for pid in pids) - before < COLD_SHARE * stage.num_bytes:
        raise AssertionError("a part of what was restored was not read from the disk")
    return seconds


def report_restores(report: Report, samples: Samples, num_bytes: int) -> None:
    report.ratio("restore_vs_raw_read", samples.ratio("raw", "cold"), at_least=0.7)
    report.ratio("restore_ram_vs_copy", samples.ratio("copy", "ram"), at_least=0.5)
    for name, case in (
        ("forebay_restore", "cold"),
        ("forebay_restore_ram", "ram"),
        ("read", "raw"),
    ):
        report.value(f"{name}_gb_s", [num_bytes / GB / one for one in samples.by_case[case]])


def measure_races(
    stage: Stage, names: Sequence[str], options: Options, phases: Phases, report: Report
) -> None:
    """Saves, and training steps."""
    settings, saves = stage.settings, Saves()
    if raced := set(settings.only) & set(RACED):
        race(stage, names, options.repeats, saves, quick=options.quick)
        report_race(report, names, saves, stage.num_bytes)
    elif names:
        race(stage, names, 0, saves, quick=options.quick)
    phases.ended(f"saves{'' if raced else ' that warm up'}")
    if not set(settings.only) & set(STEPPED) or OURS not in names:
        return
    able = QUICK_STEPPING if options.quick else (OURS, *ALL_PEERS)
    some = [name for name in names if name in able] if settings.everything else [OURS]
    measure_steps(stage, some, options.repeats, saves, report, quick=options.quick)
    phases.ended("training steps")


def measure_rest(stage: Stage, repeats: int, phases: Phases, report: Report) -> None:
    """What ours alone does: all that is to be cold is saved, the daemon is started anew once."""
    wanted, samples = set(stage.settings.only), Samples()
    if wanted & set(RESTORED):
        measure_memory_restores(stage, repeats, samples)
        phases.ended("restores from memory")
    if FROZEN in wanted:
        measure_frozen(stage.own, stage.daemon, report)
        phases.ended("frozen model")
    if RESHARDED in wanted:
        save_sharded(stage.own, stage.daemon)
        phases.ended("saves by few ranks")
    if wanted & {*RESTORED, RESHARDED}:
        stage.daemon.terminate()
        stage.daemon.start()
        if wanted & set(RESTORED):
            write_raw(stage.raw_folder() / "read", stage.whole_pages(), stage.way())
        stage.daemon.wait_ready()
        phases.ended("restart of the daemon")
    if wanted & set(RESTORED):
        measure_cold_restores(stage, repeats, samples)
        report_restores(report, samples, stage.num_bytes)
        phases.ended("cold restores")
    if RESHARDED in wanted:
        measure_reshard(stage.own, stage.daemon, report)
        phases.ended("cold restores by more ranks")


def run(options: Options, settings: Settings, folder: Path) -> Report:
    """All figures of this script."""
    phases = Phases()
    with Stage(folder, settings) as stage:
        for number, names in enumerate(settings.races()):
            stage.start(names)
            phases.ended(f"start of {', '.join(names) or 'the daemon'}")
            if not number:
                report = Report(f"Checkpoints of {stage.num_bytes / GB:.2f} GB, {settings.device}")
            measure_races(stage, names, options, phases, report)
            if not number:
                measure_rest(stage, options.repeats, phases, report)
            stage.stop()
    report.details |= {"state_bytes": stage.num_bytes, "seconds": phases.seconds}
    for name in set(report.ratios) - set(settings.only):  # measured beside those that are
        del report.ratios[name]
    phases.ended("end")
    return report


def parse(argv: Sequence[str] | None = None) -> tuple[Options, Settings]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="0.5 GB and few repeats, a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result here")
    parser.add_argument("--repeats", type=int, help="interleaved repeats (default 3 quick, 7)")
    parser.add_argument("--work", type=Path, help="folder for scratch data (default: a new one)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--size", metavar="GB", type=float, help="of the state (default 3.6, quick 0.5, cuda 12)"
    )
    parser.add_argument(
        "--only", metavar="RATIO[,RATIO]", help=f"measure these alone: {', '.join(RATIOS)}"
    )
    given = parser.parse_args(argv)
    only = tuple(given.only.split(",")) if given.only else RATIOS
    if unknown := [name for name in only if name not in RATIOS]:
        parser.error(f"no such ratio: {', '.join(unknown)}; there are {', '.join(RATIOS)}")
    default = 0.5 if given.quick else {"cpu": 3.6, "cuda": 12.0}[given.device]
    num_bytes = int((given.size or default) * GB)
    free = psutil.virtual_memory().available
    settings = Settings(num_bytes, given.device, at_once=12 * num_bytes < free, only=only)
    repeats = given.repeats or (3 if given.quick else 7)
    return Options(given.quick, given.json, repeats, given.work), settings


def main() -> int:
    options, settings = parse()
    if set(settings.racing()) & set(ALL_PEERS) and not PEERS_PYTHON.exists():
        print("The peers are not installed: make peers", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="forebay-checkpoint-", dir=options.work) as folder:
        return run(options, settings, Path(folder)).finish(options)


if __name__ == "__main__":
    sys.exit(main())
