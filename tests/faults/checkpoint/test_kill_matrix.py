"""SIGKILL of trainer, daemon, both or one rank of four at every named point of a save."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forebay_server.testing.beside import load_beside

HERE = Path(__file__).parent

common = load_beside(__file__, "system")
kill_points = load_beside(__file__, "kill_points")

HELD_RANK = 2
"""Of four, where one is to die."""

ALLOWED = {"before": {1}, "saved": {2}, "whole": {1, 2}}
"""The newest step by what is said to be left."""

SOME = {
    ("client.save.in_copy", "trainer"),
    ("pack.after_seal", "trainer"),
    ("client.save.after_copy", "daemon"),
    ("upload.after_publish", "both"),
    ("client.save.after_copy", "rank"),
}
"""Stand for all in the default suite."""

CASES = [
    pytest.param(
        point,
        victim,
        id=f"{point.name}-{victim}",
        marks=() if (point.name, victim) in SOME else pytest.mark.slow,
    )
    for point in kill_points.POINTS
    for victim in kill_points.VICTIMS
]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with common.System(tmp_path_factory.mktemp("kills")) as made:
        yield made


def kill(system: Any, victim: str, pids: list[int]) -> list[int]:
    """Kill who is to die and let the others go on; how the trainers ended."""
    if victim != "daemon":
        for pid in pids[HELD_RANK:][:1] if victim == "rank" else pids:
            os.kill(pid, signal.SIGKILL)
    if victim in ("daemon", "both"):
        system.daemon.kill()
        system.hold_no_more()
        system.daemon.start().wait_ready()
    system.release()
    return [system.wait(pid) for pid in pids]


@pytest.mark.parametrize(("point", "victim"), CASES)
def test_what_is_left(system: Any, point: Any, victim: str) -> None:
    run = f"{point.name}-{victim}".replace(".", "-").replace("_", "-")
    before = {**system.leftovers(), "ram": 0}  # no case leaves memory to the next
    system.save_before(run)
    system.hold(point.name)
    ranks = 4 if victim == "rank" else 1
    pids = system.fork(
        run,
        ranks,
        durability="remote" if point.name.startswith("flush") else "local",
        hold=point.name if point.process == "trainer" else "",
        held_rank=HELD_RANK if victim == "rank" else 0,
    )
    try:
        system.wait_held(point.name)
        ends = kill(system, victim, pids)
    finally:
        system.release()
    if victim in ("trainer", "both"):
        assert ends == [-signal.SIGKILL]
    elif victim == "daemon":
        assert ends in ([0], [3]), system.trainers_log()  # saved, or a clear error
    else:
        assert ends.pop(HELD_RANK) == -signal.SIGKILL
        assert set(ends) <= {0, 3}, system.trainers_log()
    system.check_left(run, ALLOWED[point.left_by(victim)])
    system.check_no_leak(run, before)


def test_every_point_that_a_save_passes_is_in_the_table() -> None:
    assert {point.name for point in kill_points.POINTS} == kill_points.PASSED


def test_the_page_is_printed_from_the_table() -> None:
    path = HERE / "kill_points.py"
    assert kill_points.PAGE.read_text(encoding="utf-8") == kill_points.render(), f"run {path}"
