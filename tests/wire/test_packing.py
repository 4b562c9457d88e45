"""Packing: every token once, no window beyond its group, and any place to go on from."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forebay_wire.errors import InvalidRequest
from forebay_wire.packing import Packing, WindowCut, best_fit, group_of, pieces, place_of

lengths_lists = st.lists(st.integers(1, 40), max_size=30)
widths = st.integers(1, 25)
fits = st.sampled_from(["cut", "whole"])


class Lengths:
    """Groups of documents of the given lengths."""

    def __init__(self, groups):
        self.groups = groups

    @property
    def num_groups(self):
        return len(self.groups)

    def ends(self, group):
        return np.cumsum(np.array(self.groups[group], dtype=np.int64))

    def borders(self, group):
        return None


class BestFit(Lengths):
    """The same, put together."""

    def __init__(self, groups, width, tail="pad"):
        super().__init__(groups)
        self.made = [best_fit(np.array(group, dtype=np.int64), width, tail) for group in groups]

    def ends(self, group):
        return np.cumsum(self.made[group].sizes)

    def borders(self, group):
        return self.made[group].borders


def by_hand(lengths, offset, width, fit):
    """Windows as lists of (document, token), one token after the other."""
    stream = [(document, token) for document, size in enumerate(lengths) for token in range(size)]
    found, window, at = [], [], offset
    while at < len(stream):
        document, token = stream[at]
        rest = lengths[document] - token
        begins = not window or token == 0
        full = len(window) == width
        too_long = fit == "whole" and begins and window and len(window) + rest > width
        if full or too_long:
            found.append(window)
            window = []
            continue
        window.append(stream[at])
        at += 1
    return [*found, window] if window else found


def contents(ends, starts, stops):
    found = pieces(ends, starts, stops)
    windows = [[] for _ in starts]
    for window, document, start, size in zip(
        found.windows, found.documents, found.starts, found.sizes, strict=True
    ):
        windows[window] += [(int(document), int(start) + token) for token in range(size)]
    return windows


@given(lengths_lists, widths, fits, st.data())
def test_windows_hold_what_counting_token_by_token_finds(lengths, width, fit, data):
    offset = data.draw(st.integers(0, sum(lengths)))
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    starts, stops = Packing(width, fit).windows(ends, offset)
    assert contents(ends, starts, stops) == by_hand(lengths, offset, width, fit)
    assert np.array_equal(stops[:-1], starts[1:])
    assert np.array_equal(stops, Packing(width, fit).stops(ends, starts))


@given(lengths_lists, widths)
def test_whole_documents_are_cut_only_if_they_are_longer_than_a_window(lengths, width):
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    found = pieces(ends, *Packing(width, "whole").windows(ends, 0))
    cut = found.sizes < np.array(lengths, dtype=np.int64)[found.documents]
    assert all(lengths[document] > width for document in found.documents[cut])


@given(lengths_lists, widths, fits)
def test_dropping_leaves_out_at_most_the_last_window(lengths, width, fit):
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    starts, stops = Packing(width, fit).windows(ends, 0)
    dropped, _ = Packing(width, fit, "drop").windows(ends, 0)
    is_short = len(starts) > 0 and stops[-1] - starts[-1] < width
    assert np.array_equal(dropped, starts[:-1] if is_short else starts)


@given(st.lists(lengths_lists, max_size=5), widths, fits, st.integers(1, 7), st.data())
def test_from_any_step_on_the_rest_is_the_same_with_any_batch_size(groups, width, fit, size, data):
    packing = Packing(width, fit)
    cut = WindowCut(Lengths(groups), packing, size)
    steps = list(cut.steps())
    assert len(steps) == cut.num_steps
    assert cut.is_over == (not steps)
    places = [place for step in steps for place in step.places.tolist()]
    assert places == [
        place_of(number, int(start))
        for number in range(len(groups))
        for start in packing.windows(Lengths(groups).ends(number), 0)[0]
    ]
    if not steps:
        return
    assert group_of(steps[-1].after)[1] == 0  # a group that is read is behind
    done = data.draw(st.integers(1, len(steps)))
    position = cut.bounds(steps[done - 1])[1]
    other = WindowCut(Lengths(groups), packing, data.draw(st.integers(1, 7)), position=position)
    rest = [place for step in other.steps() for place in step.places.tolist()]
    assert rest == places[done * size :]
    assert group_of(position)[0] <= len(groups)


@given(
    st.lists(lengths_lists, max_size=4),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(["keep", "pad", "drop"]),
)
def test_all_ranks_have_the_same_steps_and_share_out_each_one(groups, size, ranks, last_batch):
    cut = WindowCut(Lengths(groups), Packing(8), size, last_batch)
    steps = list(cut.steps())
    assert len(steps) == cut.num_steps
    for step in steps:
        parts = [cut.part(step, rank, ranks) for rank in range(ranks)]
        real = [part.positions(0)[part.mask()].tolist() for part in parts]
        assert [place for own in real for place in own] == step.places.tolist()
        assert max(map(len, real)) - min(map(len, real)) <= 1
        if last_batch == "pad":
            assert {len(part.positions(0)) for part in parts} == {-(-size // ranks)}
        if last_batch == "drop":
            assert len(step.places) == size


@given(lengths_lists, widths, widths, st.data())
def test_another_width_goes_on_at_the_very_token(lengths, before, after, data):
    cut = WindowCut(Lengths([lengths]), Packing(before), 1)
    steps = list(cut.steps())
    if not steps:
        return
    step = steps[data.draw(st.integers(0, len(steps) - 1))]
    ends = Lengths([lengths]).ends(0)
    group, offset = group_of(step.after)
    rest = Packing(after).windows(ends, offset)[0].tolist() if group == 0 else []
    expected = list(range(offset, sum(lengths), after)) if group == 0 else []
    assert rest == expected


def test_what_makes_no_packing_is_refused():
    for options in ({"width": 0}, {"width": 4, "fit": "worst"}, {"width": 4, "tail": "keep"}):
        with pytest.raises(InvalidRequest):
            Packing(**options)
    with pytest.raises(InvalidRequest, match="at least 1"):
        WindowCut(Lengths([]), Packing(4), 0)


# ------------------------------------------------------------------------------------- best fit


def best_by_hand(lengths, width):
    """Windows as lists of (document, start, size), by the definition and as slowly as it says."""
    items = [
        (document, start, min(width, size - start))
        for document, size in enumerate(lengths)
        for start in range(0, size, width)
    ]
    windows = []
    for item in sorted(items, key=lambda one: (-one[2], one[:2])):
        rooms = [width - sum(size for _, _, size in window) for window in windows]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= item[2]]
        if fitting:
            windows[min(fitting)[1]].append(item)
        else:
            windows.append([item])
    return sorted(sorted(window) for window in windows)


def windows_of(made):
    stops = np.searchsorted(np.cumsum(made.sizes), made.borders) + 1
    found = list(
        zip(made.documents.tolist(), made.starts.tolist(), made.sizes.tolist(), strict=True)
    )
    return [found[a:b] for a, b in zip([0, *stops], stops, strict=False)]


@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 12))
@example([3, 3, 2, 2], 5)
def test_best_fit_is_what_its_definition_says(lengths, width):
    given = np.array(lengths, dtype=np.int64)
    windows = windows_of(best_fit(given, width, "pad"))
    assert windows == best_by_hand(lengths, width)
    fill = [sum(size for _, _, size in window) for window in windows]
    assert all(0 < size <= width for size in fill)
    assert all(a + b > width for a, b in zip(sorted(fill), sorted(fill)[1:], strict=False))
    dropped = windows_of(best_fit(given, width, "drop"))
    if fill and min(fill) < width:
        last = len(fill) - 1 - fill[::-1].index(min(fill))
        assert dropped == [*windows[:last], *windows[last + 1 :]]
    else:
        assert dropped == windows


@given(lengths_lists, widths)
def test_best_fit_has_every_token_once_and_cuts_only_what_is_too_long(lengths, width):
    made = best_fit(np.array(lengths, dtype=np.int64), width, "pad")
    found = sorted(
        (document, token)
        for document, start, size in zip(made.documents, made.starts, made.sizes, strict=True)
        for token in range(start, start + size)
    )
    assert found == [(d, t) for d, size in enumerate(lengths) for t in range(size)]
    cut = made.sizes < np.array(lengths, dtype=np.int64)[made.documents]
    assert all(lengths[document] > width for document in made.documents[cut])


@given(
    st.lists(lengths_lists, max_size=5),
    widths,
    st.sampled_from(["pad", "drop"]),
    st.integers(1, 7),
    st.data(),
)
def test_best_fit_goes_on_from_any_step_with_any_batch_size(groups, width, tail, size, data):
    packing, made = Packing(width, "best", tail), BestFit(groups, width, tail)
    steps = list(WindowCut(made, packing, size).steps())
    places = [place for step in steps for place in step.places.tolist()]
    borders = [(number, made.borders(number).tolist()) for number in range(len(groups))]
    assert places == [
        place_of(number, start) for number, ends in borders for start in [0, *ends][: len(ends)]
    ]
    for place in places:
        group, offset = group_of(place)
        ends, starts = made.ends(group), np.array([offset])
        stops = packing.stops(ends, starts, made.borders(group))
        assert stops[0] in made.borders(group)
        assert 0 < pieces(ends, starts, stops).sizes.sum() <= width
    if steps:
        done = data.draw(st.integers(1, len(steps)))
        again = WindowCut(
            made, packing, data.draw(st.integers(1, 7)), position=steps[done - 1].after
        )
        rest = [place for step in again.steps() for place in step.places.tolist()]
        assert rest == places[done * size :]
