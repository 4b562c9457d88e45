"""Looks into the future: exact where they reach, bounded, and honest about the rest."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model import lookahead
from forebay_server.model.lookahead import OrderView, RangesView
from forebay_server.model.nextuse import NextUse
from forebay_server.model.uses import ReadOrder
from forebay_wire.errors import InvalidRequest, LimitExceeded

MANIFEST = "cd" * 32


def order(samples: int, batch: int = 4, *, shuffle="full", num_epochs: int = 0) -> ReadOrder:
    return ReadOrder(
        MANIFEST, "x/", samples, samples, None, shuffle, 7, batch, "keep", 0, 1, num_epochs
    )


def view(samples: int, rows: int, **options) -> OrderView:
    sizes = [min(rows, samples - start) for start in range(0, samples, rows)]
    blobs = [f"blob{number}" for number in range(len(sizes))]
    return OrderView(order(samples, **options), blobs, sizes, 0)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, lookahead.MAX_EPOCHS), st.data())
def test_the_next_position_is_the_first_use_from_there_on(samples, rows, epochs, data):
    seen = view(samples, rows, num_epochs=epochs)
    uses = list(view(samples, rows, num_epochs=epochs).uses(0))
    start = 0
    for start in sorted(data.draw(st.lists(st.integers(0, samples * epochs), max_size=4))):
        for blob in {blob for _, blob in uses}:
            following = [time for time, one in uses if one == blob and time >= start]
            assert seen.next_position(blob, start) == (following[0] if following else None)
        assert list(seen.uses(start)) == [use for use in uses if use[0] >= start]
        seen.forget_before(start)


@given(st.integers(1, 60), st.integers(1, 9), st.data())
def test_a_shard_that_turns_out_to_be_a_blob_keeps_its_uses(samples, rows, data):
    seen, named = view(samples, rows), view(samples, rows)
    uses = list(seen.uses(0))
    shards = sorted({shard for _, shard in uses})
    renamed = {one: f"new {one}" for one in data.draw(st.lists(st.sampled_from(shards)))}
    for shard, blob in [*renamed.items(), ("none of it", "x")]:
        named.rename(shard, blob)
        assert not named.knows(shard)
        assert named.knows(blob) == (shard != "none of it")
    start = data.draw(st.integers(0, samples))
    assert list(named.uses(0)) == [(time, renamed.get(shard, shard)) for time, shard in uses]
    for shard in shards:
        blob = renamed.get(shard, shard)
        assert named.next_position(blob, start) == seen.next_position(shard, start)


def test_beyond_the_look_a_blob_is_expected_later_than_all_that_is_seen(monkeypatch):
    monkeypatch.setattr(lookahead, "MAX_USES", 100)
    seen = view(100_000, 1, batch=1)
    known = {blob: time for time, blob in seen.uses(0)}
    unknown = next(f"blob{number}" for number in range(100_000) if f"blob{number}" not in known)
    assert seen.next_position(unknown, 0) > max(known.values())
    assert seen.next_position("another dataset's", 0) is None


def test_a_plan_without_end_goes_on_into_the_next_epochs():
    seen = view(10, 5, batch=10)
    assert list(islice(seen.uses(0), 4)) == [
        (0, "blob0"),
        (0, "blob1"),
        (10, "blob0"),
        (10, "blob1"),
    ]
    assert seen.next_position("blob0", 11) == 20
    assert max(time for time, _ in seen.uses(0)) <= 10 * (1 + lookahead.MAX_EPOCHS)


def test_the_farthest_next_use_goes_first():
    plans = NextUse()
    seen = view(40, 4, batch=4, shuffle="none")
    plans.add_plan("p", seen, 0, 0.0)
    for number in range(5):
        plans.stored(f"blob{number}", 1, 0.0)
    assert plans.victims(2) == ["blob4", "blob3"]
    plans.advance("p", 4, 1.0)
    assert plans.victims(1) == ["blob0"]


def test_ranges_come_in_pages_each_once():
    seen = RangesView()
    seen.add_page(0, ["a", "b"])
    seen.add_page(0, ["a", "b"])
    seen.add_page(1, ["a"])
    assert list(seen.uses(1)) == [(1, "b"), (2, "a")]
    assert seen.next_position("a", 1) == 2
    seen.forget_before(2)
    assert seen.next_position("b", 2) is None
    with pytest.raises(InvalidRequest, match="page 5 of the plan comes before page 2"):
        seen.add_page(5, ["a"])
    with pytest.raises(LimitExceeded, match="when reading has advanced"):
        seen.add_page(2, ["a"] * lookahead.MAX_RANGES)
    assert seen.stop == 3


RUNS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5)), max_size=12)


@given(st.integers(0, 9), RUNS, st.integers(0, 12), st.data())
def test_a_range_is_needed_at_each_of_its_positions(first, runs, border, data):
    seen = RangesView(first)
    for page, some in enumerate((runs[:border], runs[border:])):
        seen.add_page(page, [blob for blob, _ in some], [count for _, count in some])
    needed = {
        first + at: blob
        for at, blob in enumerate(blob for blob, count in runs for _ in range(count))
    }
    end = first + len(needed)
    assert seen.stop == end
    for start in sorted(data.draw(st.lists(st.integers(first, end + 3), max_size=4))):
        for blob in "abcd":
            following = [time for time, one in needed.items() if one == blob and time >= start]
            assert seen.next_position(blob, start) == min(following, default=None)
        uses = list(seen.uses(start))
        assert [time for time, _ in uses] == sorted(time for time, _ in uses)
        assert all(needed[time] == blob for time, blob in uses)
        assert {blob for _, blob in uses} == {needed[time] for time in needed if time >= start}
        seen.forget_before(start)
        assert all(seen.knows(blob) for _, blob in uses)
    seen.add_page(2, ["e"], [2])
    assert seen.next_position("e", 0) == end


TURNS = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.sampled_from("abcd"), unique=True)), max_size=8
)


@given(st.integers(0, 9), TURNS, st.integers(0, 8), st.data())
def test_all_blobs_of_a_turn_are_needed_at_each_of_its_positions(first, turns, border, data):
    seen = RangesView(first)
    for page, some in enumerate((turns[:border], turns[border:])):
        seen.add_turns(page, some)
        seen.add_turns(page, some)
    needed = [blobs for count, blobs in turns for _ in range(count)]
    assert seen.stop == first + len(needed)
    for start in sorted(data.draw(st.lists(st.integers(first, seen.stop + 3), max_size=4))):
        left = list(enumerate(needed[start - first :], start))
        for blob in "abcd":
            wanted = min((time for time, blobs in left if blob in blobs), default=None)
            assert seen.next_position(blob, start) == wanted
        uses = list(seen.uses(start))
        assert [time for time, _ in uses] == sorted(time for time, _ in uses)
        assert {blob for _, blob in uses} == {blob for _, blobs in left for blob in blobs}
        seen.forget_before(start)
        assert all(seen.knows(blob) for _, blob in uses)


def test_ranges_of_a_shard_that_turns_out_to_be_a_blob_are_that_blobs():
    seen = RangesView()
    seen.add_page(0, ["shard", "b", "blob"], [2, 1, 1])
    seen.rename("shard", "blob")
    seen.add_page(1, ["shard"])
    assert list(seen.uses(1)) == [(1, "blob"), (2, "b"), (3, "blob"), (4, "blob")]
    assert [seen.next_position("blob", start) for start in range(6)] == [0, 1, 3, 3, 4, None]
    assert seen.next_position("shard", 0) is None
    assert not seen.knows("shard")
    seen.forget_before(4)
    assert seen.knows("blob")
