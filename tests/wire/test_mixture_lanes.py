"""A mixture in lanes: in each of them it is as exact as in one, and reads its own part alone."""

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
    apportion,
    counts,
    of_fixed_sizes,
    until_all_end,
    until_first_ends,
)
from forebay_wire.mixture_lanes import LanedMixture, LanedOrder, in_lanes, lane_length

EPOCHS = 3
NUM_SAMPLES = 80
FIRST = [(0, 2, 0), (0, 2, 1), (0, 2, 2), (0, 2, 3), (1, 1, 1), (0, 2, 5), (0, 2, 6), (0, 2, 4)]
sizes_and_weights = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 50)), min_size=1, max_size=4
)
lane_numbers = st.integers(1, 6)


def recipe_of(given_, ends):
    sizes, weights = zip(*given_, strict=True)
    shares = apportion(weights, SHARE_SUM)
    if ends == "endless":
        return Recipe(sizes, (Stage(0, shares), Stage(130, shares[::-1])), 200)
    if ends == "sizes":
        return of_fixed_sizes(sizes, weights)
    return (until_all_end if ends == "all" else until_first_ends)(sizes, shares)


def laned(given_, ends, lanes) -> LanedMixture:
    lanes = min(lanes, *(size for size, _ in given_))
    return in_lanes(recipe_of(given_, ends), ends, lanes)


def read(mixture, epoch=0, seed=0):
    """(dataset, pass, place) of all positions."""
    order = LanedOrder(mixture, "identity", seed, epoch)
    found = order.at(np.arange(mixture.num_samples, dtype=np.int64))
    return list(zip(*(column.tolist() for column in found), strict=True))


def all_epochs(given_, ends, lanes):
    mixture = laned(given_, ends, lanes)
    return mixture, [read(mixture, epoch) for epoch in range(EPOCHS)]


@pytest.mark.parametrize("ends", ["endless", "first", "all"])
@given(sizes_and_weights, lane_numbers)
def test_a_lane_reads_its_lane_of_each_dataset_pass_after_pass(ends, given_, lanes):
    mixture, epochs = all_epochs(given_, ends, lanes)
    for lane in range(mixture.lanes):
        seen: dict[int, list[tuple[int, int]]] = {}
        for epoch in epochs:
            for dataset, turn, place in epoch[lane :: mixture.lanes]:
                assert place % mixture.lanes == lane
                seen.setdefault(dataset, []).append((turn, place))
        for dataset, came in seen.items():
            size = given_[dataset][0]
            assert len(set(came)) == len(came)
            turns = [turn for turn, _ in came]
            assert turns == sorted(turns)
            if ends == "endless":  # each pass is whole before the next one begins
                own = list(range(lane, size, mixture.lanes))
                assert [place for _, place in came] == (own * (len(came) // len(own) + 1))[
                    : len(came)
                ]


@given(sizes_and_weights, lane_numbers)
def test_an_epoch_ends_before_any_lane_of_a_dataset_would_begin_again(given_, lanes):
    mixture, epochs = all_epochs(given_, "first", lanes)
    for number, epoch in enumerate(epochs):
        assert len(set(epoch)) == len(epoch)
        assert {turn for _, turn, _ in epoch} <= {number}
    longer = LanedMixture(mixture.recipes, mixture.num_samples + 1)
    recipe = recipe_of(given_, "first")
    lane = mixture.num_samples % mixture.lanes
    own = lane_length(longer.num_samples, lane, mixture.lanes)
    sizes = mixture.recipes[lane].sizes
    over = MixtureOrder(Recipe(sizes, recipe.stages, own, sizes), f"identity/{lane}", 0, 0).at(
        np.arange(own, dtype=np.int64)
    )
    assert any(ordinal >= sizes[dataset] for dataset, ordinal in zip(*map(list, over), strict=True))


@given(sizes_and_weights, lane_numbers)
def test_an_epoch_ends_when_each_dataset_came_whole_and_no_later(given_, lanes):
    mixture, epochs = all_epochs(given_, "all", lanes)
    wanted = {(dataset, place) for dataset, (size, _) in enumerate(given_) for place in range(size)}
    for epoch in epochs:
        assert {(dataset, place) for dataset, _, place in epoch} == wanted
    turns = [{turn for _, turn, _ in epoch} for epoch in epochs]
    by_dataset = [
        [{turn for one, turn, _ in epoch if one == dataset} for epoch in epochs]
        for dataset in range(len(given_))
    ]
    for passes in by_dataset:  # each epoch begins all anew
        assert passes[0].isdisjoint(passes[1])
        assert passes[1].isdisjoint(passes[2])
    assert turns[0] != turns[1]
    shares = recipe_of(given_, "all").stages[0].shares
    assert any(
        own < size
        for lane, recipe in enumerate(mixture.recipes)
        for own, size in zip(
            counts(shares, lane_length(mixture.num_samples - 1, lane, mixture.lanes)),
            recipe.sizes,
            strict=True,
        )
    )


@given(sizes_and_weights)
def test_fixed_sizes_have_one_lane(given_):
    """Their samples come as often as is said, which lanes that are dealt anew do not keep."""
    _, epochs = all_epochs(given_, "sizes", 1)
    for epoch in epochs:
        found = np.bincount([dataset for dataset, _, _ in epoch], minlength=len(given_))
        assert found.tolist() == [weight for _, weight in given_]
    bigger = [(size + 1, weight) for size, weight in given_]
    with pytest.raises(InvalidRequest, match="lanes=1"):
        in_lanes(recipe_of(bigger, "sizes"), "sizes", 2)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), lane_numbers, st.integers(1, 4000))
