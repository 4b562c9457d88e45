"""Runs through a disk: fewer jumps, and nothing comes later than it may."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.runs import (
    PATIENCE_SECONDS,
    RUN_SECONDS,
    Disk,
    Wanted,
    finish_seconds,
    next_run,
)

MB = 1_000_000
DISK = Disk(bytes_per_second=100 * MB, seek_seconds=0.01)

disks = st.builds(
    Disk,
    bytes_per_second=st.floats(1 * MB, 1000 * MB),
    seek_seconds=st.floats(0.001, 0.05),
)


@st.composite
def blobs(draw) -> list[Wanted]:
    """Files that do not overlap, in any order, wanted at any times."""
    place, found = 0, []
    for number in range(draw(st.integers(0, 24))):
        place += draw(st.sampled_from([0, 4096, 10 * MB, 1000 * MB]))
        num_bytes = draw(st.integers(1, 20 * MB))
        found.append(Wanted(f"b{number}", draw(st.floats(-1, 10)), num_bytes, place))
        place += num_bytes
    return draw(st.permutations(found))


def num_jumps(order: list[Wanted]) -> int:
    return sum(after.place < before.place for before, after in pairwise(order))


@given(blobs(), disks, st.integers(0, 2000 * MB))
def test_a_run_is_what_is_needed_first_in_the_order_of_the_disk(wanted, disk, head):
    run = next_run(wanted, disk, head)
    assert bool(run) == bool(wanted)
    needed = sorted(wanted, key=lambda one: one.seconds)[: len(run)]
    assert sorted(one.seconds for one in run) == [one.seconds for one in needed]
    assert len(set(run)) == len(run)
    assert set(run) <= set(wanted)
    places = [one.place for one in run]
    passed = [place for place in places if place >= head]
    assert places == sorted(passed) + sorted(place for place in places if place < head)


@given(blobs(), disks, st.integers(0, 2000 * MB))
def test_nothing_comes_later_than_it_may(wanted, disk, head):
    run = next_run(wanted, disk, head)
    in_turn = dict(finish_seconds(sorted(wanted, key=lambda one: one.seconds), disk, head))
    finished = list(finish_seconds(run, disk, head))
    for one, at in finished:
        if in_turn[one] <= one.seconds:
            assert at <= one.seconds
        assert at <= max(one.seconds, in_turn[one] + PATIENCE_SECONDS)
    assert len(run) <= 1 or finished[-1][1] <= RUN_SECONDS


@given(blobs(), disks)
def test_a_run_never_takes_longer_than_the_same_in_order_of_need(wanted, disk):
    run = next_run(wanted, disk)
    needed = sorted(run, key=lambda one: one.seconds)
    took = [at for _, at in finish_seconds(run, disk, 0)]
    assert not run or took[-1] <= [at for _, at in finish_seconds(needed, disk, 0)][-1] + 1e-9


def test_with_time_enough_all_are_one_run():
    wanted = [Wanted(f"b{n}", 10.0 + n, MB, n * 7 % 20 * 5 * MB) for n in range(20)]
    run = next_run(wanted, DISK)
    assert len(run) == 20
    assert num_jumps(run) == 0


def test_from_the_middle_of_the_disk_the_head_goes_up_first():
    wanted = [Wanted(f"b{n}", 10.0, MB, n * 5 * MB) for n in range(10)]
    assert [one.blob for one in next_run(wanted, DISK, head=23 * MB)] == [
        f"b{n}" for n in (5, 6, 7, 8, 9, 0, 1, 2, 3, 4)
    ]


def test_what_is_needed_at_once_is_not_kept_waiting_by_what_lies_before_it():
    urgent = Wanted("urgent", 0.05, MB, 900 * MB)
    later = [Wanted(f"b{n}", 3.0, 20 * MB, n * 20 * MB) for n in range(20)]
    assert next_run([*later, urgent], DISK) == [urgent]


def test_a_disk_that_cannot_keep_up_still_reads_in_runs():
    """Small blobs that are all late: jumping for each would take three times as long."""
    wanted = [Wanted(f"b{n}", -1.0 + n / 1000, MB // 2, n * 37 % 64 * MB) for n in range(64)]
    run = next_run(wanted, DISK)
    assert len(run) > 8
    assert num_jumps(run) == 0


def test_a_run_ends_so_that_others_get_a_turn():
    wanted = [Wanted(f"b{n}", 1000.0 + n, 50 * MB, n * 100 * MB) for n in range(64)]
    run = next_run(wanted, DISK)
    assert 1 < len(run) <= RUN_SECONDS / 0.5
