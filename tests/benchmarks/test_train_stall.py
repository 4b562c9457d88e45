"""The arithmetic of the stall benchmark."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(*steps: float, stalls: tuple[float, ...] = ()) -> dict[str, Any]:
    return {"steps": list(steps), "waits": [0.0], "stalls": list(stalls)}


def test_a_lost_second_is_one_beyond_the_limit_of_the_same_turn(module: Any) -> None:
    stall = module("train_stall")
    runs = stall.Runs()
    for ours, limit in (((1.0, 1.5), (1.0, 1.0)), ((1.2, 1.2), (1.0, 1.1))):
        runs.add("forebay", run(*ours))
        runs.add("limit", run(*limit))
    assert runs.lost("forebay") == pytest.approx([0.5, 0.3])


def test_steps_behind_a_save_are_compared_with_the_others(module: Any) -> None:
    stall = module("train_stall")
    runs = stall.Runs()
    behind = (2.0,) * stall.FOLLOWING
    runs.add("forebay", run(1.0, 9.0, *behind, 1.0, 1.0))
    assert runs.slowdown("forebay", [1]) == [2.0]


def test_the_report_has_every_ratio_in_its_direction(module: Any) -> None:
    stall = module("train_stall")
    runs, steps = stall.Runs(), stall.EVERY_STEPS
    for _ in range(7):
        runs.add("limit", run(*[1.0] * steps))
        for name, extra in (("forebay", 0.5), ("torch", 4.0), ("dcp", 1.0)):
            told = run(*[1.0] * 4, 1.0 + extra, *[1.0] * (steps - 5), stalls=(extra,))
            runs.add(name, told)
        runs.add("forebay_object", run(*[1.0] * 4, 2.0, *[1.0] * (steps - 5), stalls=(1.0,)))
    report = stall.report(runs, stall.Sizes(1, 1, 7, 7))
    assert report.ratios == {
        "lost_time_vs_torch_save": pytest.approx(0.125),
        "lost_time_vs_dcp_async": pytest.approx(0.5),
        "step_time_vs_limit": pytest.approx(20.5 / 20),
    }
    assert report.values["torch_save_share"] == pytest.approx(0.2)
    assert report.values["lost_time_with_flush_vs_torch_save"] == pytest.approx(0.25)
    assert report.short() == []


def test_a_batch_is_chosen_by_the_two_tries_that_are_nearest(module: Any) -> None:
    stall = module("train_stall")
    seconds = {16: 0.02, 64: 0.05, 100: 0.08}
    assert stall.nearest(0.07, seconds) == {100: 0.08, 64: 0.05}
    assert stall.batch_for(0.065, stall.nearest(0.065, seconds)) == 82
    assert stall.batch_for(1e9, seconds=dict(list(seconds.items())[:2])) == stall.BATCHES[1]
    assert stall.wanted_seconds([0.4, 0.4, 0.9]) == pytest.approx(0.1)


def test_the_state_has_about_the_size_that_was_asked_for(module: Any) -> None:
    child = module("stall_child")
    model = child.model_of(300_000_000, 3072)
    num_bytes = child.BYTES_PER_PARAMETER * sum(each.numel() for each in model.parameters())
    assert abs(num_bytes / 300_000_000 - 1) < 0.1
