"""Sweeps of a tiny recipe, trials in real processes: searched, killed, resumed, pruned, forked."""

import json

import pytest

from forebay_trainer.search.sweep import main

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


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(SPACE)
    return path


def test_a_sweep_tries_values_and_says_which_were_best(start, words, out, space, capsys):
    given = [*words, *KEYS, "--space", str(space), "--trials", "4", "--json"]
    assert main(given, start=start) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert json.loads((out / "sweep.json").read_text()) == told
    print(shown.err)
