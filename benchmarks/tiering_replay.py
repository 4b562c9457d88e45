"""The half of ``tiering.py`` that replays traces through cache policies, without any data.

The daemon's own decisions (``forebay_server.model``) are imported unchanged; its peers are in
``tiering_peers.py``. A hit rate is the share of the bytes read that were in the cache.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness import Options, Report
from tiering_peers import REACTIVE, Belady, Policy
from tiering_traces import ONE_JOB, PLANNED, UNPLANNED, Job, Read, Trace

from forebay_server.model.admission import ReactiveCache
from forebay_server.model.lookahead import OrderView
from forebay_server.model.nextuse import Admission, NextUse

QUICK_BLOBS, FULL_BLOBS = 300, 1000
QUICK_REPEATS = 3
"""Replays are exact: a repeat differs only by its seeds."""

OPTIMUM = "optimum"
PLANS = "Forebay, plans"
NO_PLANS = "Forebay, no plans"


class NoPlans:
    """The daemon's policy for readers that say nothing."""

    def __init__(self, capacity: int) -> None:
        self.policy = ReactiveCache(capacity)
        self.room = capacity
        self.sizes: dict[str, int] = {}

    def access(self, blob: str, num_bytes: int) -> bool:
        if self.policy.access(blob, num_bytes):
            return True
        answer = self.policy.should_admit(blob, num_bytes, self.room)
        if answer.admit:
            for victim in answer.victims:
                self.room += self.sizes.pop(victim)
                self.policy.removed(victim)
            self.sizes[blob] = num_bytes
            self.room -= num_bytes
            self.policy.stored(blob, num_bytes)
        return False


@dataclass
class Plans:
    """The daemon's policy for loaders with plans; it sees time stamps, never the trace.

    A plan comes with its loader's first read and goes after its last, as a lease would end it.
    """

    room: int
    last_reads: dict[str, int]
    """Job to the index of its last read."""
    known: NextUse = field(default_factory=NextUse)
    views: dict[str, OrderView] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def read(self, index: int, read: Read, num_bytes: int) -> bool:
        now = float(index)
        if read.job is not None:
            self._advance(read.job, read, now)
        hit = read.blob in self.sizes
        if hit:
            self.known.touched(read.blob, now)
        else:
            answer = self.known.should_admit(read.blob, num_bytes, self.room)
            self._apply(answer, read.blob, num_bytes, now)
        if read.job is not None and self.last_reads[read.job.name] == index:
            self.known.remove_plan(read.job.name)
        return hit

    def _advance(self, job: Job, read: Read, now: float) -> None:
        if job.name not in self.views:
            view = OrderView(job.order, job.blobs, [job.rows] * job.num_blobs, read.position)
            self.views[job.name] = view
            self.known.add_plan(job.name, view, read.position, now)
        elif read.position > self.positions[job.name]:
            self.known.advance(job.name, read.position, now)
            self.views[job.name].forget_before(read.position)
        self.positions[job.name] = read.position
        self.known.served(job.name, read.blob)

    def _apply(self, answer: Admission, blob: str, num_bytes: int, now: float) -> None:
        if not answer.admit:
            return
        for victim in answer.victims:
            self.room += self.sizes.pop(victim)
            self.known.removed(victim)
        self.room -= num_bytes
        if self.room < 0:
            raise AssertionError(f"the cache holds {-self.room} bytes too many")
        self.sizes[blob] = num_bytes
        self.known.stored(blob, num_bytes, now)


def hit_rate(trace: Trace, access: Callable[[int, Read, int], bool]) -> float:
    """The share of bytes that *access*, called with each read in turn, says were there."""
    hit_bytes = all_bytes = 0
    for index, read in enumerate(trace.reads):
        num_bytes = trace.sizes.get(read.blob, 1)
        hit = access(index, read, num_bytes)
        if index >= trace.num_warm:
            hit_bytes += num_bytes * hit
            all_bytes += num_bytes
    return hit_bytes / all_bytes


