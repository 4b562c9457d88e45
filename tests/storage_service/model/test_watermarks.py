"""Watermarks: when eviction starts and ends, and what is accepted meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.watermarks import START, Verdict, Watermarks, WatermarkState, step

MARKS = Watermarks(low=0.5, high=0.8, stop=0.9)


def verdict(
    used: int, *, reserved: int = 0, open_bytes: int = 0, evicting: bool = False
) -> Verdict:
    return step(
        MARKS,
        WatermarkState(evicting),
        used_bytes=used,
        reserved_bytes=reserved,
        open_bytes=open_bytes,
        usable_bytes=1000,
    )


@pytest.mark.parametrize(
    ("used", "evicting", "evict_bytes", "still"),
    [
        (0, False, 0, False),
        (700, False, 0, False),  # between the levels nothing starts
        (800, False, 0, False),
        (801, False, 301, True),
        (700, True, 200, True),  # but what started goes on
        (501, True, 1, True),
        (500, True, 0, False),
        (1200, False, 700, True),  # a limit that was lowered below what is there
    ],
)
def test_eviction_starts_above_high_and_ends_at_low(
    used: int, evicting: bool, evict_bytes: int, still: bool
) -> None:
    found = verdict(used, evicting=evicting)
    assert (found.evict_bytes, found.state.is_evicting) == (evict_bytes, still)


def test_what_is_open_is_not_asked_for() -> None:
    assert verdict(900, open_bytes=850).evict_bytes == 50
    assert verdict(900, open_bytes=900).evict_bytes == 0
    assert verdict(900, open_bytes=900).state.is_evicting


def test_reserved_bytes_count_as_taken() -> None:
    assert verdict(500, reserved=400).evict_bytes == 400


@pytest.mark.parametrize(
    ("used", "fill_room", "write_room"),
    [(0, 900, 1000), (899, 1, 101), (900, 0, 100), (999, 0, 1), (1000, 0, 0), (1100, 0, 0)],
)
def test_fills_end_at_stop_and_writes_at_the_limit(
    used: int, fill_room: int, write_room: int
) -> None:
    found = verdict(used)
    assert (found.fill_room_bytes, found.write_room_bytes) == (fill_room, write_room)
    assert found.admit_cache_fill == (fill_room > 0)
    assert found.admit_writes == (write_room > 0)


@pytest.mark.parametrize(
    ("low", "high", "stop"), [(0.9, 0.8, 0.95), (0.0, 0.5, 0.6), (0.5, 0.6, 1.1), (0.5, 0.9, 0.8)]
)
def test_levels_out_of_order_are_refused(low: float, high: float, stop: float) -> None:
    with pytest.raises(ValueError, match="watermarks"):
        Watermarks(low, high, stop)


fractions = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(sorted)


@given(
    levels=fractions,
    usable=st.integers(0, 1 << 50),
    used=st.integers(0, 1 << 50),
    reserved=st.integers(0, 1 << 40),
    evicting=st.booleans(),
    data=st.data(),
)
def test_one_eviction_reaches_low_or_takes_all_that_may_go(
    levels: list[float], usable: int, used: int, reserved: int, evicting: bool, data: st.DataObject
) -> None:
    marks = Watermarks(*levels)
    open_bytes = data.draw(st.integers(0, used))
    state = WatermarkState(evicting)

    def at(used_bytes: int, state: WatermarkState) -> Verdict:
        return step(
            marks,
            state,
            used_bytes=used_bytes,
            reserved_bytes=reserved,
            open_bytes=open_bytes,
            usable_bytes=usable,
        )

    first = at(used, state)
    assert 0 <= first.evict_bytes <= used - open_bytes
    assert 0 <= first.fill_room_bytes <= first.write_room_bytes
    after = at(used - first.evict_bytes, first.state)
    assert after.evict_bytes == 0
    # No flapping: what has just been brought down does not start again by itself.
    assert not after.state.is_evicting or used - first.evict_bytes == open_bytes
    # A fill as large as the room never starts an eviction that would refuse the next one for ever.
    filled = at(used + first.fill_room_bytes, START)
    assert filled.fill_room_bytes == 0 or first.fill_room_bytes == 0
