"""Sweeps of a tiny recipe, trials in processes: searched, killed, gone on with, pruned, forked."""

import json
import os
import signal
import threading
import time

import pytest

from forebay_trainer.metrics.history import history
from forebay_trainer.search.sweep import main

pytestmark = pytest.mark.timeout(200)

SPACE = """
[optimizer.learning_rate]
low = 1e-4
high = 1e-1
log = true

[optimizer.max_norm]
choices = [0.5, 1.0]
"""
KEYS = ("max_steps=8", "evaluation.every_steps=2", "data.num_threads=0")
KEYS += ("checkpoint.every_steps=4",)
SECONDS = 100.0


@pytest.fixture
def space(tmp_path):
    """``space(text)`` writes a space, and answers the arguments that name it."""

    def write(text=SPACE):
        path = tmp_path / "space.toml"
        path.write_text(text)
        return ["--space", str(path)]

    return write


def outcome(out):
    return json.loads((out / "sweep.json").read_text())


def states(out):
    return [trial["state"] for trial in outcome(out)["trials"]]


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_step(folder, step):
    """Whether a run has taken a step, as its metrics tell."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return any(event["event"] == "step" and event["step"] >= step for event in events)


def test_a_sweep_tries_values_side_by_side_and_says_which_were_best(
    start, words, out, space, capsys, read_events
):
    given = [*words, *KEYS, *space(), "--trials", "4", "--jobs", "2", "--sampler", "evolution"]
    given += ["--pruner", "none"]
    assert main([*given, "--json"], start=start) == 0
    told = json.loads(capsys.readouterr().out)
    assert outcome(out) == told
    assert states(out) == ["done"] * 4
    for trial in told["trials"]:
        events = read_events(out / f"trial{trial['number']}")
        found = [event["test_loss"] for event in events if event["event"] == "evaluation"]
        assert trial["value"] == found[-1]
        rates = {event["learning_rate"] for event in events if event["event"] == "step"}
        assert max(rates) <= trial["values"]["optimizer.learning_rate"]
        assert trial["steps"] == 8
    assert told["trials"][0]["values"] == {  # of the recipe
        "optimizer.learning_rate": 0.01,
        "optimizer.max_norm": 1.0,
    }
    best = min(told["trials"], key=lambda trial: trial["value"])
    assert told["best"] == best
    rate = best["values"]["optimizer.learning_rate"]
    assert f"optimizer.learning_rate={rate!r} " in told["command"]
    assert told["command"].count("run=") == 1
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")

    # Again: all is done. With one more trial, that one is.
    assert main([*given, "--json"], start=start) == 0
    assert len(start.started) == 4
    given[given.index("--trials") + 1] = "5"
    assert main(given, start=start) == 0
    assert len(start.started) == 5
    assert f"best: trial {outcome(out)['best']['number']}" in capsys.readouterr().out
    assert main([*given, "average.decay=0.9"], start=start) == 2
    assert "average.decay" in capsys.readouterr().err


def test_a_sweep_that_is_told_to_end_goes_on_where_it_was(start, words, out, space, read_events):
    given = [*words, *KEYS, "max_steps=40", "min_step_seconds=0.05", *space(), "--trials", "2"]
    trial = out / "trial1"

    def tell():
        wait_for(lambda: has_step(trial, 2))
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    assert main(given, start=start) == 0
    teller.join()
    assert len(start.started) == 2
    assert not (out / "sweep.json").exists()
    assert read_events(trial)[-1]["reason"] == "terminated"

    assert main(given, start=start) == 0
    assert states(out) == ["done"] * 2
    assert len(start.started) == 3
    assert [event["step"] for event in history(read_events(trial)).steps] == list(range(1, 41))
    assert len(history(read_events(trial)).starts) == 2


def test_after_a_kill_no_trial_is_lost_or_doubled(
    search_process, words, out, space, read_events, client
):
    given = ["sweep", *words, *KEYS, "max_steps=30", "min_step_seconds=0.05", *space()]
    given += ["--trials", "2"]
    killed = search_process(*given)
    wait_for(lambda: has_step(out / "trial0", 5))
    killed.kill()
    killed.wait()

    # At once, while the trial that lost its parent still saves.
    resumed = search_process(*given)
    assert resumed.wait(SECONDS) == 0, resumed.log.read_text()
    assert states(out) == ["done"] * 2
    found = history(read_events(out / "trial0"))
    assert len(found.starts) == 2
    assert 5 <= found.starts[1]["step"] < 30
    assert [event["step"] for event in found.steps] == list(range(1, 31))
    assert found.num_taken == 30
    run = found.run.removesuffix("-trial0")
    runs = [each.run for each in client.runs() if each.run.startswith(run)]
    assert sorted(runs) == [f"{run}-trial0", f"{run}-trial1"]


def test_a_trial_that_does_worse_is_pruned(start, words, out, space, read_events):
    choices = space("[optimizer.learning_rate]\nchoices = [0.05, 0.04, 0.06, 0.03, 1e-9]\n")
    given = [*words, *KEYS, "evaluation.every_steps=1", "optimizer.warmup_steps=0", *choices]
    given += ["max_steps=30", "min_step_seconds=0.03", "--sampler", "grid"]
    assert main(given, start=start) == 0
    assert states(out) == ["done"] * 4 + ["pruned"]
    assert outcome(out)["trials"][4]["steps"] < 30
    events = read_events(out / "trial4")
    assert events[-1]["reason"] == "terminated"  # it has saved, and could go on
    assert any(event["event"] == "save" for event in events)


FAULTS = "[model.fault]\nchoices = ['nan', 'none', 'raise']\n"


def test_a_failed_trial_is_named_with_its_reason_and_the_sweep_goes_on(start, words, out, space):
    given = [*words, *KEYS, "model.fault_step=2", *space(FAULTS), "--sampler", "grid"]
    assert main([*given, "--max-failures", "2"], start=start) == 0
    assert states(out) == ["failed", "done", "failed"]
    nan, _, raised = outcome(out)["trials"]
    assert "LossNotFinite: the loss of step 2 is nan" in nan["reason"]
    assert "the fault that was asked for" in raised["reason"]


def test_too_many_failures_in_a_row_end_the_sweep(start, words, out, space, capsys):
    given = [*words, *KEYS, "model.fault=raise", "model.fault_step=1", *space()]
    assert main([*given, "--trials", "9", "--max-failures", "2"], start=start) == 1
    assert states(out) == ["failed"] * 2
    told = " ".join(capsys.readouterr().err.split())
    assert "2 trials in a row failed, the last one: RuntimeError: the fault" in told


def test_the_common_part_is_trained_once_and_all_trials_begin_from_it(
    start, words, out, space, read_events, client
):
    given = [*words, *KEYS, *space(), "--trials", "3", "--warm-up", "4"]
    assert main(given, start=start) == 0
    assert states(out) == ["done"] * 3
    assert len(start.started) == 4
    for number in range(3):
        events = read_events(out / f"trial{number}")
        assert events[0]["step"] == 4
        assert [event["step"] for event in history(events).steps] == [5, 6, 7, 8]
    run = outcome(out)["run"]
    forks = client.run(f"{run}-common").lineage().forks
    assert {(name, each.step) for name, each in forks} == {
        (f"{run}-trial{number}", 4) for number in range(3)
    }
    assert f"checkpoint.fork_from={run}-common@4" in outcome(out)["command"]


def test_what_changes_the_weights_is_refused_before_the_common_part(start, words, space, capsys):
    width = space("[model.width]\nlow = 8\nhigh = 16\nstep = 8\n")
    assert main([*words, *KEYS, *width, "--warm-up", "4"], start=start) == 2
    assert "model.first.weight: (8, 4) becomes (16, 4)" in capsys.readouterr().err
    assert start.started == []
