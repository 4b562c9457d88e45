"""A recipe is trained once for each seed, and what comes out is told as mean and deviation."""

import json
import shutil
import statistics

import pytest

from forebay_trainer.search.seeds import main

KEYS = ("max_steps=8", "evaluation.every_steps=4", "data.num_threads=0")


def test_each_seed_is_trained_once_and_their_metrics_are_told(start, words, out, capsys):
    assert main([*words, *KEYS, "--seeds", "2", "--json"], start=start) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads((out / "seeds.json").read_text()) == told
    assert [each["seed"] for each in told["runs"]] == [0, 1]
    assert [each["steps"] for each in told["runs"]] == [8, 8]
    accuracies = [each["evaluations"][-1]["test_accuracy"] for each in told["runs"]]
    losses = [each["evaluations"][-1]["test_loss"] for each in told["runs"]]
    assert told["metrics"]["test_accuracy"]["values"] == accuracies
    assert told["metrics"]["test_loss"]["mean"] == pytest.approx(statistics.fmean(losses))
    assert told["metrics"]["test_loss"]["deviation"] == pytest.approx(statistics.stdev(losses))
    assert losses[0] != losses[1]
    assert 0 < told["seconds"]["mean"] < 60
    picture = (out / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 60_000

    # Again, with one more seed: what is done is not done again.
    assert main([*words, *KEYS, "--seeds", "3"], start=start) == 0
    assert len(start.started) == 3
    shown = capsys.readouterr().out
    assert "over 3 seeds" in shown
    assert "test_loss: " in shown
    assert " ± " in shown

    assert main([*words, *KEYS, "--seeds", "3", "model.width=16"], start=start) == 2
    assert "model.width" in capsys.readouterr().err

    # In a new folder the daemon's runs would go on instead of beginning.
    shutil.rmtree(out)
    assert main([*words, *KEYS, "--seeds", "3"], start=start) == 2
    assert "-seed0 already" in capsys.readouterr().err
    assert len(start.started) == 3
