"""The state machine of generations: what can happen, and what never can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.states import (
    TRANSITIONS,
    Durability,
    Event,
    GenerationState,
    PackState,
    advance,
    after_packs,
    check_durability,
    durability_of,
    is_final,
    reaches,
)
from forebay_wire.errors import InvalidRequest

G = GenerationState


@pytest.mark.parametrize(
    ("state", "event", "expected"),
    [
        (G.OPEN, Event.ALL_SEALED, G.SEALED),
        (G.OPEN, Event.FENCED, G.ABORTED),
        (G.OPEN, Event.DAEMON_ENDED, G.ABORTED),
        (G.OPEN, Event.FAILED, G.FAILED),
        (G.OPEN, Event.ALL_LANDED, None),
        (G.SEALED, Event.ALL_LANDED, G.COMMITTED),
        (G.SEALED, Event.FENCED, G.SEALED),
        (G.SEALED, Event.DAEMON_ENDED, G.ABORTED),
        (G.COMMITTED, Event.FENCED, G.COMMITTED),
        (G.COMMITTED, Event.DAEMON_ENDED, G.COMMITTED),
        (G.COMMITTED, Event.FAILED, None),
        (G.ABORTED, Event.ALL_LANDED, None),
        (G.ABORTED, Event.ALL_SEALED, None),
        (G.FAILED, Event.ALL_LANDED, None),
    ],
)
def test_an_event_leads_to(state: G, event: Event, expected: G | None) -> None:
    assert advance(state, event) is expected


@given(st.lists(st.sampled_from(Event)))
def test_whatever_happens_only_a_sealed_generation_is_committed(events: list[Event]) -> None:
    state = G.OPEN
    seen = [state]
    for event in events:
        state = advance(state, event) or state
        seen.append(state)
    if G.COMMITTED in seen:
        assert seen[seen.index(G.COMMITTED) - 1] is G.SEALED
        assert set(seen[seen.index(G.COMMITTED) :]) == {G.COMMITTED}


@given(st.sampled_from(G), st.lists(st.sampled_from(Event)))
def test_a_final_state_never_goes_back_to_landing(start: G, events: list[Event]) -> None:
    state = start
    for event in events:
        was_final = is_final(state)
        state = advance(state, event) or state
        assert is_final(state) or not was_final


def test_a_fence_and_the_end_of_the_daemon_can_come_in_every_state() -> None:
    for state in G:
        assert (state, Event.DAEMON_ENDED) in TRANSITIONS
        assert (state, Event.FENCED) in TRANSITIONS
        if state is not G.OPEN:
            assert advance(state, Event.FENCED) is state


O, S, L = PackState.OPEN, PackState.SEALED, PackState.LANDED  # noqa: E741


@pytest.mark.parametrize(
    ("state", "num_ranks", "packs", "expected"),
    [
        (G.OPEN, 2, [], G.OPEN),
        (G.OPEN, 2, [S], G.OPEN),
        (G.OPEN, 2, [L], G.OPEN),
        (G.OPEN, 2, [L, O], G.OPEN),
        (G.OPEN, 2, [S, S], G.SEALED),
        (G.OPEN, 2, [L, S], G.SEALED),
        (G.OPEN, 2, [L, L], G.COMMITTED),
        (G.SEALED, 2, [L, S], G.SEALED),
        (G.SEALED, 2, [L, L], G.COMMITTED),
        (G.OPEN, 1, [L], G.COMMITTED),
        (G.ABORTED, 2, [L, L], G.ABORTED),
        (G.FAILED, 2, [L, L], G.FAILED),
        (G.COMMITTED, 2, [L, L], G.COMMITTED),
    ],
)
def test_the_packs_make_the_state(
    state: G, num_ranks: int, packs: list[PackState], expected: G
) -> None:
    assert after_packs(state, num_ranks, packs) is expected


@pytest.mark.parametrize(
    ("state", "is_remote", "expected"),
    [
        (G.OPEN, False, Durability.NONE),
        (G.SEALED, False, Durability.RAM),
        (G.COMMITTED, False, Durability.LOCAL),
        (G.COMMITTED, True, Durability.REMOTE),
        (G.ABORTED, False, Durability.NONE),
        (G.FAILED, False, Durability.NONE),
    ],
)
def test_durability_of_a_state(state: G, is_remote: bool, expected: Durability) -> None:
    assert durability_of(state, is_remote) is expected


def test_each_durability_reaches_itself_and_the_weaker_ones() -> None:
    order = list(Durability)
    for index, one in enumerate(order):
        assert [reaches(one, other) for other in order] == [n <= index for n in range(len(order))]


def test_an_unknown_durability_is_the_callers_mistake() -> None:
    assert check_durability("") is Durability.LOCAL
    assert check_durability("remote") is Durability.REMOTE
    with pytest.raises(InvalidRequest, match=r"'ram'.*'local'.*'remote'"):
        check_durability("somewhere")
    with pytest.raises(InvalidRequest, match="'replicated' is not configured: it needs a second"):
        check_durability("replicated")
