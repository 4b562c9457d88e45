"""What a tier keeps without plans: epochs are not evicted, scans do not pollute."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_server.model.admission import ReactiveCache
from forebay_server.model.shadows import (
    KeepShadow,
    LruShadow,
    S3FifoShadow,
    Shadow,
    WindowedKeepShadow,
)


class Driven:
    """A cache that does what :class:`ReactiveCache` says."""

    def __init__(self, capacity: int) -> None:
        self.policy = ReactiveCache(capacity)
        self.capacity = capacity
        self.sizes: dict[str, int] = {}
        self.num_evicted = 0

    @property
    def room(self) -> int:
        return self.capacity - sum(self.sizes.values())

    def read(self, blob: str, num_bytes: int = 1) -> bool:
        hit = self.policy.access(blob, num_bytes)
        assert hit == (blob in self.sizes)
        if hit:
            return True
        answer = self.policy.should_admit(blob, num_bytes, self.room)
        if answer.admit:
            for victim in answer.victims:
                del self.sizes[victim]
                self.policy.removed(victim)
                self.num_evicted += 1
            assert self.room >= num_bytes
            self.sizes[blob] = num_bytes
            self.policy.stored(blob, num_bytes)
        else:
            assert not answer.victims
        return False

    def read_all(self, blobs: Sequence[str]) -> float:
        return sum([self.read(blob) for blob in blobs]) / len(blobs)


def epoch(job: str, num_blobs: int, seed: int) -> list[str]:
    blobs = [f"{job}{number}" for number in range(num_blobs)]
    random.Random(f"{job} {seed}").shuffle(blobs)
    return blobs


def test_a_scan_that_comes_again_and_again_is_kept_in_part() -> None:
    cache = Driven(50)
    scan = [str(number) for number in range(100)]
    cache.read_all(scan)
    assert [cache.read_all(scan) for _ in range(10)] == [0.5] * 10
    assert cache.num_evicted == 0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.83])
def test_shuffled_epochs_hit_as_often_as_there_is_room(share: float) -> None:
    cache = Driven(round(200 * share))
    cache.read_all(epoch("a", 200, 0))
    hits = [cache.read_all(epoch("a", 200, seed)) for seed in range(1, 10)]
    assert min(hits) > share - 0.05


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_given_up_when_the_second_epoch_begins(seed: int) -> None:
    """Blobs that happen to come again at once do not make the others look overdue."""
    shadow = KeepShadow(50)
    reads = epoch("a", 200, seed) + epoch("a", 200, seed + 100)
    for now, blob in enumerate(reads[:250]):
        shadow.access(blob, 1, float(now + 1))
    assert shadow.evicted == []


def test_blobs_read_once_do_not_push_out_an_epochs() -> None:
    cache = Driven(50)
    for seed in range(3):
        cache.read_all(epoch("a", 100, seed))
    cache.read_all(epoch("once", 300, 0))
    assert cache.read_all(epoch("a", 100, 9)) > 0.45


def test_blobs_read_once_that_came_first_make_room() -> None:
    cache = Driven(50)
    cache.read_all(epoch("once", 50, 0))
    for seed in range(4):
        cache.read_all(epoch("a", 50, seed))
    assert cache.read_all(epoch("a", 50, 9)) > 0.9


def test_a_job_that_ended_makes_room_for_the_next() -> None:
    cache = Driven(50)
    for seed in range(5):
        cache.read_all(epoch("a", 100, seed))
    for seed in range(4):
        cache.read_all(epoch("c", 100, seed))
    assert cache.read_all(epoch("c", 100, 9)) > 0.4


def test_the_faster_of_two_jobs_gets_the_room() -> None:
    cache = Driven(60)
    slow = iter([blob for seed in range(8) for blob in epoch("s", 100, seed)])
    for seed in range(30):
        for index, blob in enumerate(epoch("f", 100, seed)):
            cache.read(blob)
            if index % 4 == 0:
                cache.read(next(slow))
    assert sum(blob.startswith("f") for blob in cache.sizes) > 54


def test_a_moving_working_set_is_followed_and_epochs_again_after_it() -> None:
    cache = Driven(50)
    for start in range(0, 2000, 8):  # each blob five times, then never again
        rate = cache.read_all([str(number) for number in range(start, start + 40)])
        assert start < 400 or rate >= 0.8
    for seed in range(10):
        cache.read_all(epoch("a", 100, seed))
    assert cache.policy.following.endswith("keep")
    assert cache.read_all(epoch("a", 100, 99)) > 0.45


def test_blobs_that_several_ranks_want_shortly_after_each_other_are_brought_once() -> None:
    cache = Driven(100)
    for seed in range(6):
        blobs = epoch("a", 200, seed)
        cache.read_all([blob for at in range(0, 200, 2) for blob in blobs[at : at + 2] * 4])
    assert cache.policy.following == "windowed keep"
    blobs = epoch("a", 200, 99)
    rate = cache.read_all([blob for at in range(0, 200, 2) for blob in blobs[at : at + 2] * 4])
    assert rate > 0.84  # three of four reads anyway, and nearly half of the rest


def test_what_must_not_go_is_not_named() -> None:
    cache = Driven(3)
    cache.read_all(["a", "b", "c"])
    assert cache.policy.victims(2, lambda blob: blob != "a") == ["b", "c"]
    assert cache.policy.victims(9, lambda blob: blob != "a") == ["b", "c"]
    assert cache.policy.victims(0) == []


def test_what_the_policy_does_not_want_goes_before_what_it_wants() -> None:
    cache = Driven(2)
    cache.read_all(["a", "b"])
    cache.policy.stored("promoted for another reason", 1)
    assert cache.policy.victims(1) == ["promoted for another reason"]


def test_a_deleted_blob_is_forgotten() -> None:
    cache = Driven(2)
    cache.read_all(["a", "b"])
    cache.policy.forget("a")
    del cache.sizes["a"]
    assert cache.policy.victims(5) == ["b"]
    cache.read("c")
    assert "c" in cache.sizes


def test_a_smaller_cache_wants_less() -> None:
    cache = Driven(100)
    cache.read_all(epoch("a", 100, 0))
    cache.policy.resize(40)
    cache.capacity = 40
    for victim in cache.policy.victims(60):
        del cache.sizes[victim]
        cache.policy.removed(victim)
    hits = [cache.read_all(epoch("a", 100, seed)) for seed in range(5)]
    assert min(hits) > 0.35


reads = st.lists(
    st.tuples(st.sampled_from([f"b{number}" for number in range(30)]), st.integers(0, 3)),
    max_size=300,
)
SIZES = {f"b{number}": 1 + number % 7 for number in range(30)}


@settings(deadline=None)
@given(capacity=st.integers(1, 60), blobs=reads, data=st.data())
def test_answers_always_fit_and_agree_with_what_is_there(
    capacity: int, blobs: list[tuple[str, int]], data: st.DataObject
) -> None:
    """With deletions, refused admissions and changed limits in between."""
    cache = Driven(capacity)
    for blob, what in blobs:
        cache.read(blob, SIZES[blob])
        if what == 1:
            cache.policy.forget(blob)
            cache.sizes.pop(blob, None)
        if what == 2 and blob in cache.sizes:
            del cache.sizes[blob]
            cache.policy.removed(blob)
    needed = data.draw(st.integers(0, 100))
    kept = data.draw(st.sets(st.sampled_from(sorted(SIZES))))
    victims = cache.policy.victims(needed, lambda blob: blob not in kept)
    assert len(set(victims)) == len(victims)
    assert set(victims) <= set(cache.sizes) - kept
    freed = sum(cache.sizes[victim] for victim in victims)
    assert freed >= needed or set(victims) == set(cache.sizes) - kept


@pytest.mark.parametrize("kind", [KeepShadow, WindowedKeepShadow, LruShadow, S3FifoShadow])
@settings(deadline=None)
@given(capacity=st.integers(1, 60), blobs=reads)
def test_a_shadow_holds_what_it_says_and_never_too_much(
    kind: Callable[[int], Shadow],
    capacity: int,
    blobs: list[tuple[str, int]],
) -> None:
    shadow = kind(capacity)
    held: set[str] = set()
    now = 0.0
    for blob, what in blobs:
        now += SIZES[blob]
        assert shadow.access(blob, SIZES[blob], now) == (blob in held)
        if blob in shadow:
            held.add(blob)
        if what == 1:
            shadow.forget(blob)
            held.discard(blob)
        if what == 2:
            capacity = max(1, capacity + len(held) % 3 - 1)
            shadow.resize(capacity)
        held.difference_update(gone for gone in shadow.evicted if gone not in shadow)
        shadow.evicted.clear()
        assert held == {name for name in SIZES if name in shadow}
        assert sum(SIZES[name] for name in held) <= capacity
