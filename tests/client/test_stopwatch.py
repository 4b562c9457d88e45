"""Each moment of a thread belongs to one cause: nested blocks, explained waits, locks."""

import threading
import time

import pytest

from forebay.stopwatch import Stopwatch, Turn, timed

PAUSE = 0.02


@pytest.fixture
def watch():
    started = time.perf_counter()
    found = Stopwatch("decode")
    yield found
    ended = found.stop()
    assert sum(found.seconds.values()) == pytest.approx(ended - started, abs=1e-3)
    assert all(seconds >= 0.0 for seconds in found.seconds.values())


def test_what_is_inside_is_taken_away_from_what_is_around(watch):
    with timed("network"):
        time.sleep(PAUSE)
        with timed("verify"):
            time.sleep(2 * PAUSE)
        with timed("network"):
            time.sleep(PAUSE)
    assert watch.seconds["verify"] == pytest.approx(2 * PAUSE, rel=0.5)
    assert watch.seconds["network"] == pytest.approx(2 * PAUSE, rel=0.5)
    assert watch.seconds["decode"] < PAUSE


def test_an_error_ends_its_block(watch):
    with pytest.raises(KeyError), timed("network"):
        raise KeyError
    assert watch.cause == "decode"


def test_what_the_daemon_explains_is_moved_and_the_rest_stays(watch):
    with timed("open") as opening:
        time.sleep(3 * PAUSE)
        opening.explain({"origin": PAUSE, "throttle": 0.0, "made_up": 1.0})
    assert watch.seconds["origin"] == pytest.approx(PAUSE)
    assert watch.seconds["open"] >= 1.9 * PAUSE
    assert set(watch.seconds) == {"decode", "open", "origin"}


def test_an_explanation_is_cut_to_what_the_block_took(watch):
    with timed("open"):
        time.sleep(PAUSE)
    before = watch.seconds["open"]
    with timed("open") as opening:
        time.sleep(PAUSE)
        opening.explain({"origin": 30.0, "tier": 10.0})
    assert watch.seconds["open"] == pytest.approx(before)
    assert watch.seconds["origin"] == pytest.approx(3 * watch.seconds["tier"])
    assert watch.seconds["origin"] < 10 * PAUSE


@pytest.mark.parametrize("nothing", [None, {}, "text", {"origin": 0.0}])
def test_no_explanation_leaves_all_as_it_is(watch, nothing):
    with timed("open") as opening:
        opening.explain(nothing)
    assert set(watch.seconds) == {"decode", "open"}


def test_without_a_stopwatch_nothing_is_counted():
    with timed("open") as opening, Turn():
        assert not opening.counts


def test_each_thread_has_its_own(watch):
    def other() -> None:
        with timed("verify"):
            time.sleep(PAUSE)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "verify" not in watch.seconds


def test_one_that_starts_inside_another_takes_its_time_from_nobody(watch):
    inner = Stopwatch("transform")
    with timed("verify"):
        time.sleep(PAUSE)
    inner.stop()
    with timed("network"):
        pass
    assert inner.seconds["verify"] >= PAUSE
    assert set(watch.seconds) == {"decode", "network"}


def test_who_waits_for_a_turn_waits_for_what_the_one_before_did(watch):
    turn, has_it = Turn(), threading.Event()

    def holder() -> None:
        mine = Stopwatch("decode")
        with turn:
            has_it.set()
            with timed("origin"):
                time.sleep(3 * PAUSE)
            with timed("verify"):
                time.sleep(PAUSE)
        mine.stop()

    thread = threading.Thread(target=holder)
    thread.start()
    assert has_it.wait(10)
    with turn:
        pass
    thread.join()
    assert watch.seconds["origin"] > 1.5 * watch.seconds["verify"] > 0.0
    assert watch.seconds["origin"] + watch.seconds["verify"] > 2 * PAUSE
    assert watch.seconds.get("open", 0.0) < PAUSE
