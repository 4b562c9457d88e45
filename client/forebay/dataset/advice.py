"""One sentence about what holds a training loop back: a pure function of a loader's sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

FREE_SHARE: Final = 0.05
"""Who waits for a smaller share of the time than this waits for nothing worth a change."""

READING: Final = ("origin", "throttle", "tier", "queue", "open", "network")


@dataclass(frozen=True)
class PlanFit:
    """What the daemon says of a plan and of the room for it."""

    plan_bytes: int = 0
    """Of the shards that it reads in an epoch; 0: unknown."""
    tier_bytes: Mapping[str, int] = field(default_factory=dict)
    """Tier to bytes that it can hold, the fastest first."""

    @property
    def short_bytes(self) -> int:
        """What the local tiers together lack to hold all that the plan reads."""
        return max(0, self.plan_bytes - sum(self.tier_bytes.values())) if self.tier_bytes else 0

    @property
    def fastest(self) -> str:
        """The fastest of several tiers, "" if there is one at most."""
        return next(iter(self.tier_bytes)) if len(self.tier_bytes) > 1 else ""


@dataclass(frozen=True)
class Habits:
    """How a loader reads: what may be advised to change."""

    num_columns: int = 2
    shuffle: str = "full"

    @property
    def may_take_fewer(self) -> bool:
        return self.num_columns > 1

    @property
    def may_read_runs(self) -> bool:
        return self.shuffle == "full"


@dataclass(frozen=True)
class Workload:
    """A loader's sums, as far as advice needs them; seconds."""

    seconds: float
    """Of the steps: waiting and computing."""
    stalls: Mapping[str, float]
    """Cause to seconds that the training loop waited."""
    reading_seconds: float = 0.0
    """Of all reading threads together."""
    num_threads: int = 1
    num_cpus: int = 1
    option: str = "num_threads"
    """What raises *num_threads*."""
    whole: str = "the step"
    """What *seconds* are."""
    habits: Habits = Habits()


def advise(work: Workload, fit: PlanFit | None = None) -> str:
    """What to change, or that nothing of the data's need be; "" as long as nothing is known."""
    if work.seconds <= 0.0:
        return ""
    waited = sum(work.stalls.values()) / work.seconds
    if work.whole != "the step" and waited < 1.0 - FREE_SHARE:
        idle = _percent(1.0 - waited)
        return f"the trainer is the bottleneck: workers were idle {idle} of their time"
    if waited < FREE_SHARE:
        return f"the trainer is the bottleneck: data was ready {_percent(1 - waited)} of the time"
    groups = {name: work.stalls.get(name, 0.0) for name in _ADVICE}
    groups["reading"] = sum(work.stalls.get(name, 0.0) for name in READING)
    group = max(groups, key=lambda name: groups[name])
    share = _percent(groups[group] / work.seconds)
    if group == "reading":
        cause = max(READING, key=lambda name: work.stalls.get(name, 0.0))
        about = _about_reading(cause, fit or PlanFit(), work.habits)
        return f"reading is {share} of {work.whole}: {about}"
    return f"{group} is {share} of {work.whole}: {_about_work(group, work)}"


_ADVICE: Final = {
    "transform": "a cheaper transform",
    "decode": "",  # depends on how the loader reads
    "collate": "columns of fixed shape instead of ragged ones",
    "verify": "bytes are checked at their first use, so later epochs go faster while shards stay "
    "open",
    "copy": "the way to the device is the limit: make batches smaller, or their types narrower",
}

_ABOUT: Final = {
    "origin": "it comes from the object tier or the origin: warm it first (forebay dataset warm)",
    "throttle": "a bandwidth limit, or a store that is busy, holds it back: raise the limit",
    "tier": "the local disk is the limit: {runs}have it on a faster tier",
    "queue": "the daemon is busy with other work: let fewer readers run at a time",
    "open": "opening shards is the limit: make shards larger{turn}",
    "network": "the network is the limit: {fewer}run a daemon on this node",
}


def _about_reading(cause: str, fit: PlanFit, habits: Habits) -> str:
    if cause in ("origin", "throttle") and fit.short_bytes:
        names = " and ".join(name.upper() for name in fit.tier_bytes)
        verb = "tiers are" if len(fit.tier_bytes) > 1 else "tier is"
        return f"the {names} {verb} {_size(fit.short_bytes)} short of this plan"
    if cause in ("tier", "queue") and fit.fastest:
        short = fit.plan_bytes - fit.tier_bytes[fit.fastest]
        if short > 0:
            return f"the {fit.fastest.upper()} tier is {_size(short)} short of this plan"
    return _ABOUT[cause].format(
        runs='read in larger runs (shuffle="block"), or ' if habits.may_read_runs else "",
        turn=', or read them in turn (shuffle="block")' if habits.may_read_runs else "",
        fewer="read fewer columns, or " if habits.may_take_fewer else "",
    )


def _about_work(group: str, work: Workload) -> str:
    if group in ("verify", "copy"):
        return _ADVICE[group]
    changes = [f"take {_ADVICE[group]}"] if _ADVICE[group] else []
    if group == "decode":
        if work.habits.may_take_fewer:
            changes.append("take fewer columns (columns=[…])")
        if work.habits.may_read_runs:
            changes.append('shuffle in blocks (shuffle="block")')
    threads = _more_threads(work)
    changes[:0] = [f"give {threads}"] if threads else []
    return ", or ".join(changes) or "store the column in a cheaper type, or give the job more cores"


def _more_threads(work: Workload) -> str:
    """The threads that would read as fast as the trainer computes, as far as there are cores;
    empty: not more than it has."""
    computing = work.seconds - sum(work.stalls.values())
    wanted = math.inf if computing <= 0.0 else work.reading_seconds / computing
    count = math.ceil(min(max(wanted, work.num_threads + 1.0), work.num_cpus))
    return f"{work.option}={count}" if count > work.num_threads else ""


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