def replay(trace: Trace) -> dict[str, float]:
    """Policy to hit rate."""

    def blind(policy: Policy) -> float:
        return hit_rate(trace, lambda _, read, num_bytes: policy.access(read.blob, num_bytes))

    rates = {name: blind(kind(trace.capacity)) for name, kind in REACTIVE.items()}
    rates[OPTIMUM] = blind(Belady(trace.capacity, [read.blob for read in trace.reads]))
    rates[NO_PLANS] = blind(NoPlans(trace.capacity))
    if trace.name in PLANNED:
        last = {read.job.name: index for index, read in enumerate(trace.reads) if read.job}
        rates[PLANS] = hit_rate(trace, Plans(trace.capacity, last).read)
    return rates


def best_reactive(rates: dict[str, float]) -> float:
    return max(rates[name] for name in REACTIVE)


Rates = dict[str, dict[str, float]]
"""Trace to policy to hit rate."""


def add_to(report: Report, options: Options) -> None:
    """Replay every trace, once a repeat on another order, and record the ratios."""
    num_blobs = QUICK_BLOBS if options.quick else FULL_BLOBS
    num_repeats = min(options.repeats, QUICK_REPEATS) if options.quick else options.repeats
    traces = PLANNED | UNPLANNED
    repeats: list[Rates] = [
        {name: replay(make(num_blobs, seed)) for name, make in traces.items()}
        for seed in range(num_repeats)
    ]
    rows = {
        name: {
            policy: statistics.median(rates[name][policy] for rates in repeats)
            for policy in repeats[0][name]
        }
        for name in traces
    }
    print_rates(rows)
    report.details["hit_rates"] = rows
    record(report, repeats)
    if options.json_file is not None:
        with contextlib.suppress(ImportError):
            plot(rows, options.json_file.with_suffix(".replay.png"))


def record(report: Report, repeats: list[Rates]) -> None:
    """The ratios that have bounds, and how far two jobs are from the optimum."""
    for name in ONE_JOB:
        ratios = [rates[name][PLANS] / rates[name][OPTIMUM] for rates in repeats]
        report.ratio("one_job_vs_optimum", ratios, at_least=0.98)
    for name in PLANNED:
        if name.startswith("two jobs"):
            ratios = [rates[name][PLANS] / rates[name][OPTIMUM] for rates in repeats]
            report.ratio("two_jobs_vs_optimum", ratios)
    turnovers = [rates["turnover, 50 %"] for rates in repeats]
    report.ratio(
        "turnover_vs_best_reactive",
        [rates[PLANS] / best_reactive(rates) for rates in turnovers],
        at_least=1.3,
    )
    no_plan = [
        [rates[NO_PLANS] / best_reactive(rates) for rates in repeat.values()] for repeat in repeats
    ]
    report.ratio(
        "no_plan_geomean_vs_best_reactive",
        [math.prod(ratios) ** (1 / len(ratios)) for ratios in no_plan],
        at_least=0.95,
    )
    report.ratio("no_plan_min_vs_best_reactive", [min(ratios) for ratios in no_plan], at_least=0.8)


def print_rates(rows: Rates) -> None:
    policies = [*REACTIVE, OPTIMUM, NO_PLANS, PLANS]
    print(f"\n{'bytes hit, %':<30}" + "".join(f"{name:>19}" for name in policies))
    for trace, rates in rows.items():
        cells = [f"{100 * rates[name]:.1f}" if name in rates else "-" for name in policies]
        print(f"{trace:<30}" + "".join(f"{cell:>19}" for cell in cells))


def plot(rows: Rates, path: Path) -> None:
    """Bars of the hit rates. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    policies = [*REACTIVE, NO_PLANS, PLANS, OPTIMUM]
    figure, axes = pyplot.subplots(figsize=(14, 5), layout="constrained")
    width = 0.8 / len(policies)
    for number, policy in enumerate(policies):
        places = [index + number * width for index in range(len(rows))]
        axes.bar(places, [rates.get(policy, 0.0) for rates in rows.values()], width, label=policy)
    axes.set_xticks([index + 0.35 for index in range(len(rows))], list(rows), rotation=20)
    axes.set_ylabel("share of bytes hit")
    axes.legend(ncols=len(policies), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
