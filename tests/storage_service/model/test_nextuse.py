"""Next use over all plans: what goes first, what is worth its room."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forebay_server.model.nextuse import NextUse, first_uses


class Listed:
    """A plan that needs one of *blobs* at each position."""

    def __init__(self, blobs: Sequence[str], seconds: float | None = 1.0) -> None:
        self.blobs = blobs
        self.seconds_per_position = seconds

    def next_position(self, blob: str, start: int) -> float | None:
        found = (at for at in range(start, len(self.blobs)) if self.blobs[at] == blob)
        return next(found, None)

    def uses(self, start: int) -> Iterator[tuple[int, str]]:
        return ((at, self.blobs[at]) for at in range(start, len(self.blobs)))


def keeping(*blobs: str) -> NextUse:
    known = NextUse()
    for at, blob in enumerate(blobs):
        known.stored(blob, 10, float(at))
    return known


def test_the_farthest_next_use_goes_first() -> None:
    known = keeping(*"abcd")
    known.add_plan("p", Listed("dbca"), 0, 10.0)
    assert known.victims(25) == ["a", "c", "b"]


def test_what_no_plan_needs_goes_before_all_else_least_recently_used_first() -> None:
    known = keeping(*"xaby")
    known.add_plan("p", Listed("ab"), 0, 10.0)
    known.touched("x", 20.0)
    assert known.victims(40) == ["y", "x", "b", "a"]


def test_the_nearest_of_several_plans_counts() -> None:
    known = keeping(*"abc")
    known.add_plan("p", Listed("abc"), 0, 0.0)
    known.add_plan("q", Listed("ca"), 0, 0.0)
    assert known.victims(30) == ["b", "a", "c"] or known.victims(30) == ["b", "c", "a"]
    known.remove_plan("q")
    assert known.victims(30) == ["c", "b", "a"]


def test_a_slow_loader_needs_its_blobs_later() -> None:
    known = keeping("fast", "slow")
    known.add_plan("f", Listed(["other"] * 10 + ["fast"], None), 0, 0.0)
    known.add_plan("s", Listed(["other"] * 5 + ["slow"], None), 0, 0.0)
    assert known.victims(1) == ["fast"]
    known.advance("f", 2, 2.0)  # a second each: "fast" is needed at 10
    known.advance("s", 2, 8.0)  # four seconds each: "slow" is needed at 20
    assert known.victims(1) == ["slow"]
    assert known.next_use("slow") == pytest.approx(20.0)


def test_a_passed_blob_is_needed_at_its_next_use() -> None:
    known = keeping(*"ab")
    known.add_plan("p", Listed("abba"), 0, 0.0)
    assert known.victims(1) == ["b"]
    known.advance("p", 1, 1.0)
    assert known.victims(1) == ["a"]
    known.advance("p", 4, 4.0)
    assert known.next_use("a") is None


def test_a_served_use_does_not_count_again() -> None:
    known = keeping(*"ab")
    known.add_plan("p", Listed("abba"), 0, 0.0)
    known.served("p", "a")
    assert known.next_use("a") == pytest.approx(3.0)
    assert known.victims(1) == ["a"]
    known.advance("p", 1, 1.0)
    assert known.next_use("a") == pytest.approx(3.0)


def test_a_missed_blob_is_kept_only_if_needed_earlier_than_what_must_go() -> None:
    known = keeping(*"ab")
    known.add_plan("p", Listed("acbd"), 0, 0.0)
    assert known.should_admit("c", 10, 0).victims == ("b",)
    assert not known.should_admit("d", 10, 0).admit
    assert known.should_admit("d", 10, 10).admit
    assert not known.should_admit("c", 20, 0).admit  # "a" is needed before "c"
    assert not known.should_admit("unplanned", 10, 100).admit


def test_what_must_not_go_is_passed_over() -> None:
    known = keeping(*"abc")
    known.add_plan("p", Listed("abc"), 0, 0.0)
    assert known.victims(10, lambda blob: blob != "c") == ["b"]
    assert known.victims(10) == ["c"]


def test_a_position_that_goes_backwards_is_refused() -> None:
    known = keeping()
    known.add_plan("p", Listed("abc"), 2, 0.0)
    with pytest.raises(ValueError, match="goes back from position 2 to 1"):
        known.advance("p", 1, 1.0)


def test_deadlines_merge_the_plans_by_time() -> None:
    known = keeping()
    known.add_plan("p", Listed("abca", 1.0), 0, 0.0)
    known.add_plan("q", Listed("xya", 1.5), 0, 0.0)
    assert [use.blob for use in known.deadlines()] == ["a", "x", "b", "y", "c", "a", "a"]
    ahead = first_uses(known.deadlines(), 10, until=2.5)
    assert [use.blob for use in ahead] == ["a", "x", "b", "y", "c"]
    assert len(first_uses(known.deadlines(), 2, until=math.inf)) == 2


@settings(max_examples=50)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=600), st.integers(1, 300))
def test_after_enough_calls_the_order_is_exact_however_many_blobs(
    order: list[int], num_gone: int
) -> None:
    known = keeping(*(str(one) for one in range(401)))
    known.add_plan("p", Listed([str(one) for one in order]), 0, 1000.0)
    for _ in range(10):
        known.touched("none", 0.0)
        known.victims(1)
    first = {str(blob): at for at, blob in reversed(list(enumerate(order)))}
    expected = sorted(
        (str(one) for one in range(401)),
        key=lambda blob: (-first.get(blob, math.inf), int(blob)),
    )
    assert known.victims(10 * num_gone) == expected[:num_gone]


BLOBS = [f"b{index}" for index in range(8)]
blobs = st.sampled_from(BLOBS)


class NextUseMachine(RuleBasedStateMachine):
    """Against the definition: sort by the earliest listed use, all plans equally fast."""

    def __init__(self) -> None:
        super().__init__()
        self.known = NextUse()
        self.resident: dict[str, tuple[int, float]] = {}
        self.plans: dict[str, tuple[list[str], int, float]] = {}
        self.served: dict[tuple[str, str], int] = {}
        self.now = 0.0

    def expected_use(self, blob: str) -> float:
        times = [math.inf]
        for plan, (order, position, start) in self.plans.items():
            first = max(position, self.served.get((plan, blob), 0))
            times += [start + at for at in range(first, len(order)) if order[at] == blob]
        return min(times)

    @rule(name=st.sampled_from("pqr"), order=st.lists(blobs, max_size=30))
    def add_plan(self, name: str, order: list[str]) -> None:
        if name in self.plans:
            self.known.remove_plan(name)
            self.served = {key: at for key, at in self.served.items() if key[0] != name}
        self.plans[name] = (order, 0, self.now)
        self.known.add_plan(name, Listed(order), 0, self.now)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def remove_plan(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.plans)))
        del self.plans[name]
        self.served = {key: at for key, at in self.served.items() if key[0] != name}
        self.known.remove_plan(name)

    @rule(seconds=st.integers(0, 5))
    def let_time_pass(self, seconds: int) -> None:
        """All loaders go on at one position a second."""
        self.now += seconds
        for name, (order, _, start) in self.plans.items():
            position = int(self.now - start)
            self.plans[name] = (order, position, start)
            self.known.advance(name, position, self.now)

    @precondition(lambda self: self.plans)
    @rule(blob=blobs, data=st.data())
    def serve(self, blob: str, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.plans)))
        order, position, _ = self.plans[name]
        first = max(position, self.served.get((name, blob), 0))
        ahead = [at for at in range(first, len(order)) if order[at] == blob]
        if ahead:
            self.served[name, blob] = ahead[0] + 1
        self.known.served(name, blob)

    @rule(blob=blobs, num_bytes=st.integers(1, 20))
    def store(self, blob: str, num_bytes: int) -> None:
        _, last_used = self.resident.get(blob, (0, self.now))
        self.resident[blob] = (num_bytes, last_used)
        self.known.stored(blob, num_bytes, self.now)

    @rule(blob=blobs)
    def touch(self, blob: str) -> None:
        if blob in self.resident:
            self.resident[blob] = (self.resident[blob][0], self.now)
        self.known.touched(blob, self.now)

    @rule(blob=blobs)
    def remove(self, blob: str) -> None:
        self.resident.pop(blob, None)
        self.known.removed(blob)

    @rule(bytes_needed=st.integers(0, 100), kept=st.sets(blobs, max_size=3))
    def ask_for_victims(self, bytes_needed: int, kept: set[str]) -> None:
        found = self.known.victims(bytes_needed, lambda blob: blob not in kept)
        assert not kept & set(found)
        assert len(set(found)) == len(found)
        keys = [self.key(blob) for blob in found]
        assert keys == sorted(keys)
        others = [self.key(blob) for blob in self.resident if blob not in {*found, *kept}]
        if keys and others:
            assert keys[-1] <= min(others)
        sizes = [self.resident[blob][0] for blob in found]
        assert sum(sizes) >= bytes_needed or not others
        assert sum(sizes[:-1]) < bytes_needed or not found

    @rule(blob=blobs, num_bytes=st.integers(1, 30), room=st.integers(0, 20))
    def ask_for_admission(self, blob: str, num_bytes: int, room: int) -> None:
        if blob in self.resident:
            return
        answer = self.known.should_admit(blob, num_bytes, room)
        use = self.expected_use(blob)
        farther = [one for one in self.resident if self.expected_use(one) > use]
        fits = room + sum(self.resident[one][0] for one in farther) >= num_bytes
        assert answer.admit == (use < math.inf and fits)
        assert all(self.expected_use(victim) > use for victim in answer.victims)
        freed = sum(self.resident[victim][0] for victim in answer.victims)
        assert not answer.admit or room + freed >= num_bytes

    def key(self, blob: str) -> tuple[float, float]:
        return (-self.expected_use(blob), self.resident[blob][1])

    @invariant()
    def next_uses_agree(self) -> None:
        for blob in BLOBS:
            found = self.known.next_use(blob)
            assert (math.inf if found is None else found) == pytest.approx(self.expected_use(blob))
        assert len(self.known) == len(self.resident)
        assert all((blob in self.known) == (blob in self.resident) for blob in BLOBS)


TestNextUse = NextUseMachine.TestCase
TestNextUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
