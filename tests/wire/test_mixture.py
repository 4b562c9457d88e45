"""The order of a mixture: exact shares, passes without repeats, a seek that costs nothing."""

import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_wire.errors import InvalidRequest
from forebay_wire.mixture import (
    BLOCK_SAMPLES,
    SHARE_SUM,
    MixtureOrder,
    Recipe,
    Stage,
    WeightsFrom,
    apportion,
    counts,
    of_fixed_sizes,
    stages_of,
    until_all_end,
    until_first_ends,
)

FIRST = ([1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 2, 3])
DEEP = ([1, 0, 0, 0, 1], [29999999981, 70000000019, 70000000020, 70000000021, 29999999982])

weight_lists = st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any)
sizes_and_weights = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 50)), min_size=1, max_size=5
)


def order(recipe, *, seed=0, epoch=0):
    return MixtureOrder(recipe, "identity", seed, epoch)


def whole(recipe, **options):
    return order(recipe, **options).at(np.arange(recipe.num_samples))


def endless(weights, num_samples, sizes=None):
    return Recipe(
        tuple(sizes or [100] * len(weights)),
        (Stage(0, apportion(weights, SHARE_SUM)),),
        num_samples,
    )


def per_dataset(recipe, numbers):
    return np.bincount(numbers, minlength=len(recipe.sizes)).tolist()


# Shares.


@given(weight_lists, st.integers(1, 10**6))
def test_weights_become_integers_that_are_less_than_one_off(weights, total):
    found = apportion(weights, total)
    assert sum(found) == total
    for own, weight in zip(found, weights, strict=True):
        assert abs(own - Fraction(weight * total, sum(weights))) < 1


@given(weight_lists, st.integers(0, 5000))
def test_counts_add_up_never_fall_and_stay_near_the_weights(weights, length):
    now, later = counts(weights, length), counts(weights, length + 1)
    assert sum(now) == length
    assert sorted(np.subtract(later, now)) == [0] * (len(weights) - 1) + [1]
    for own, weight in zip(now, weights, strict=True):
        assert abs(own - length * weight / sum(weights)) <= 1.5


@given(weight_lists, st.integers(0, 9))
def test_counts_are_the_shares_themselves_after_each_round(weights, rounds):
    assert counts(weights, rounds * sum(weights)) == [rounds * weight for weight in weights]


def test_weights_that_choose_nothing_are_refused():
    for weights in ([], [0, 0], [1, -1]):
        with pytest.raises(InvalidRequest, match="weights"):
            apportion(weights, 10)


# The order.


@given(weight_lists, st.integers(1, 3000), st.integers(0, 3), st.integers(0, 5))
def test_an_endless_row_counts_each_dataset_through_all_epochs(weights, length, seed, epoch):
    recipe = endless(weights, length)
    parts = [whole(recipe, seed=seed, epoch=one) for one in range(epoch + 1)]
    numbers, ordinals = (np.concatenate(part) for part in zip(*parts, strict=True))
    for number in range(len(weights)):
        own = ordinals[numbers == number]
        # In order, from 0 on; the last block may not be over.
        assert np.array_equal(own, np.arange(len(own)))
    for stop in range(BLOCK_SAMPLES, len(numbers), BLOCK_SAMPLES):
        assert per_dataset(recipe, numbers[:stop]) == counts(recipe.stages[0].shares, stop)


@given(sizes_and_weights, st.sampled_from(["first", "all"]), st.integers(0, 3))
def test_epochs_that_end_by_a_rule_start_every_dataset_anew(given_, rule, epoch):
    sizes, weights = zip(*given_, strict=True)
    recipe = (until_first_ends if rule == "first" else until_all_end)(sizes, weights)
    numbers, ordinals = whole(recipe, epoch=epoch)
    for number, size in enumerate(sizes):
        own = ordinals[numbers == number]
        assert np.array_equal(own, recipe.strides[number] * epoch + np.arange(len(own)))
        assert recipe.strides[number] % size == 0
        assert len(own) <= size if rule == "first" else len(own) >= size
    one_more = counts(recipe.stages[0].shares, recipe.num_samples + 1)
    one_less = counts(recipe.stages[0].shares, recipe.num_samples - 1)
    if rule == "first":
        assert any(own > size for own, size in zip(one_more, sizes, strict=True))
    else:
        assert any(own < size for own, size in zip(one_less, sizes, strict=True))


@given(sizes_and_weights, st.integers(0, 3))
def test_fixed_sizes_are_met_in_each_epoch_and_go_on_in_the_next(given_, epoch):
    sizes, wanted = zip(*given_, strict=True)
    recipe = of_fixed_sizes(sizes, wanted)
    numbers, ordinals = whole(recipe, epoch=epoch)
    assert per_dataset(recipe, numbers) == list(wanted)
    for number, own in enumerate(wanted):
        assert np.array_equal(ordinals[numbers == number], epoch * own + np.arange(own))


