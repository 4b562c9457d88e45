"""One tier with and without plans: who decides about which blob."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from forebay_server.model.keeping import Keeping


class Listed:
    """A plan that needs one of *blobs* at each position."""

    seconds_per_position = 1.0

    def __init__(self, blobs: Sequence[str]) -> None:
        self.blobs = blobs

    def next_position(self, blob: str, start: int) -> float | None:
        found = (at for at in range(start, len(self.blobs)) if self.blobs[at] == blob)
        return next(found, None)

    def uses(self, start: int) -> Iterator[tuple[int, str]]:
        return ((at, self.blobs[at]) for at in range(start, len(self.blobs)))


class Tier:
    """A tier of *capacity* bytes that does what is decided; all blobs have one byte."""

    def __init__(self, capacity: int) -> None:
        self.known = Keeping(capacity)
        self.capacity = capacity
        self.blobs: set[str] = set()
        self.now = 0.0

    def read(self, blob: str) -> bool:
        self.now += 1
        self.known.asked(blob, 1, self.now)
        if blob in self.blobs:
            return True
        answer = self.known.should_admit(blob, 1, self.capacity - len(self.blobs))
        if answer.admit:
            for victim in answer.victims:
                self.blobs.remove(victim)
                self.known.removed(victim)
            self.blobs.add(blob)
            self.known.stored(blob, 1, self.now)
            assert len(self.blobs) <= self.capacity
        return False


def test_without_plans_a_scan_is_not_evicted_by_itself() -> None:
    tier = Tier(5)
    for _ in range(4):
        hits = [tier.read(blob) for blob in "abcdefghij"]
    assert hits == [True] * 5 + [False] * 5


def test_a_planned_blob_takes_the_room_of_unplanned_ones() -> None:
    tier = Tier(2)
    for blob in "xyxy":
        tier.read(blob)
    tier.known.add_plan("p", Listed("abab"), 0, tier.now)
    tier.read("a")
    tier.read("b")
    assert tier.blobs == {"a", "b"}


def test_an_unplanned_blob_never_takes_the_room_of_planned_ones() -> None:
    tier = Tier(2)
    tier.known.add_plan("p", Listed("abab"), 0, 0.0)
    tier.read("a")
    tier.read("b")
    for _ in range(5):
        for blob in "xyz":
            tier.read(blob)
    assert tier.blobs == {"a", "b"}


def test_beside_plans_unplanned_blobs_share_what_these_leave() -> None:
    tier = Tier(3)
    tier.known.add_plan("p", Listed("abab"), 0, 0.0)
    for blob in ("a", "b", "x", "x"):
        tier.read(blob)
    assert tier.blobs == {"a", "b", "x"}


def test_beside_plans_blobs_read_once_do_not_push_out_what_comes_again() -> None:
    tier = Tier(4)
    tier.known.add_plan("p", Listed("abab"), 0, 0.0)
    for blob in "abxyxyxy":
        tier.read(blob)
    for number in range(20):
        tier.read(f"once {number}")
    assert tier.blobs == {"a", "b", "x", "y"}


def test_when_the_last_plan_ends_what_it_left_makes_room() -> None:
    tier = Tier(2)
    tier.known.add_plan("p", Listed("abab"), 0, 0.0)
    tier.read("a")
    tier.read("b")
    tier.known.remove_plan("p")
    for _ in range(10):
        hits = [tier.read(blob) for blob in "xyxy"]
    assert hits[2:] == [True, True]


def test_victims_follow_the_plans_if_there_are_some() -> None:
    tier = Tier(3)
    for blob in "abc":
        tier.read(blob)
    assert tier.known.victims(3) == ["a", "b", "c"]
    tier.known.add_plan("p", Listed("abc"), 0, tier.now)
    assert tier.known.victims(3) == ["c", "b", "a"]


def test_its_size_can_change() -> None:
    tier = Tier(4)
    for blob in "abcd":
        tier.read(blob)
    tier.known.resize(2)
    assert len(tier.known.victims(2)) == 2
    assert tier.known.following == "keep"
