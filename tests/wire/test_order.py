"""The order of samples: a bijection, the same for every topology, resumable anywhere, O(1)."""

import time
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_wire.blocks import BlockParameters
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import Cut, Order, OrderState, split_rows, worker_steps
from forebay_wire.permutation import MAX_SAMPLES, derive_key, permute

EDGES = sorted(
    {0, 1, 2, 3, 5, 6, 7, 10, 99, 1000, 4999}
    | {2**power + step for power in range(1, 15) for step in (-1, 0, 1)}
)
TEN_BILLION = 10**10

FIRST_EPOCH = [3, 7, 5, 4, 0, 1, 8, 9, 6, 2]
SECOND_EPOCH = [6, 4, 1, 5, 7, 2, 8, 9, 0, 3]
DEEP_INSIDE = [9_010_570_482, 9_375_534_335, 8_020_710_233]

topologies = st.integers(1, 7)
last_batches = st.sampled_from(["keep", "pad", "drop"])


def whole(n: int, key: bytes) -> np.ndarray:
    return permute(key, n, np.arange(n))


@pytest.mark.parametrize("n", EDGES)
def test_every_sample_stands_at_exactly_one_position(n):
    for seed in range(3):
        found = whole(n, derive_key("test", seed))
        assert np.array_equal(np.sort(found), np.arange(n))


@given(st.integers(1, 3000), st.integers(), st.integers(0, 100))
def test_a_permutation_of_any_size_under_any_key_is_a_bijection(n, seed, epoch):
    order = Order(n, "full", seed, epoch, "m/s")
    assert np.array_equal(np.sort(order.between(0, n)), np.arange(n))


def test_the_order_is_fixed_for_ever():
    # Saved positions mean something only as long as these numbers stand.
    assert Order(10, "full", 0, 0, "manifest/").between(0, 10).tolist() == FIRST_EPOCH
    assert Order(10, "full", 0, 1, "manifest/").between(0, 10).tolist() == SECOND_EPOCH
    assert Order(TEN_BILLION, "full", 7, 3, "m/s").between(5 * 10**9, 5 * 10**9 + 3).tolist() == (
        DEEP_INSIDE
    )


def test_no_shuffle_keeps_the_order_of_rows():
    assert Order(5, "none", 3, 9, "m").between(1, 4).tolist() == [1, 2, 3]


def test_seed_epoch_and_identity_each_change_the_order():
    orders = [
        Order(1000, "full", 0, 0, "a"),
        Order(1000, "full", 1, 0, "a"),
        Order(1000, "full", 0, 1, "a"),
        Order(1000, "full", 0, 0, "b"),
    ]
    found = [tuple(order.between(0, 1000)) for order in orders]
    assert len(set(found)) == len(found)


def test_the_key_tells_parts_apart_however_they_are_joined():
    keys = {derive_key("a", "b", 1), derive_key("ab", 1), derive_key("a", "b1"), derive_key("a", 1)}
    assert len(keys) == 4


def test_every_permutation_of_a_few_samples_is_about_equally_likely():
    counts = {}
    for seed in range(6000):
        found = tuple(whole(4, derive_key("test", seed)).tolist())
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 24
    assert min(counts.values()) > 150
    assert max(counts.values()) < 350


