"""``latest`` follows what the newest attempt stands on, whatever the steps and times say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.lineage import Lineage, Point, needed_as_parent
from forebay_server.model.states import GenerationState

C, S, A = GenerationState.COMMITTED, GenerationState.SEALED, GenerationState.ABORTED
VISIBLE = {C}


def point(text: str) -> Point:
    attempt, step = text.split("/")
    return Point(int(attempt), int(step))


def make(parents: dict[int, str | None], states: dict[str, GenerationState]) -> Lineage:
    return Lineage(
        {number: point(parent) if parent else None for number, parent in parents.items()},
        {point(text): state for text, state in states.items()},
    )


@pytest.mark.parametrize(
    ("parents", "states", "skip", "expected"),
    [
        pytest.param({}, {}, [], None, id="no attempt"),
        pytest.param({1: None}, {}, [], None, id="nothing saved"),
        pytest.param({1: None}, {"1/5": C, "1/10": C}, [], "1/10", id="newest step"),
        pytest.param({1: None}, {"1/5": C, "1/10": A}, [], "1/5", id="aborted is invisible"),
        pytest.param({1: None}, {"1/5": C, "1/10": S}, [], "1/5", id="landing is invisible"),
        pytest.param({1: None, 2: "1/5"}, {"1/5": C, "1/10": C}, [], "1/5", id="rolled back"),
        pytest.param(
            {1: None, 2: "1/5"}, {"1/5": C, "1/10": C, "2/7": C}, [], "2/7", id="lower step wins"
        ),
        pytest.param({1: None, 2: None}, {"1/5": C}, [], None, id="a fresh start has none"),
        pytest.param(
            {1: None, 2: "1/5", 3: "2/7"}, {"1/5": C, "2/7": C, "2/9": C}, [], "2/7", id="two deep"
        ),
        pytest.param(
            {1: None, 2: "1/10"}, {"1/5": C}, [], "1/5", id="deleted parent: what is older"
        ),
        pytest.param({2: "1/10"}, {"2/12": C}, [], "2/12", id="lost older attempt"),
        pytest.param(
            {1: None, 2: "1/5"}, {"1/5": C, "2/7": C}, ["2/7"], "1/5", id="skip to the parent"
        ),
        pytest.param(
            {1: None, 2: "1/10"},
            {"1/5": C, "1/10": C, "1/15": C, "2/12": C},
            ["2/12", "1/10"],
            "1/5",
            id="skip over the parent",
        ),
        pytest.param({1: None}, {"1/5": C}, ["1/5"], None, id="all skipped"),
        pytest.param({1: "1/5"}, {"1/5": C}, ["1/5"], None, id="its own parent ends the walk"),
    ],
)
def test_latest(
    parents: dict[int, str | None],
    states: dict[str, GenerationState],
    skip: list[str],
    expected: str | None,
) -> None:
    found = make(parents, states).latest(VISIBLE, [point(text) for text in skip])
    assert found == (point(expected) if expected else None)


def test_a_sealed_generation_is_a_candidate_where_it_is_asked_for() -> None:
    run = make({1: None, 2: "1/5"}, {"1/5": C, "1/10": S, "2/7": S})
    assert list(run.candidates({C, S})) == [Point(2, 7), Point(1, 5)]


def test_a_step_means_the_one_on_the_lineage() -> None:
    run = make({1: None, 2: "1/5"}, {"1/5": C, "1/7": C, "2/7": C, "1/9": C})
    assert run.at_step(7, VISIBLE) == Point(2, 7)
    assert run.at_step(5, VISIBLE) == Point(1, 5)
    assert run.at_step(9, VISIBLE) is None


@pytest.mark.parametrize(
    ("parents", "states", "deleted", "expected"),
    [
        ({1: None}, {"1/5": C}, "1/5", None),
        ({1: None, 2: "1/5"}, {"1/5": C}, "1/5", 2),
        ({1: None, 2: "1/5"}, {"1/5": C, "2/7": C}, "1/5", None),
        ({1: None, 2: "1/5"}, {"1/5": C, "2/7": S}, "1/5", 2),
        ({1: None, 2: "1/5"}, {"1/5": C, "1/9": C}, "1/9", None),
        ({1: None, 2: "1/5", 3: None}, {"1/5": C}, "1/5", None),
        ({1: None, 2: "1/5"}, {"1/5": A}, "1/5", None),
    ],
)
def test_an_attempt_without_a_generation_of_its_own_needs_its_parent(
    parents: dict[int, str | None],
    states: dict[str, GenerationState],
    deleted: str,
    expected: int | None,
) -> None:
    assert needed_as_parent(point(deleted), make(parents, states), VISIBLE) == expected


@st.composite
def histories(draw: st.DrawFn) -> Lineage:
    """Runs as they happen: each attempt restores a committed generation or starts afresh."""
    parents: dict[int, Point | None] = {}
    states: dict[Point, GenerationState] = {}
    for attempt in range(1, draw(st.integers(1, 5)) + 1):
        committed = [at for at, state in states.items() if state is C]
        parents[attempt] = draw(st.sampled_from([None, *committed]))
        base = parents[attempt].step if parents[attempt] else 0  # type: ignore[union-attr]
        for step in draw(st.sets(st.integers(base + 1, base + 9), max_size=4)):
            states[Point(attempt, step)] = draw(st.sampled_from([C, C, S, A]))
    return Lineage(parents, states)


@given(histories())
def test_the_walk_visits_each_generation_once_and_steps_only_go_down(run: Lineage) -> None:
    visited = list(run.walk())
    assert len(visited) == len(set(visited))
    steps = [at.step for at in visited]
    assert steps == sorted(steps, reverse=True)
    attempts = [at.attempt for at in visited]
    assert attempts == sorted(attempts, reverse=True)


@given(histories())
def test_skipping_the_latest_again_and_again_walks_the_whole_lineage(run: Lineage) -> None:
    skip: list[Point] = []
    while (found := run.latest(VISIBLE, skip)) is not None:
        skip.append(found)
    assert skip == [at for at in run.walk() if run.states[at] is C]


@given(histories())
def test_deleting_what_no_attempt_needs_never_loses_the_way_back(run: Lineage) -> None:
    latest = run.latest(VISIBLE)
    for at, state in run.states.items():
        if state is not C or needed_as_parent(at, run, VISIBLE) is not None:
            continue
        rest = Lineage(run.parents, {key: value for key, value in run.states.items() if key != at})
        assert at == latest or rest.latest(VISIBLE) == latest
