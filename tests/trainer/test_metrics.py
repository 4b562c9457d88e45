"""What a run measures of itself, and where it writes it."""

import pytest

from forebay_trainer.metrics.energy import Rapl


def test_a_run_says_how_fast_it_was_and_what_it_used(launch):
    overrides = ["max_steps=8", "checkpoint.every_steps=3", "metrics.watts=100"]
    ranks = launch(*overrides, "metrics.peak_flops=1e9", num_ranks=2)
    output = ranks.finish()
    events = ranks.events()
    start, *_, end = events
    assert start["peak_flops"] == 2e9
    assert start["peak_flops_source"] == "stated"
    steps = [event for event in events if event["event"] == "step"]
    for step in steps:
        seconds = step["step_seconds"]
        assert step["samples_per_second"] == pytest.approx(step["samples"] / seconds)
        # All weights of the recipe are dense: 4*8+8, 2*(8*16+16+16*8+8), 8*3+3 of them.
        flops = 6 * (40 + 2 * 280 + 27) * step["samples"]
        assert step["flops_utilisation"] == pytest.approx(flops / seconds / 2e9)
        assert 2**20 < step["rss_bytes"] < 2**40
        assert "tokens_per_second" not in step
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [(epoch["epoch"], epoch["step"], epoch["steps"]) for epoch in epochs] == [
        (0, 7, 7),
        (1, 8, 1),
    ]
    assert [epoch["samples"] for epoch in epochs] == [80, 12]
    assert end["steps"] == 8
    assert end["seconds"] == pytest.approx(sum(step["step_seconds"] for step in steps))
    assert output.count("\nstep ") == 8
    assert output.count("\nsaved step ") == 3
    assert output.count("\nevaluation at step ") == 2
    if not Rapl.zones():
        assert end["energy_source"] == "stated: 100 W a machine"
        assert end["energy_joules"] == pytest.approx(sum(s["energy_joules"] for s in steps))
        assert end["energy_joules"] > 80 * end["seconds"], "not of one rank of two alone"
