"""Two processes save one run: one wins, the other one gets a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay_server.testing.beside import load_beside

HERE = Path(__file__).parent

common = load_beside(__file__, "system")

pytestmark = pytest.mark.slow

BEFORE_ITS_SEAL = (
    "client.save.after_plan",
    "client.save.after_begin",
    "client.save.in_copy",
    "client.save.after_copy",
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with common.System(tmp_path_factory.mktemp("two")) as made:
        yield made


@pytest.mark.parametrize("point", BEFORE_ITS_SEAL)
def test_who_is_overtaken_within_a_save_is_fenced(system: Any, point: str) -> None:
    run = point.replace(".", "-").replace("_", "-")
    system.save_before(run)
    system.hold(point)
    (slow,) = system.fork(run, hold=point)
    try:
        system.wait_held(point)
        with system.connect() as client, forebay.Checkpointer(client, run) as fast:
            resumed = fast.restore("latest")
            assert resumed is not None
            assert resumed.step == 1
            fast.save(2, state=common.trainers.state_at(2)).wait("local", timeout=common.SECONDS)
    finally:
        system.release()
    assert system.wait(slow) == 3
    (told,) = system.results(run)
    assert told.startswith("Fenced: "), told
    assert run in told
    assert "attempt" in told
    system.check_left(run, {2})


def test_of_two_that_save_in_turn_the_later_attempt_goes_on(system: Any) -> None:
    run, state = "turns", common.trainers.state_at
    with system.connect() as client, system.connect() as other:
        first, second = forebay.Checkpointer(client, run), forebay.Checkpointer(other, run)
        first.save(1, state=state(1)).wait("local", timeout=common.SECONDS)
        second.restore("latest")
        with pytest.raises(forebay.Fenced, match="attempt"):
            first.save(2, state=state(2))
        second.save(2, state=state(2)).wait("local", timeout=common.SECONDS)
        with pytest.raises(forebay.Fenced, match="attempt"):
            first.save(3, state=state(3))
        first.close()
        second.close()
    system.check_left(run, {2})


def test_of_two_that_start_at_once_one_at_least_saves_and_nothing_is_mixed(system: Any) -> None:
    for number in range(5):
        run = f"at-once-{number}"
        system.save_before(run)
        pids = [*system.fork(run), *system.fork(f"{run}")]
        ends = [system.wait(pid) for pid in pids]
        assert 0 in ends, system.trainers_log()
        assert set(ends) <= {0, 1, 3}  # 1: it restored what the other one had saved already
        system.check_left(run, {2})