def test_a_shuffle_spreads_neighbours_evenly():
    found = whole(20_000, derive_key("test"))
    first_half = np.bincount(found[:10_000] // 1000, minlength=20)
    assert np.all(np.abs(first_half - 500) < 100)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05


def test_ten_billion_samples_start_at_once_and_take_no_memory():
    order = Order(TEN_BILLION, "full", 0, 0, "m")
    order.between(0, 8)
    tracemalloc.start()
    started = time.perf_counter()
    cut = Cut(TEN_BILLION, 4096, "keep", position=9_876_543_210)
    part = cut.part(cut.num_steps // 2, 3, 8)
    found = order.at(part.positions(TEN_BILLION))
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(found.tolist())) == 512
    assert seconds < 0.1
    assert peak < 1 << 20


def test_positions_outside_the_order_are_refused():
    key = derive_key("test")
    for outside in (-1, 10):
        with pytest.raises(InvalidRequest, match="outside"):
            permute(key, 10, np.array([0, outside]))
    with pytest.raises(InvalidRequest, match="samples"):
        permute(key, MAX_SAMPLES + 1, np.array([0]))
    assert permute(key, MAX_SAMPLES, np.array([0, MAX_SAMPLES - 1])).min() >= 0


# Cutting.


def read_step(order: Order, cut: Cut, step: int, num_ranks: int) -> tuple[list[int], list[int]]:
    """(samples of the global batch, rows of each rank), padding left out of the samples."""
    samples, rows = [], []
    for rank in range(num_ranks):
        part = cut.part(step, rank, num_ranks)
        found = order.at(part.positions(cut.num_samples))
        samples += found[part.mask()].tolist()
        rows.append(len(found))
    return samples, rows


@given(st.integers(1, 200), st.integers(1, 50), topologies, last_batches)
def test_every_number_of_ranks_reads_the_same_global_batches(n, size, num_ranks, last_batch):
    order = Order(n, "full", 5, 2, "m")
    cut = Cut(n, size, last_batch)
    seen = []
    for step in range(cut.num_steps):
        samples, rows = read_step(order, cut, step, num_ranks)
        start, stop = cut.bounds(step)
        assert samples == order.between(start, stop).tolist()
        assert max(rows) - min(rows) <= 1
        if last_batch == "pad":
            assert set(rows) == {-(-size // num_ranks)}
        seen += samples
    dropped = n % size if last_batch == "drop" else 0
    assert len(seen) == n - dropped
    assert len(set(seen)) == len(seen)


@given(
    n=st.integers(1, 200),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    stops=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    num_ranks=st.lists(topologies, min_size=4, max_size=4),
    last_batch=st.sampled_from(["keep", "pad"]),
)
def test_resumed_anywhere_with_other_ranks_and_batches_nothing_repeats_or_is_skipped(
    n, sizes, stops, num_ranks, last_batch
):
    order = Order(n, "full", 1, 0, "m")
    position, seen = 0, []
    for turn, size in enumerate(sizes):
        cut = Cut(n, size, last_batch, position)
        last = turn == len(sizes) - 1
        steps = cut.num_steps if last else min(stops[turn], cut.num_steps)
        for step in range(steps):
            seen += read_step(order, cut, step, num_ranks[turn])[0]
            position = cut.bounds(step)[1]
    assert seen == order.between(0, n).tolist()


def test_after_a_change_of_the_batch_size_batches_count_from_the_position():
    cut = Cut(100, 7, "keep", position=30)
    assert [cut.bounds(step) for step in (0, 1, cut.num_steps - 1)] == [
        (30, 37),
        (37, 44),
        (100 - 70 % 7 - 7, 100),
    ]


@given(st.integers(0, 500), st.integers(1, 9))
def test_workers_take_whole_steps_in_turn(num_steps, num_workers):
    turns = [worker_steps(num_steps, worker, num_workers) for worker in range(num_workers)]
    assert sorted(step for turn in turns for step in turn) == list(range(num_steps))
    asked_in_turn = [turns[i % num_workers][i // num_workers] for i in range(num_steps)]
    assert asked_in_turn == list(range(num_steps))


def test_padding_repeats_samples_and_says_so():
    cut = Cut(5, 4, "pad")
    parts = [cut.part(1, rank, 2) for rank in range(2)]
    assert [part.positions(5).tolist() for part in parts] == [[4, 0], [0, 1]]
    assert [part.mask().tolist() for part in parts] == [[True, False], [False, False]]


def test_padding_of_a_dataset_smaller_than_a_batch_goes_round():
    part = Cut(2, 8, "pad").part(0, 0, 1)
    assert part.positions(2).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_a_short_last_batch_leaves_ranks_empty_with_keep():
    cut = Cut(9, 4, "keep")
    assert [cut.part(2, rank, 4).num_rows for rank in range(4)] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "arguments", [(10, 0), (10, 5, "some"), (10, 5, "keep", 11), (10, 5, "keep", -1)]
)
def test_a_cut_that_cannot_be_is_refused(arguments):
    with pytest.raises(InvalidRequest):
        Cut(*arguments)


def test_steps_outside_the_epoch_are_refused():
    with pytest.raises(InvalidRequest, match="step 3"):
        Cut(9, 4).bounds(3)


def test_an_unknown_shuffle_is_refused():
    with pytest.raises(InvalidRequest, match="shuffle"):
        Order(10, "some", 0, 0, "m")


# Splits.


def test_the_rows_of_splits_are_those_of_one_permutation():
    cuts = [0, 800, 900, 1001]
    rows = [split_rows("m", 1001, 4, np.arange(*bounds)) for bounds in pairwise(cuts)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(1001))
    assert rows[0].tolist() != split_rows("m", 1001, 5, np.arange(800)).tolist()
    assert rows[0].tolist() != split_rows("n", 1001, 4, np.arange(800)).tolist()


# The state.

STATE = OrderState(2, 640, 7, "full", "mnist", 3, "a" * 64, "b" * 64)


def test_a_state_is_a_few_integers_and_names_and_comes_back():
    json = STATE.to_json()
    assert json == {
        "format": 2,
        "epoch": 2,
        "position": 640,
        "seed": 7,
        "shuffle": "full",
        "dataset": "mnist",
        "version": 3,
        "manifest": "a" * 64,
        "selection": "b" * 64,
        "window_blocks": 0,
        "block_rows": 0,
        "lanes": 1,
    }
    assert OrderState.from_json(json) == STATE


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"epoch": "2"},
        {"position": True},
        {"position": -1},
        {"shuffle": "sometimes"},
    ],
)
def test_a_broken_state_is_refused(change):
    with pytest.raises(InvalidRequest):
        OrderState.from_json({**STATE.to_json(), **change})


BLOCK_STATE = replace(STATE, shuffle="block", window_blocks=16, block_rows=4096, lanes=4)


def test_a_state_of_blocks_comes_back_whole():
    assert OrderState.from_json(BLOCK_STATE.to_json()) == BLOCK_STATE
    assert BLOCK_STATE.blocks == BlockParameters(16, 4096, 4)


def test_states_of_builds_without_blocks_are_still_read():
    json = STATE.to_json()
    for name in ("window_blocks", "block_rows", "lanes"):
        del json[name]
    assert OrderState.from_json({**json, "format": 1}) == STATE
    with pytest.raises(InvalidRequest, match="lacks"):
        OrderState.from_json(json)
    with pytest.raises(InvalidRequest, match="window_blocks"):
        OrderState.from_json({**json, "format": 1, "shuffle": "block"})


@pytest.mark.parametrize(
    "change",
    [
        {"window_blocks": 0},
        {"block_rows": -1},
        {"lanes": 0},
        {"lanes": True},
        {"lanes": "4"},
        {"shuffle": "full"},
    ],
)
def test_a_broken_state_of_blocks_is_refused(change):
    with pytest.raises(InvalidRequest):
        OrderState.from_json({**BLOCK_STATE.to_json(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_blocks": 8}, "window_blocks=16, block_rows=4096"),
        ({"block_rows": 0}, "block_rows=None"),
        ({"lanes": 2}, "lanes=4"),
    ],
)
def test_a_state_of_other_blocks_says_what_to_make_instead(change, message):
    other = OrderState.from_json({**BLOCK_STATE.to_json(), **change})
    with pytest.raises(InvalidRequest, match=message):
        BLOCK_STATE.check_same_samples(other)


def test_a_state_that_lacks_a_field_is_refused_by_name():
    json = STATE.to_json()
    del json["manifest"]
    with pytest.raises(InvalidRequest, match="manifest"):
        OrderState.from_json(json)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest": "c" * 64}, "version=3"),
        ({"dataset": "cifar"}, "cifar"),
        ({"selection": ""}, "split"),
        ({"seed": 8}, "seed=7"),
        ({"shuffle": "none"}, "shuffle='full'"),
    ],
)
def test_a_state_of_other_samples_says_what_to_open_instead(change, message):
    other = OrderState.from_json({**STATE.to_json(), **change})
    with pytest.raises(InvalidRequest, match=message):
        STATE.check_same_samples(other)
    STATE.check_same_samples(STATE)
