"""Which generations of a run are kept: the union of what any rule keeps, and what nobody may take.

Only committed generations of which every byte has a good copy count. A damaged one takes nobody's
place; it goes when it would have gone undamaged. No clock: times are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from forebay_server.model.lineage import Lineage, Point
from forebay_server.model.states import GenerationState
from forebay_wire.keep import Keep

_COMMITTED: Final = frozenset({GenerationState.COMMITTED})
_MAX_STEP: Final = (1 << 63) - 1


@dataclass(frozen=True)
class Facts:
    """What a decision has to know about one committed generation."""

    committed: float
    """When it was, in seconds by any clock that ``now`` is of."""
    is_good: bool = True
    """Every byte of it has a copy that is in service."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Sequence[str] = ()
    pin: str | None = None
    """Why it is pinned, empty without a reason; None: it is not."""
    is_read: bool = False
    """Somebody has it open, or was told of it a moment ago."""
    forks: Sequence[str] = ()
    """Runs that stand on it and have nothing of their own."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one generation."""

    point: Point
    is_kept: bool
    reasons: tuple[str, ...]
    """What keeps it, or why it goes."""
    is_only_read: bool = False
    """Nothing but a reader keeps it: ask again when that may be gone."""


def decide(keep: Keep, lineage: Lineage, facts: Mapping[Point, Facts], now: float) -> list[Verdict]:
    """A verdict for each of *facts*, newest first. All of them are committed, and in *lineage*.

    An attempt that restored nothing is no rollback: what the attempts before it saved is a lineage
    of its own, to which the rules apply for themselves.
    """
    good = {point for point, one in facts.items() if one.is_good}
    kept: dict[Point, list[str]] = {point: [] for point in facts}
    on_lineage: set[Point] = set()
    newest_of_all = max(lineage.parents, default=0)
    for newest, members in _by_root(lineage, facts).items():
        found: dict[Point, list[str]] = {point: [] for point in members}
        on_lineage |= _of_one_lineage(keep, lineage, newest, facts, found)
        suffix = "" if newest == newest_of_all else f" (the lineage of attempt {newest})"
        for point, reasons in found.items():
            kept[point] += [f"{reason}{suffix}" for reason in reasons]
    for point, one in facts.items():
        if keep.ttl_seconds and now - one.committed < keep.ttl_seconds:
            kept[point].append(f"ttl={keep.ttl_seconds:g} s")
        if keep.tags:
            kept[point] += [f"tag {tag}" for tag in one.tags]
        if one.pin is not None:
            kept[point].append(f"pinned: {one.pin}" if one.pin else "pinned")
        kept[point] += [f"run {fork} was forked from it" for fork in one.forks]
    for newest, members in _by_root(lineage, facts).items():
        for point, reason in _needed(lineage, newest, members & on_lineage, good).items():
            kept[point].append(reason)
        _left_behind(members - on_lineage, members & on_lineage, good, kept)
    return [
        _verdict(point, facts[point], kept[point], on_lineage)
        for point in sorted(facts, reverse=True)
    ]


def knows_metric(keep: Keep, facts: Mapping[Point, Facts]) -> bool:
    """Whether any good generation has the metric that *keep* goes by, if it goes by one: until
    then it says nothing about which is best, and all of them stay."""
    return not keep.best or any(one.is_good and keep.best in one.metrics for one in facts.values())


def metrics_known(facts: Mapping[Point, Facts]) -> list[str]:
    """The names of the metrics that good generations have."""
    return sorted({name for one in facts.values() if one.is_good for name in one.metrics})


def _by_root(lineage: Lineage, facts: Mapping[Point, Facts]) -> dict[int, set[Point]]:
    """The newest attempt of each root lineage to all generations of its attempts, those that
    rollbacks left behind included."""
    newest: dict[int | None, int] = {}
    for attempt in sorted(lineage.parents):
        newest[lineage.root(attempt)] = attempt
    members: dict[int, set[Point]] = {attempt: set() for attempt in newest.values()}
    for point in facts:
        members[newest[lineage.root(point.attempt)]].add(point)
    return members


def _of_one_lineage(
    keep: Keep,
    lineage: Lineage,
    newest: int,
    facts: Mapping[Point, Facts],
    kept: Mapping[Point, list[str]],
) -> set[Point]:
    """Add to *kept* what the rules say about the lineage of attempt *newest*; what is on it."""
    start = Point(newest, _MAX_STEP)
    line = [point for point in lineage.candidates(_COMMITTED, start=start) if point in kept]
    good = [point for point in line if facts[point].is_good]
    _by_rules(keep, good, facts, kept)
    # What a damaged one would be kept for if it were good: that takes nothing from the good ones.
    would: dict[Point, list[str]] = {point: [] for point in line}
    _by_rules(keep, line, facts, would)
    for point in set(line) - set(good):
        kept[point] += [f"damaged; {reason}" for reason in would[point]]
    return set(line)


