"""The budget of background work, by a clock of its own."""

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.move.budget import BURST_SECONDS, YIELD_SECONDS, Budget


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, on_sleep: Callable[[], object] = lambda: None) -> None:
        self.seconds = 100.0
        self._on_sleep = on_sleep

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.seconds += seconds
        self._on_sleep()


def make(clock: Clock, **rates: float) -> Budget:
    return Budget(rates, clock=clock, sleep=clock.sleep)


@given(
    rate=st.integers(10**5, 10**9),
    pieces=st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
)
def test_what_moves_stays_below_the_rate_and_a_burst(rate: int, pieces: list[int]) -> None:
    clock = Clock()
    budget = make(clock, ssd=rate)
    began = clock.seconds
    for piece in pieces:
        budget.take("ssd", piece)
    allowed = (clock.seconds - began + BURST_SECONDS) * rate
    assert sum(pieces) <= allowed * (1 + 1e-6) + 1e-3
    # And not much slower than it may be.
    assert clock.seconds - began <= sum(pieces) / rate + 1e-3


def test_a_tier_without_a_rate_does_not_wait() -> None:
    clock = Clock()
    make(clock, ssd=1, hdd=0).take("hdd", 1 << 40)
    make(clock).take("object", 1 << 40)
    assert clock.seconds == 100.0


def test_a_piece_steps_back_for_readers_and_never_starves() -> None:
    clock = Clock()
    budget = make(clock)
    with budget.foreground("ssd"):
        budget.take("hdd", 1)
        assert clock.seconds == 100.0
        budget.take("ssd", 1)
        assert YIELD_SECONDS <= clock.seconds - 100 < 2 * YIELD_SECONDS
    waited = clock.seconds
    budget.take("ssd", 1)
    assert clock.seconds == waited


def test_a_piece_goes_on_as_soon_as_the_readers_are_gone() -> None:
    reading: list[object] = []

    def leave() -> None:
        if reading:
            reading.pop().__exit__(None, None, None)  # type: ignore[attr-defined]

    clock = Clock(leave)
    budget = make(clock)
    block = budget.foreground("ssd")
    block.__enter__()
    reading.append(block)
    budget.take("ssd", 1)
    assert clock.seconds - 100 < YIELD_SECONDS / 2
    assert not budget.is_busy("ssd")


def test_a_wait_can_be_ended() -> None:
    clock = Clock()
    budget = make(clock, ssd=1)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        budget.take("ssd", 10**9, stop)


def test_threads_share_one_rate() -> None:
    budget = Budget({"ssd": 1e6}, sleep=lambda seconds: None)
    # With a sleep that does nothing each take returns once the real clock is there.
    threads = [threading.Thread(target=budget.take, args=("ssd", 150_000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert budget._buckets["ssd"].take(0, 0.0) >= 0
