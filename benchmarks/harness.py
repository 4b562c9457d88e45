"""Times cases against each other fairly: interleaved repeats, warm-up, medians with their spread.

A benchmark script defines *cases* (functions that do one unit of work on fresh bytes and answer
seconds or any number), runs them in turn A B C A B C … within one process tree, and reports

* ``ratios``: name -> median over the repeats of (yardstick / case), so 1.0 is the yardstick's speed
  and more is better; each may carry a lower bound,
* ``values``: name -> median of a measured number; each may carry an upper bound.

A name over several cases is the worst of them. A missing peer makes its name null. The exit status
is 1 if anything is null or a bound does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MIB = 1024 * 1024


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    quick: bool
    json_file: Path | None
    repeats: int
    work: Path | None


def parse_options(description: str, argv: Sequence[str] | None = None) -> Options:
    """The options that every benchmark script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, about a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result here")
    parser.add_argument("--repeats", type=int, help="interleaved repeats (default 5 quick, 15)")
    parser.add_argument("--work", type=Path, help="folder for scratch data (default: a new one)")
    given = parser.parse_args(argv)
    repeats = given.repeats or (5 if given.quick else 15)
    return Options(given.quick, given.json, repeats, given.work)


class Phases:
    """Says on standard error how long each part took, and its processor time, that of all processes
    included: on a busy machine it tells more."""

    def __init__(self) -> None:
        self.begun = self._last = time.perf_counter()
        self._used = processor_seconds()
        self.seconds: dict[str, tuple[float, float]] = {}
        """By part: wall and processor."""

    def ended(self, what: str) -> None:
        now, used = time.perf_counter(), processor_seconds()
        self.seconds[what] = (now - self._last, used - self._used)
        taken = "{:5.1f} s, processor {:5.1f} s".format(*self.seconds[what])
        print(f"{now - self.begun:6.1f} s  +{taken}  {what}", file=sys.stderr, flush=True)
        self._last, self._used = now, used


def processor_seconds() -> float:
    """Of this process and all that it started, as far as somebody waited for them or they live."""
    this = psutil.Process()
    found = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += sum(process.cpu_times()[:4])
    return found


@dataclass
class Samples:
    """What each case measured, one number a repeat."""

    by_case: dict[str, list[float]] = field(default_factory=dict)

    def add(self, case: str, number: float) -> None:
        self.by_case.setdefault(case, []).append(number)

    def add_medians(self, rounds: Samples) -> None:
        """Add each case's median over the *rounds* of one repeat."""
        for case, numbers in rounds.by_case.items():
            self.add(case, statistics.median(numbers))

    def ratio(self, yardstick: str, case: str) -> list[float]:
        """Repeat by repeat: how many times the yardstick's time the case's would fit into it."""
        pairs = zip(self.by_case[yardstick], self.by_case[case], strict=True)
        return [base / mine for base, mine in pairs]


def interleave(
    cases: dict[str, Callable[[int], float]], *, repeats: int, warm_up: int = 1
) -> Samples:
    """Run every case once a repeat, starting one case later each time; *warm_up* repeats first.

    A case gets the number of the repeat, so that it can pick bytes never stored before.
    """
    samples = Samples()
    names = list(cases)
    for repeat in range(-warm_up, repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            number = cases[name](repeat)
            if repeat >= 0:
                samples.add(name, number)
    return samples


@dataclass
class Report:
    """Collects results, prints the table, writes the JSON, decides the exit status."""

    title: str
    ratios: dict[str, float | None] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """What else the JSON is to hold: tables behind the ratios."""
    _spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    _bounds: dict[str, tuple[str, float]] = field(default_factory=dict)

    def ratio(
        self,
        name: str,
        numbers: Sequence[float] | None,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Record a ratio's repeats; several calls with one name keep the worst median.

        Give *at_most* for a growth, of which less is better.
        """
        self._record(self.ratios, name, numbers, worse=min if at_most is None else max)
        if at_least is not None:
            self._bounds[name] = (">=", at_least)
        if at_most is not None:
            self._bounds[name] = ("<=", at_most)

    def value(
        self, name: str, numbers: Sequence[float] | None, *, at_most: float | None = None
    ) -> None:
        """Record a value's repeats; several calls with one name keep the worst median."""
        self._record(self.values, name, numbers, worse=max)
        if at_most is not None:
            self._bounds[name] = ("<=", at_most)

    def _record(
        self,
        into: dict[str, float | None],
        name: str,
        numbers: Sequence[float] | None,
        *,
        worse: Callable[[float, float], float],
    ) -> None:
        if not numbers or (name in into and into[name] is None):
            into[name] = None
            return
        median = statistics.median(numbers)
        before = into.get(name)
        if before is None or worse(before, median) == median:
            into[name] = median
            self._spread[name] = (min(numbers), max(numbers))

    def short(self) -> list[str]:
        """The names that are null or outside their bound."""
        return [name for name in self.ratios | self.values if not self._holds(name)]

    def _holds(self, name: str) -> bool:
        number = (self.ratios | self.values)[name]
        if number is None:
            return False
        sign, bound = self._bounds.get(name, ("", 0.0))
        return not sign or (number >= bound if sign == ">=" else number <= bound)

    def finish(self, options: Options) -> int:
        """Print the table, write the JSON if asked; the exit status."""
        print(f"\n{self.title} ({options.repeats} interleaved repeats)")
        print(f"{'name':<34}{'median':>12}{'min':>12}{'max':>12}  bound")
        for name, number in (self.ratios | self.values).items():
            print(self._row(name, number))
        if options.json_file is not None:
            options.json_file.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        return 1 if self.short() else 0

    def _row(self, name: str, number: float | None) -> str:
        sign, bound = self._bounds.get(name, ("", 0.0))
        wanted = f"{sign} {bound:g}" if sign else ""
        verdict = "" if self._holds(name) else "  SHORT"
        if number is None:
            return f"{name:<34}{'missing':>12}{'':>12}{'':>12}  {wanted}{verdict}"
        low, high = self._spread[name]
        return f"{name:<34}{number:>12.3f}{low:>12.3f}{high:>12.3f}  {wanted}{verdict}"

    def as_json(self) -> dict[str, Any]:
        return {
            "ratios": self.ratios,
            "values": self.values,
            "details": {
                "title": self.title,
                "spread": {name: list(ends) for name, ends in self._spread.items()},
                "bounds": {name: list(bound) for name, bound in self._bounds.items()},
                "machine": machine(),
                "versions": versions(),
                **self.details,
            },
        }


def machine() -> dict[str, Any]:
    """The machine, as far as a reader of the figures needs it."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": sys.version.split()[0]}
    for name in ("forebay", "torch", "pyarrow", "numpy", "grpcio", "aiohttp", "blake3", "xxhash"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def percentile(numbers: Sequence[float], share: float) -> float:
    """The value below which *share* (0 to 1) of *numbers* lie (nearest rank)."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
