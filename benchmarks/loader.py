"""How fast are batches handed out, against the other loaders and against no loader at all?

Every contender is a process of its own, which writes the same samples in its own format and reads
them back in batches of 256, warm, in its strongest shuffle (ours and torch's over a memmap: full),
with 0, 1 and 2 workers or threads; in turn, and by medians of samples a second. Then they read
from an S3 server, and it counts. The peers run in an environment of their own: ``make peers``.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from children import PEERS_PYTHON, Child, Family
from harness import Options, Phases, Report, parse_options
from loader_cold import CountingStore, measure_cold, publish
from loader_start import ImmenseDataset, measure_start

from forebay_server.testing.s3 import missing_s3

PEERS = ("mosaic", "litdata", "webdataset")
OURS = "forebay"
WORKERS = (0, 1, 2)

WHO = {
    "tensor3k": (OURS, "memmap"),
    "peers3k": (OURS, *PEERS),
    "tokens": (OURS, "bare"),
    "peers8k": (OURS, *PEERS),
    "jpeg115k": (OURS, "bare", *PEERS),
}
"""Who reads what."""


@dataclass(frozen=True)
class Race:
    """What is measured in turn: contenders on one case, each with so many workers or threads."""

    case: str
    workers: int
    who: tuple[str, ...]


SHUFFLED = Race("peers3k", 0, (OURS, *PEERS))
"""Whose shuffles are looked at: in the epoch that warms up."""

IN_VALUES = (Race("peers3k", 2, WHO["peers3k"]), Race("tensor3k", 2, ("memmap",)))
"""Whose waits, memory and CPU time stand among the values; all are in the details."""


def races(*, quick: bool) -> list[Race]:
    """All of them; quickly, the ones that every ratio needs."""
    if quick:
        tensors = [Race(case, n, WHO[case]) for case in ("tensor3k", "peers3k") for n in WORKERS]
        tokens = [Race("tokens", 0, WHO["tokens"]), Race("peers8k", 2, WHO["peers8k"])]
        return [*tensors, *tokens, Race("jpeg115k", 2, WHO["jpeg115k"])]
    found = [Race(case, workers, who) for case, who in WHO.items() for workers in WORKERS]
    return [race for race in found if race.case != "tokens" or not race.workers]  # a copy has none


class Contender:
    """A child, and the processes that work for it."""

    def __init__(self, child: Child) -> None:
        self.name = child.name
        self.send, self.answer, self.ask = child.send, child.answer, child.ask
        self.also: list[int] = []
        """Other processes that work for it: a daemon."""
        self.preparing = 0
        """Answers that it still owes."""
        self._child = child

    def prepared(self) -> None:
        """Wait until its data are written."""
        for _ in range(self.preparing):
            self.also = self.answer()["also"]
        self.preparing = 0

    def usage(self) -> tuple[float, int]:
        """CPU seconds so far, and own resident bytes, of it and of all that work for it."""
        seconds, own = 0.0, 0
        for pid in (self._child.pid, *self.also):
            parent = psutil.Process(pid)
            for process in (parent, *parent.children(recursive=True)):
                times = process.cpu_times()
                seconds += times.user + times.system
                memory = process.memory_info()
                own += memory.rss - memory.shared
        return seconds, own


@contextmanager
def contenders(folder: Path, *, quick: bool) -> Iterator[dict[str, Contender]]:
    """All of them, started at once, each about to write its data."""
    what = {"folder": str(folder), "quick": quick}
    with ExitStack() as stack:
        found = {}
        for module, names, python in (
            ("loader_own", (OURS, "memmap", "bare"), sys.executable),
            ("loader_peers", PEERS, PEERS_PYTHON),
        ):
            family = Family(module, names, log=folder / f"{module}.log", python=python, **what)
            stack.callback(family.stop)
            found |= {name: Contender(family[name]) for name in names}
        for name, contender in found.items():
            todo = [case for case, who in WHO.items() if name in who]
            for case in todo:
                contender.send("prepare", case=case)
            contender.preparing = len(todo)
        yield found


class Rates:
    """What was measured: samples a second, and the rest, by case, workers and contender."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, int, str], list[float]] = {}
        self.others: dict[str, Any] = {}
        self.orders: dict[str, list[int]] = {}
        """By contender: an epoch's samples as they came."""

    def add(self, case: str, workers: int, who: str, rate: float) -> None:
        self.numbers.setdefault((case, workers, who), []).append(rate)

    def ratios(self, case: str, workers: int, base: Sequence[str]) -> list[float]:
        """Ours over the best of *base* (by its median), repeat by repeat."""
        best = max(base, key=lambda who: statistics.median(self.numbers[case, workers, who]))
        ours, theirs = (self.numbers[case, workers, who] for who in (OURS, best))
        return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def measure(found: dict[str, Contender], race: Race, options: Options, rates: Rates) -> None:
    """Every contender in turn, as often as the options say."""
    case, workers, who = race.case, race.workers, list(race.who)
    opened = {name: open_one(found[name], race, rates) for name in who}
    seconds = 0.15 if options.quick else 1.0
    last: dict[str, dict[str, float]] = {}
    for repeat in range(options.repeats):
        shift = repeat % len(who)
        for name in who[shift:] + who[:shift]:
            before, _ = found[name].usage()
            ran = found[name].ask("run", case=case, workers=workers, seconds=seconds)
            after, resident = found[name].usage()
            rates.add(case, workers, name, ran["samples"] / ran["seconds"])
            last[name] = {
                "wait_p50_ms": ran["wait_p50_ms"],
                "wait_p99_ms": ran["wait_p99_ms"],
                "cpu_s_per_million": (after - before) / ran["samples"] * 1e6,
                "own_rss_mb": resident / 1e6,
            }
    for name in who:
        rates.others[f"{case}, {workers} workers, {name}"] = {
            "samples_per_second": statistics.median(rates.numbers[case, workers, name]),
            "first_batch_warm_ms": opened[name] * 1e3,
            **last[name],
        }
        found[name].ask("close", case=case, workers=workers)


