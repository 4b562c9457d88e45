"""Counts and bounds of splits."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.splits import folds, split_bounds
from forebay_wire.errors import InvalidRequest


@pytest.mark.parametrize(
    ("num_rows", "fractions", "counts"),
    [
        (5000, {"train": 0.8, "test": 0.2}, {"test": 1000, "train": 4000}),
        (10, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 7, "b": 2, "c": 1}),
        (10, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {"a": 4, "b": 3, "c": 3}),
        (7, {"a": 0.5, "b": 0.5}, {"a": 4, "b": 3}),
        (100, {"a": 0.25}, {"a": 25}),
        (3, {"a": 0.1, "b": 0.1}, {"a": 0, "b": 0}),
        (0, {"a": 1.0}, {"a": 0}),
    ],
)
def test_counts_follow_the_largest_remainder(
    num_rows: int, fractions: dict[str, float], counts: dict[str, int]
) -> None:
    bounds = split_bounds(num_rows, fractions)
    assert {name: stop - start for name, (start, stop) in bounds.items()} == counts


@given(
    num_rows=st.integers(0, 10**12),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    unused=st.integers(0, 1000),
)
def test_splits_do_not_overlap_and_full_shares_leave_nothing(
    num_rows: int, weights: list[int], unused: int
) -> None:
    total = sum(weights) + unused
    fractions = {f"s{i:02}": weight / total for i, weight in enumerate(weights)}
    bounds = list(split_bounds(num_rows, fractions).values())
    assert bounds[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    assert all(start <= stop for start, stop in bounds)
    assert bounds[-1][1] <= num_rows
    if not unused:
        assert bounds[-1][1] == num_rows
    for name, (start, stop) in split_bounds(num_rows, fractions).items():
        assert abs((stop - start) - num_rows * fractions[name]) < 1.01 + num_rows * 1e-9


def test_the_order_of_naming_does_not_matter() -> None:
    assert split_bounds(10, {"a": 0.5, "b": 0.3}) == split_bounds(10, {"b": 0.3, "a": 0.5})


@pytest.mark.parametrize(
    "fractions",
    [{}, {"a": 0.0}, {"a": -0.1}, {"a": 1.1}, {"a": 0.6, "b": 0.5}, {"a": float("nan")}],
)
def test_shares_that_make_no_sense_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        split_bounds(10, fractions)


@given(st.integers(2, 300), st.data())
def test_folds_test_every_row_once_and_train_on_the_others(num_rows: int, data) -> None:
    k = data.draw(st.integers(2, num_rows))
    found = folds(num_rows, k)
    ring = [*range(num_rows), *range(num_rows)]
    rows = {(one.fold, one.part): ring[one.start : one.stop] for one in found}
    tested = [row for fold in range(k) for row in rows[fold, "test"]]
    assert sorted(tested) == list(range(num_rows))
    sizes = [len(rows[fold, "test"]) for fold in range(k)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    for fold in range(k):
        both = rows[fold, "train"] + rows[fold, "test"]
        assert sorted(both) == list(range(num_rows))


@pytest.mark.parametrize(("num_rows", "k"), [(10, 1), (10, 0), (3, 4), (0, 2)])
def test_folds_that_would_be_empty_are_refused(num_rows: int, k: int) -> None:
    with pytest.raises(InvalidRequest, match="folds"):
        folds(num_rows, k)
