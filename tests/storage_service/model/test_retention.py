"""What is kept of a run: tables for each rule, and random runs against a plain oracle."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay_server.model.lineage import Lineage, Point
from forebay_server.model.retention import Facts, decide, seconds_until_change
from forebay_server.model.states import GenerationState
from forebay_wire.errors import InvalidRequest
from forebay_wire.keep import Keep, check_tag


def run_of(*steps: int, **facts: Facts) -> tuple[Lineage, dict[Point, Facts]]:
    """One attempt with these steps, each committed 10 s after the one before."""
    found = {Point(1, step): Facts(10.0 * number) for number, step in enumerate(steps)}
    found |= {Point(1, int(step[1:])): one for step, one in facts.items()}
    return lineage_of({1: None}, found), found


def lineage_of(parents: dict[int, Point | None], facts: dict[Point, Facts]) -> Lineage:
    return Lineage(parents, dict.fromkeys(facts, GenerationState.COMMITTED))


def kept(keep: Keep, run: tuple[Lineage, dict[Point, Facts]], now: float = 1e6) -> list[int]:
    return sorted(one.point.step for one in decide(keep, *run, now) if one.is_kept)


def with_metrics(values: dict[int, float]) -> tuple[Lineage, dict[Point, Facts]]:
    facts = {f"s{step}": Facts(float(step), metrics={"m": v}) for step, v in values.items()}
    return run_of(**facts)


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (Keep(last=2), [50, 60]),
        (Keep(last=100), [0, 10, 20, 30, 40, 50, 60]),
        (Keep(every_steps=25), [0, 30, 50, 60]),
        (Keep(every_steps=20), [0, 20, 40, 60]),
        (Keep(every_seconds=25), [0, 30, 60]),
        (Keep(every_hours=25 / 3600), [0, 30, 60]),
        (Keep(last=2, every_steps=30), [0, 30, 50, 60]),
        (Keep(ttl=15), [50, 60]),
        (Keep(every_steps=1000), [0, 60]),
    ],
)
def test_rules_keep_their_union_and_the_newest(keep: Keep, steps: list[int]) -> None:
    assert kept(keep, run_of(*range(0, 70, 10)), now=60.0) == steps


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (Keep(best="m"), [2, 4]),
        (Keep(best="m", best_k=2), [1, 2, 4]),
        (Keep(best="m", mode="min"), [3, 4]),
        (Keep(last=1, best="other"), [1, 2, 3, 4]),
    ],
)
def test_best_by_a_metric(keep: Keep, steps: list[int]) -> None:
    assert kept(keep, with_metrics({1: 0.5, 2: 0.9, 3: 0.1, 4: 0.4})) == steps


def test_values_that_are_not_finite_are_never_the_best() -> None:
    run = with_metrics({1: 0.1, 2: math.nan, 3: math.inf, 4: -math.inf, 5: math.nan})
    assert kept(Keep(best="m"), run) == [1, 5]
    assert kept(Keep(best="m", mode="min"), run) == [1, 5]


def test_the_steps_before_the_first_multiple_are_not_kept_for_it() -> None:
    assert kept(Keep(every_steps=100), run_of(50, 90, 130, 170, 230)) == [130, 230]


def test_of_equal_ones_the_newer_is_better() -> None:
    assert kept(Keep(best="m"), with_metrics({1: 0.5, 2: 0.5, 3: 0.1})) == [2, 3]


def test_damaged_ones_take_nobodys_place() -> None:
    run = run_of(1, 2, 3, s4=Facts(40, is_good=False), s5=Facts(50, is_good=False))
    assert kept(Keep(last=2), run) == [2, 3, 4, 5]
    older = run_of(3, 4, s1=Facts(1, is_good=False), s2=Facts(2, is_good=False))
    assert kept(Keep(last=2), older) == [3, 4]
    assert kept(Keep(last=3), older) == [2, 3, 4]


def test_without_a_good_one_everything_stays() -> None:
    bad = {f"s{step}": Facts(step, is_good=False) for step in range(5)}
    assert kept(Keep(last=1), run_of(**bad)) == list(range(5))


@pytest.mark.parametrize(
    "facts",
    [
        Facts(0, tags=["a"]),
        Facts(0, pin=""),
        Facts(0, pin="why"),
        Facts(0, is_read=True),
        Facts(0, forks=["other"]),
    ],
)
def test_what_somebody_needs_stays(facts: Facts) -> None:
    assert kept(Keep(last=1), run_of(2, 3, s1=facts)) == [1, 3]
    assert kept(Keep(last=1), run_of(2, 3, s1=replace(facts, is_good=False))) == [1, 3]


def test_tags_keep_nothing_if_the_policy_says_so() -> None:
    assert kept(Keep(last=1, tags=False), run_of(2, 3, s1=Facts(0, tags=["a"]))) == [3]


def test_a_rolled_back_one_goes_first_and_not_before_something_newer_is_committed() -> None:
    facts = {Point(1, step): Facts(step) for step in (10, 20, 30)}
    rolled = {1: None, 2: Point(1, 10)}
    before = decide(Keep(last=1), lineage_of(rolled, facts), facts, 100.0)
    assert {one.point: one.is_kept for one in before} == dict.fromkeys(facts, True)
    facts[Point(2, 20)] = Facts(50, is_good=False)
    assert all(one.is_kept for one in decide(Keep(last=1), lineage_of(rolled, facts), facts, 100.0))
    facts[Point(2, 20)] = Facts(50)
    after = decide(Keep(last=3), lineage_of(rolled, facts), facts, 100.0)
    assert [one.point for one in after if one.is_kept] == [(2, 20), (1, 10)]
    assert {one.reasons for one in after if not one.is_kept} == {("a rollback left it behind",)}


def test_an_attempt_that_restored_nothing_is_no_rollback() -> None:
    facts = {Point(1, step): Facts(step) for step in (10, 20, 30)}
    facts |= {Point(2, 11): Facts(40), Point(3, 1): Facts(50)}
    found = decide(
        Keep(last=2), lineage_of({1: None, 2: Point(1, 10), 3: None}, facts), facts, 100.0
    )
    assert [one.point for one in found if one.is_kept] == [(3, 1), (2, 11), (1, 10)]
    said = {one.point: one.reasons for one in found}
    assert said[Point(2, 11)] == ("last=2 (the lineage of attempt 2)", "the newest good one")
    assert said[Point(1, 20)] == ("a rollback left it behind",)


def test_what_the_newest_attempt_stands_on_stays() -> None:
    facts = {Point(1, step): Facts(step) for step in (10, 20)}
    facts[Point(1, 10)] = Facts(10, is_good=False)
    found = decide(Keep(last=1), lineage_of({1: None, 2: Point(1, 10)}, facts), facts, 100.0)
    assert all(one.is_kept for one in found)


def test_ttl_says_when_to_look_again() -> None:
    _, facts = run_of(1, 2, 3)
    assert seconds_until_change(Keep(ttl=100), facts, 50.0) == 50.0
    assert seconds_until_change(Keep(ttl=100), facts, 500.0) is None
    assert seconds_until_change(Keep(last=1), facts, 50.0) is None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"last": -1},
        {"last": True},
        {"best": "m", "mode": "up"},
        {"best": "m", "best_k": 0},
        {"ttl": math.nan},
        {"last": 1, "every_seconds": 1, "every_hours": 1},
    ],
)
def test_policies_that_mean_nothing_are_refused(values: dict) -> None:
    with pytest.raises(InvalidRequest, match="Keep"):
        Keep(**values)


def test_a_policy_is_the_same_after_json() -> None:
    keep = Keep(last=3, every_hours=2, best="accuracy", best_k=2, mode="min", tags=False)
    assert Keep.from_json(keep.to_json()) == keep
    assert Keep.from_json("") is None
    for text in ("{", "[]", '{"lats": 1}', "{}"):
        with pytest.raises(InvalidRequest):
            Keep.from_json(text)


@pytest.mark.parametrize("tag", ["latest", "best", "100", "2/5", "", "a b", "é"])
def test_tags_that_look_like_selectors_are_refused(tag: str) -> None:
    with pytest.raises(InvalidRequest):
        check_tag(tag)


# ----------------------------------------------------------------------------------------- oracle

KEEPS = st.builds(
    Keep,
    last=st.integers(1, 3),
    every_steps=st.sampled_from([0, 3, 5]),
    every_seconds=st.sampled_from([0.0, 4.0]),
    best=st.sampled_from(["", "m"]),
    best_k=st.integers(1, 2),
    mode=st.sampled_from(["max", "min"]),
    ttl=st.sampled_from([0.0, 6.0]),
)


def oracle(keep: Keep, lineage: Lineage, facts: dict[Point, Facts], now: float) -> set[Point]:
    """The good ones that have to stay, rule by rule, told as the documentation tells them."""
    stays: set[Point] = set()
    for point, one in facts.items():
        young = keep.ttl_seconds and now - one.committed < keep.ttl_seconds
        if young or one.tags or one.pin is not None or one.forks or one.is_read:
            stays.add(point)
    roots = {attempt: root_of(lineage, attempt) for attempt in lineage.parents}
    is_known = any(keep.best in one.metrics for one in facts.values() if one.is_good)
    for root in set(roots.values()):
        mine = {point: one for point, one in facts.items() if roots[point.attempt] == root}
        parents = {a: parent for a, parent in lineage.parents.items() if roots[a] == root}
        stays |= of_one(keep, lineage_of(parents, mine), mine)
        if keep.best and not is_known:
            stays |= set(lineage_of(parents, mine).walk())
    return {point for point in stays if facts[point].is_good}


def root_of(lineage: Lineage, attempt: int) -> int:
    parent = lineage.parents[attempt]
    return attempt if parent is None else root_of(lineage, parent.attempt)


def of_one(keep: Keep, lineage: Lineage, facts: dict[Point, Facts]) -> set[Point]:
    line = [point for point in lineage.walk() if facts[point].is_good]
    stays = set(line[: max(keep.last, 1)]) | by_time(keep, line, facts) | best(keep, line, facts)
    if keep.every_steps:
        for multiple in range(200):
            bucket = [point for point in line if point.step // keep.every_steps == multiple]
            if bucket and (multiple or bucket[-1].step == 0):
                stays.add(bucket[-1])
    parent = lineage.parents[max(lineage.parents)]
    if parent in facts and (not line or line[0].attempt != max(lineage.parents)):
        stays.add(parent)
    behind = facts.keys() - set(lineage.walk())
    return stays | {point for point in behind if not line or point.attempt >= line[0].attempt}


def by_time(keep: Keep, line: list[Point], facts: dict[Point, Facts]) -> set[Point]:
    stays: set[Point] = set()
    due = None
    for point in reversed(line):
        if keep.interval_seconds and (due is None or facts[point].committed >= due):
            stays.add(point)
            due = facts[point].committed + keep.interval_seconds
    return stays


def best(keep: Keep, line: list[Point], facts: dict[Point, Facts]) -> set[Point]:
    if not keep.best:
        return set()
    sign = 1 if keep.mode == "max" else -1
    scored = [p for p in line if math.isfinite(facts[p].metrics.get("m", math.nan))]
    stays: set[Point] = set()
    while scored and len(stays) < keep.best_k:
        top = max(sign * facts[p].metrics["m"] for p in scored)
        winner = next(p for p in scored if sign * facts[p].metrics["m"] == top)
        stays.add(winner)
        scored.remove(winner)
    return stays


class Run(RuleBasedStateMachine):
    """A run that is saved, fails, is damaged, tagged, pinned, rolled back and pruned."""

    @initialize(keep=KEEPS, saves=st.lists(st.integers(1, 4), min_size=2, max_size=6))
    def begin(self, keep: Keep, saves: list[int]) -> None:
        self.keep = keep
        self.now = 0.0
        self.parents: dict[int, Point | None] = {1: None}
        self.facts: dict[Point, Facts] = {}
        self.states: dict[Point, GenerationState] = {}
        for more in saves:
            self.save(more, float(more % 3))

    @property
    def lineage(self) -> Lineage:
        committed = dict.fromkeys(self.facts, GenerationState.COMMITTED)
        return Lineage(self.parents, self.states | committed)

    @rule(more=st.integers(1, 4), metric=st.sampled_from([0.0, 1.0, 2.0, math.nan]))
    def save(self, more: int, metric: float) -> None:
        self.now += 1.0
        point = self._next(more)
        self.facts[point] = Facts(self.now, metrics={"m": metric})
        self.prune()

    @rule(more=st.integers(1, 4), state=st.sampled_from(["failed", "aborted", "open", "sealed"]))
    def fail(self, more: int, state: str) -> None:
        before = self._good()
        self.states[self._next(more)] = GenerationState(state)
        self.prune()
        assert not before or self._good(), "a failed save pushed the last good one out"

    @precondition(lambda self: self.facts)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        point = data.draw(st.sampled_from(sorted(self.facts)))
        self.facts[point] = replace(self.facts[point], is_good=False)
        before = self._good()
        self.prune()
        assert not before or self._good()

    @precondition(lambda self: self.facts)
    @rule(data=st.data(), what=st.sampled_from(["tag", "pin", "fork", "read", "free"]))
    def need(self, data: st.DataObject, what: str) -> None:
        point = data.draw(st.sampled_from(sorted(self.facts)))
        changes = {
            "tag": {"tags": ("a",)},
            "pin": {"pin": ""},
            "fork": {"forks": ("f",)},
            "read": {"is_read": True},
            "free": {"tags": (), "pin": None, "forks": (), "is_read": False},
        }[what]
        self.facts[point] = replace(self.facts[point], **changes)

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        points = sorted(self.facts)
        parent = data.draw(st.sampled_from(points)) if points else None
        self.parents[max(self.parents) + 1] = parent
        self.prune()

    @rule()
    def start_afresh(self) -> None:
        self.parents[max(self.parents) + 1] = None
        self.prune()

    @rule(keep=KEEPS)
    def change_policy(self, keep: Keep) -> None:
        self.keep = keep

    @rule()
    def prune(self) -> None:
        found = decide(self.keep, self.lineage, self.facts, self.now)
        assert {one.point for one in found} == set(self.facts)
        good = {one.point for one in found if one.is_kept and self.facts[one.point].is_good}
        assert good == oracle(self.keep, self.lineage, self.facts, self.now)
        assert all(one.reasons for one in found)
        before = self.lineage.latest({GenerationState.COMMITTED})
        for one in found:
            if not one.is_kept:
                del self.facts[one.point]
        assert self.lineage.latest({GenerationState.COMMITTED}) == before
        again = decide(self.keep, self.lineage, self.facts, self.now)
        assert [one.point for one in again if one.is_kept and self.facts[one.point].is_good] == [
            one.point for one in again if self.facts[one.point].is_good
        ], "pruning twice takes more than pruning once"

    def _good(self) -> set[Point]:
        return {point for point, one in self.facts.items() if one.is_good}

    def _next(self, more: int) -> Point:
        attempt = max(self.parents)
        known = [p.step for p in [*self.facts, *self.states] if p.attempt == attempt]
        parent = self.parents[attempt]
        return Point(attempt, max([*known, parent.step if parent else 0]) + more)

    @invariant()
    def nothing_needed_is_gone(self) -> None:
        if self.facts and (parent := self.parents[max(self.parents)]) is not None:
            own = [p for p in self._good() if p.attempt == max(self.parents)]
            assert own or parent in self.facts


Run.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestRun = Run.TestCase