def seconds_until_change(keep: Keep, facts: Mapping[Point, Facts], now: float) -> float | None:
    """When *keep* may decide otherwise without anything having happened; None: never."""
    if not keep.ttl_seconds:
        return None
    left = [one.committed + keep.ttl_seconds - now for one in facts.values()]
    return min((seconds for seconds in left if seconds > 0), default=None)


def _verdict(point: Point, one: Facts, kept: list[str], on_lineage: set[Point]) -> Verdict:
    if kept or one.is_read:
        reasons = [*kept, *(["somebody reads it"] if one.is_read else [])]
        return Verdict(point, True, tuple(reasons), is_only_read=not kept)
    if point not in on_lineage:
        return Verdict(point, False, ("a rollback left it behind",))
    return Verdict(point, False, ("no rule keeps it",) if one.is_good else ("damaged",))


def _by_rules(
    keep: Keep,
    newest_first: Sequence[Point],
    facts: Mapping[Point, Facts],
    kept: Mapping[Point, list[str]],
) -> None:
    """Add what last, every_* and best keep of these to *kept*."""
    for point in newest_first[: keep.last]:
        kept[point].append(f"last={keep.last}")
    oldest_first = newest_first[::-1]
    if keep.every_steps:
        seen: set[int] = set()
        for point in oldest_first:
            multiple = point.step // keep.every_steps
            if multiple not in seen and (multiple or not point.step):
                seen.add(multiple)
                kept[point].append(f"every_steps={keep.every_steps}")
    _by_interval(keep, oldest_first, facts, kept)
    if not knows_metric(keep, facts):
        best = dict.fromkeys(newest_first, f"no generation has the metric {keep.best}")
    else:
        found = _best_first(keep, newest_first, facts)[: keep.best_k]
        by = f"of {keep.best_k} by {keep.mode} {keep.best}"
        best = {point: f"best {place} {by}" for place, point in enumerate(found, 1)}
    for point, reason in best.items():
        kept[point].append(reason)


def _by_interval(
    keep: Keep,
    oldest_first: Sequence[Point],
    facts: Mapping[Point, Facts],
    kept: Mapping[Point, list[str]],
) -> None:
    if keep.interval_seconds:
        due = -math.inf
        for point in oldest_first:
            if facts[point].committed >= due:
                due = facts[point].committed + keep.interval_seconds
                kept[point].append(f"every_seconds={keep.interval_seconds:g}")


def _best_first(
    keep: Keep, newest_first: Sequence[Point], facts: Mapping[Point, Facts]
) -> list[Point]:
    """Those that have the metric, best first; of equal ones the newer comes first."""
    if not keep.best:
        return []
    return best_first(keep.best, keep.mode, {p: facts[p].metrics for p in newest_first})


def best_first(
    metric: str, mode: str, newest_first: Mapping[Point, Mapping[str, float]]
) -> list[Point]:
    """Points by their *metric*, best first; those without one that is finite are left out. Of equal
    ones the one that comes first in *newest_first* does."""
    sign = -1.0 if mode == "max" else 1.0
    values = {
        point: sign * metrics[metric]
        for point, metrics in newest_first.items()
        if math.isfinite(metrics.get(metric, math.nan))
    }
    return sorted(values, key=lambda point: values[point])


def _needed(
    lineage: Lineage, newest: int, on_lineage: set[Point], good: set[Point]
) -> dict[Point, str]:
    """The generations that a resume from attempt *newest* needs, whatever the rules."""
    needed: dict[Point, str] = {}
    newest_first = [p for p in lineage.walk(Point(newest, _MAX_STEP)) if p in on_lineage]
    newest_good = next((point for point in newest_first if point in good), None)
    for point in newest_first:  # damaged ones that are newer may come back
        if newest_good is None or point == newest_good:
            break
        needed[point] = "damaged, and newer than what can be restored"
    if newest_good is None:
        # Nothing to fall back to: all that there is stays.
        return dict.fromkeys(on_lineage, "the lineage has no good generation")
    needed[newest_good] = "the newest good one"
    parent = lineage.parents.get(newest)
    if parent in on_lineage and newest_good.attempt != newest:
        assert parent is not None
        needed.setdefault(parent, f"attempt {newest} stands on it")
    return needed


def _left_behind(
    left: set[Point],
    on_lineage: set[Point],
    good: set[Point],
    kept: Mapping[Point, list[str]],
) -> None:
    """What rollbacks left stays until something newer is committed on the lineage."""
    newest = max((point.attempt for point in on_lineage if point in good), default=0)
    for point in left:
        if point.attempt >= newest:
            kept[point].append("nothing newer is committed on the lineage")
