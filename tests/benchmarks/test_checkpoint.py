"""The arithmetic of the checkpoints' benchmark."""

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


@pytest.mark.parametrize("wanted", [10_000_000, 500_000_000, 3_600_000_000, 12_000_000_000])
def test_a_state_has_about_the_size_that_was_asked_for(module: Any, wanted: int) -> None:
    state = module("checkpoint_state")
    shape = state.shape_of(wanted)
    layer = 12 * shape.width**2 * state.BYTES_PER_PARAMETER
    parameters = shape.vocabulary * shape.width + 12 * shape.depth * shape.width**2
    assert abs(parameters * state.BYTES_PER_PARAMETER - wanted) <= max(layer, wanted // 10)
    assert shape.width % 64 == 0


def test_memory_of_the_state_does_not_count(module: Any) -> None:
    memory = module("checkpoint_memory")
    assert memory.STATE_NAME == module("checkpoint_state").STATE_NAME
    smaps = f"""7f00-7f10 rw-s 00000000 00:01 1029   /memfd:{memory.STATE_NAME} (deleted)
Size:                400 kB
Pss:                 200 kB
Pss_Dirty:           100 kB
7f10-7f20 rw-s 00000000 00:01 1030   /memfd:forebay-slot (deleted)
Pss:                  30 kB
7f20-7f30 rw-p 00000000 00:00 0
Pss:                   4 kB
"""
    assert memory.proportional_bytes(smaps) == 34 * 1024


def test_an_extra_is_what_saves_add(module: Any) -> None:
    benchmark, harness = module("checkpoint"), module("harness")
    took = harness.Samples()
    for mode, seconds in (("none", [1.0, 1.1, 0.9]), ("save", [1.5, 1.6, 1.4])):
        for one in seconds:
            took.add(mode, one)
    for one in (1.1, 1.2, 1.0):
        took.add("overlapped", one)
    assert benchmark.extras(took) == pytest.approx([0.2])
    took.by_case["save"] = took.by_case["none"]
    assert benchmark.extras(took) is None, "nothing was added that could be compared with"


def test_the_fastest_peer_and_the_slower_half_count(module: Any) -> None:
    benchmark, harness = module("checkpoint"), module("harness")
    saves = benchmark.Saves()
    for peer, stall, durable in (
        ("forebay", 0.1, 0.6),
        ("torch", 1.2, 1.2),
        ("dcp", 0.9, 0.9),
        ("dcp_thread", 0.2, 1.8),
        ("dcp_process", 0.05, 2.4),
    ):
        saves.add(peer, {"stall": stall, "durable": durable})
        saves.first.add(peer, 2 * stall)
    report = harness.Report("x")
    benchmark.report_race(report, tuple(saves.stall.by_case), saves, 6 * benchmark.GB)
    assert report.ratios["local_write_vs_best_peer"] == pytest.approx(1.5)
    assert report.ratios["stall_vs_dcp_async"] == pytest.approx(2.0)
    assert report.ratios["first_stall_vs_dcp_first"] == pytest.approx(2.0)
    assert report.values["forebay_ssd_gb_s"] == pytest.approx(12.0)