@given(weight_lists, st.data())
def test_a_seek_finds_what_walking_finds(weights, data):
    stages = data.draw(st.lists(st.integers(1, 700), max_size=4))
    starts = [0, *np.cumsum(stages).tolist()]
    recipe = Recipe(
        tuple([7] * len(weights)),
        tuple(Stage(start, tuple(np.roll(weights, start))) for start in starts),
        starts[-1] + 900,
    )
    numbers, ordinals = whole(recipe)
    positions = np.array(
        data.draw(st.lists(st.integers(0, recipe.num_samples - 1), min_size=1, max_size=9))
    )
    found = order(recipe).at(positions)
    assert np.array_equal(found[0], numbers[positions])
    assert np.array_equal(found[1], ordinals[positions])
    for number in range(len(weights)):
        own = ordinals[numbers == number]
        assert np.array_equal(own, np.arange(len(own)))


@given(weight_lists, st.integers(1, 2000))
def test_the_next_ordinals_never_fall_and_are_never_ahead(weights, length):
    recipe = endless(weights, length)
    numbers, ordinals = whole(recipe, epoch=2)
    last = [0] * len(weights)
    for position in range(0, length, 97):
        found = order(recipe, epoch=2).next_ordinals(position)
        assert all(now >= before for now, before in zip(found, last, strict=True))
        for number, ordinal in enumerate(found):
            rest = ordinals[position:][numbers[position:] == number]
            assert not len(rest) or ordinal <= rest[0] < ordinal + BLOCK_SAMPLES
        last = found


def test_seed_epoch_and_identity_each_change_where_the_datasets_stand():
    recipe = of_fixed_sizes((500, 500), (500, 500))
    orders = [
        MixtureOrder(recipe, "a", 0, 0),
        MixtureOrder(recipe, "b", 0, 0),
        MixtureOrder(recipe, "a", 1, 0),
        MixtureOrder(recipe, "a", 0, 1),
    ]
    assert len({tuple(one.at(np.arange(1000))[0]) for one in orders}) == 4


def test_the_order_is_fixed_for_ever():
    recipe = endless((7, 3), 10**12, sizes=(10**10, 10**10))
    numbers, ordinals = order(recipe).at(np.arange(6))
    assert (numbers.tolist(), ordinals.tolist()) == FIRST
    numbers, ordinals = order(recipe, seed=3).at(np.arange(10**11, 10**11 + 5))
    assert (numbers.tolist(), ordinals.tolist()) == DEEP


def test_ten_billion_samples_start_and_seek_like_ten():
    recipe = endless((0.9, 0.07, 0.03), 10**10, sizes=(10**10, 10**9, 10**3))
    order(recipe).at(np.arange(10))  # imports and the like
    tracemalloc.start()
    began = time.perf_counter()
    for position in np.linspace(0, 10**10 - 512, 50).astype(np.int64).tolist():
        order(recipe, epoch=7).at(np.arange(position, position + 512))
    assert time.perf_counter() - began < 2.0
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


# Schedules.


def test_a_schedule_changes_the_shares_at_its_very_sample():
    schedule = [WeightsFrom(0, (1, 0)), WeightsFrom(1000, (0, 1)), WeightsFrom(1300, (1, 1))]
    recipe = Recipe((10, 10), stages_of(schedule), 2000)
    numbers, _ = whole(recipe)
    assert per_dataset(recipe, numbers[:1000]) == [1000, 0]
    assert per_dataset(recipe, numbers[1000:1300]) == [0, 300]
    assert numbers[1300 : 1300 + 2 * BLOCK_SAMPLES].sum() == BLOCK_SAMPLES


def test_a_straight_line_meets_its_weights_at_both_ends():
    schedule = [WeightsFrom(0, (1, 0), is_linear=True), WeightsFrom(100_000, (0.2, 0.8))]
    numbers, _ = whole(Recipe((10, 10), stages_of(schedule), 120_000))
    share = numbers.reshape(-1, 2000).mean(axis=1)  # of the second dataset, bit by bit
    expected = np.minimum(np.arange(60) * 2000 + 1000, 100_000) / 100_000 * 0.8
    assert np.abs(share - expected).max() < 0.01
    assert len(stages_of(schedule)) <= 257


@pytest.mark.parametrize(
    "schedule",
    [
        [],
        [WeightsFrom(5, (1,))],
        [WeightsFrom(0, (1,)), WeightsFrom(0, (1,))],
        [WeightsFrom(0, (1,), is_linear=True)],
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(schedule):
    with pytest.raises(InvalidRequest):
        stages_of(schedule)


def test_an_empty_dataset_with_a_share_is_refused():
    with pytest.raises(InvalidRequest, match="empty"):
        of_fixed_sizes((5, 0), (5, 5))
    assert of_fixed_sizes((5, 0), (5, 0)).num_samples == 5


def test_positions_outside_the_epoch_are_refused():
    with pytest.raises(InvalidRequest, match="outside"):
        order(of_fixed_sizes((5, 5), (5, 5))).at(np.array([10]))
