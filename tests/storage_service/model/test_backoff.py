"""Back-off: grows, is bounded, and jitter only shortens it by at most half."""

from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.backoff import FIRST_SECONDS, LONGEST_SECONDS, delay_seconds


def test_doubles_up_to_the_longest() -> None:
    delays = [delay_seconds(tries, 0.0) for tries in range(1, 20)]
    assert delays[:3] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS]
    assert delays[-1] == LONGEST_SECONDS
    assert delays == sorted(delays)


@given(st.integers(0, 10**9), st.floats(0, 1, exclude_max=True))
def test_jitter_takes_at_most_half(tries: int, jitter: float) -> None:
    whole = delay_seconds(tries, 0.0)
    assert whole / 2 <= delay_seconds(tries, jitter) <= whole