def open_one(contender: Contender, race: Race, rates: Rates) -> float:
    """Seconds until the first batch of the first epoch, which is read to its end."""
    shuffles = race.case == SHUFFLED.case and race.workers == SHUFFLED.workers
    wanted = shuffles and contender.name in SHUFFLED.who
    ran = contender.ask("open", case=race.case, workers=race.workers, order=wanted)
    if wanted:
        rates.orders[contender.name] = ran["order"]
    first: float = ran["first_batch_seconds"]
    return first


def measure_items(found: dict[str, Contender], options: Options, rates: Rates) -> None:
    """Single samples at random, ``dataset[i]``, warm."""
    for name in (OURS, "mosaic", "litdata"):
        found[name].ask("items", case="peers3k", count=100)
    for _ in range(options.repeats):
        for name in (OURS, "mosaic", "litdata"):
            count = 30 if name == "litdata" else 2000  # it is not made for that
            ran = found[name].ask("items", case="peers3k", count=count)
            rates.add("items", 0, name, ran["samples"] / ran["seconds"])
    for name in (OURS, "mosaic", "litdata"):
        rate = statistics.median(rates.numbers["items", 0, name])
        rates.others[f"random access, {name}"] = {"samples_per_second": rate}


def shuffle_quality(order: Sequence[int], num_classes: int = 10) -> dict[str, float]:
    """Of samples that were written class after class: how far each moved, as a share of the
    epoch (a third, if at random), and how unevenly batches of 256 hold the classes, as the mean
    over classes and batches of the squared error over that of random draws (1, if at random)."""
    count = len(order)
    moved = statistics.fmean(abs(place - sample) for place, sample in enumerate(order)) / count
    expected = 256 / num_classes
    errors = []
    for start in range(0, count - 255, 256):
        held = [0] * num_classes
        for sample in order[start : start + 256]:
            held[min(sample * num_classes // count, num_classes - 1)] += 1
        errors += [(one - expected) ** 2 for one in held]
    at_random = expected * (1 - 1 / num_classes)
    return {"mean_displacement": moved, "class_variance": statistics.fmean(errors) / at_random}


def run(options: Options, folder: Path) -> Report:
    report = Report("loader: batches of 256, warm, beside other loaders")
    missing = None if PEERS_PYTHON.exists() else "the peers are not installed: run `make peers`"
    missing = missing or missing_s3({})
    if missing:
        raise SystemExit(missing)
    rates, phases = Rates(), Phases()
    with (
        closing(CountingStore(folder / "s3")) as store,
        closing(ImmenseDataset(folder / "start")) as immense,
        ThreadPoolExecutor() as helpers,
        contenders(folder, quick=options.quick) as found,
    ):
        started = helpers.submit(store.start, (OURS, *PEERS))
        made = helpers.submit(immense.make)
        for name in found:
            found[name].prepared()
        readers = {name: found[name] for name in (OURS, *PEERS)}
        started.result()
        publish(store, readers)
        made.result()
        phases.ended("set-up")
        for race in races(quick=options.quick):
            measure(found, race, options, rates)
            phases.ended(f"{race.case}, {race.workers} workers")
        measure_items(found, options, rates)
        phases.ended("single samples")
        measure_cold(report, store, readers)
        phases.ended("from an S3 server")
        measure_start(report, immense, options)
        phases.ended("starts among 1e10 samples")
    for name, order in rates.orders.items():
        rates.others[f"shuffle, {name}"] = shuffle_quality(order)
    tell(report, rates)
    report.details["loaders"] = rates.others
    return report


BOUNDS = (
    ("tensor3k_vs_best_peer", "peers3k", WORKERS, PEERS, 8),
    ("tensor3k_vs_torch_memmap_batched", "tensor3k", (0,), ("memmap",), 0.9),
    ("tensor3k_vs_torch_memmap_2_workers", "tensor3k", (2,), ("memmap",), 4),
    ("jpeg115k_vs_pure_decode", "jpeg115k", WORKERS, ("bare",), 0.95),
    ("jpeg115k_vs_best_peer", "jpeg115k", WORKERS, PEERS, 0.97),
    ("tokens_vs_memcpy", "tokens", (0,), ("bare",), 0.6),
    ("tokens_vs_best_peer", "peers8k", WORKERS, PEERS, 5),
    ("random_access_vs_best_peer", "items", (0,), ("mosaic", "litdata"), 2),
)
"""Ratio, its case, workers (the worst of them counts), what ours is compared with, the least."""


def tell(report: Report, rates: Rates) -> None:
    for name, case, counts, base, least in BOUNDS:
        for workers in counts:
            if all((case, workers, who) in rates.numbers for who in (OURS, *base)):
                report.ratio(name, rates.ratios(case, workers, base), at_least=least)
        if name not in report.ratios:
            report.ratio(name, None, at_least=least)
    shown = [
        (who, "", rates.others[f"{race.case}, {race.workers} workers, {who}"])
        for race in IN_VALUES
        for who in race.who
    ]
    shown += [(who, "shuffle_", rates.others[f"shuffle, {who}"]) for who in SHUFFLED.who]
    for who, prefix, numbers in shown:
        for key, number in numbers.items():
            report.value(f"{who}_{prefix}{key}", [number])
    for name, one in rates.others.items():
        print(f"{name:<36}" + "  ".join(f"{key} {number:,.3g}" for key, number in one.items()))


def main() -> int:
    options = parse_options(__doc__ or "")
    if options.quick and "--repeats" not in " ".join(sys.argv):
        options = replace(options, repeats=2)
    elif "--repeats" not in " ".join(sys.argv):
        options = replace(options, repeats=5)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        report = run(options, Path(folder))
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