def test_each_block_of_a_lane_has_the_shares(weights, lanes, num_samples):
    shares = apportion(weights, SHARE_SUM)
    recipe = Recipe((10**6,) * len(weights), (Stage(0, shares),), num_samples)
    found = np.array([one[0] for one in read(in_lanes(recipe, "endless", lanes))], dtype=np.int64)
    for lane in range(lanes):
        own = found[lane::lanes]
        for start in range(0, len(own) - BLOCK_SAMPLES + 1, BLOCK_SAMPLES):
            counted = np.bincount(own[start : start + BLOCK_SAMPLES], minlength=len(weights))
            exact = np.array(weights) / sum(weights) * BLOCK_SAMPLES
            assert np.abs(counted - exact).max() < 3


@given(lane_numbers, st.integers(1, 200), st.integers(1, 500))
def test_a_schedule_changes_the_shares_at_its_very_sample(lanes, num_samples, change):
    recipe = Recipe(
        (1000, 1000), (Stage(0, (SHARE_SUM, 0)), Stage(change, (0, SHARE_SUM))), num_samples
    )
    mixture = in_lanes(recipe, "endless", lanes)
    found = [one[0] for epoch in range(EPOCHS) for one in read(mixture, epoch)]
    assert found == [int(position >= change) for position in range(EPOCHS * num_samples)]


@given(sizes_and_weights, lane_numbers, st.sampled_from(["endless", "first", "all"]))
def test_the_next_places_never_fall_and_are_never_far_ahead(given_, lanes, ends):
    mixture = laned(given_, ends, lanes)
    order = LanedOrder(mixture, "identity", 0, 1)
    before = [(0, 0)] * len(given_)
    read_ = list(enumerate(read(mixture, 1)))
    for position in range(0, mixture.num_samples + 1, 17):
        now = order.next_places(position)
        assert all(a <= b for a, b in zip(before, now, strict=True))
        before = now
        for later, (dataset, turn, place) in read_[position:]:
            if later % mixture.lanes == 0:
                assert now[dataset] <= (turn, place)


def test_one_lane_is_the_mixture_itself():
    recipe = recipe_of([(50, 3), (20, 1)], "first")
    mixture = in_lanes(recipe, "first", 1)
    numbers, ordinals = MixtureOrder(recipe, "identity", 0, 2).at(np.arange(recipe.num_samples))
    wanted = zip(numbers, *np.divmod(ordinals, np.array(recipe.sizes)[numbers]), strict=True)
    assert read(mixture, 2) == [tuple(map(int, one)) for one in wanted]


def test_lanes_differ_in_which_dataset_stands_where():
    recipe = Recipe((10**6, 10**6), (Stage(0, apportion([1, 1], SHARE_SUM)),), 1024)
    found = [one[0] for one in read(in_lanes(recipe, "endless", 2))]
    assert found[0::2] != found[1::2]


def test_the_order_is_fixed_for_ever():
    mixture = in_lanes(recipe_of([(50, 3), (20, 1)], "all"), "all", 3)
    assert mixture.num_samples == NUM_SAMPLES
    assert read(mixture, 1, seed=4)[:8] == FIRST


def test_more_lanes_than_a_dataset_has_samples_are_refused():
    with pytest.raises(InvalidRequest, match="dataset 1 of it has 3 samples"):
        in_lanes(recipe_of([(50, 3), (3, 1)], "first"), "first", 4)
    mixture = in_lanes(recipe_of([(50, 3), (20, 1)], "first"), "first", 4)
    with pytest.raises(InvalidRequest, match="outside an epoch"):
        LanedOrder(mixture, "identity", 0, 0).at(np.array([mixture.num_samples]))
