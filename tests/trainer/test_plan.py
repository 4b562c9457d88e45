"""What ``--dry-run`` says is what a run does; and folds are runs of their own."""

import json

import pytest

from forebay_trainer.__main__ import main
from forebay_trainer.folds import runs, together
from forebay_trainer.recipe import load

TINY = "tests/trainer/tiny"


@pytest.fixture
def plan(daemon, capsys, request, tmp_path, monkeypatch):
    recipe = request.path.parent / "tiny"
    monkeypatch.chdir(tmp_path)

    def plan(*words):
        assert main([str(recipe), f"address={daemon.data}", "--dry-run", *words]) == 0
        return capsys.readouterr().out

    return plan


def test_a_plan_names_weights_steps_and_sizes(plan, client):
    text = plan("num_epochs=3", "checkpoint.every_steps=4", "--num-ranks", "4")
    num_weights = (4 * 8 + 8) + 2 * (8 * 16 + 16 + 16 * 8 + 8) + (8 * 3 + 3)
    assert "4 rank(s): DDP 4" in text
    assert f"model: {num_weights} weights" in text
    assert "steps: 7 an epoch, 21 in all" in text  # 80 samples by 12, three times
    assert "80 samples an epoch" in text
    kept = num_weights * 4 * 3 / 1024  # weights and two averages
    assert f"checkpoints: {kept:.1f} KiB each, 6 of them, one every 4 steps" in text
    assert "with a failure every 24 h the least time is lost with one every" in text


def test_a_plan_knows_what_the_mesh_shares_out(plan):
    def memory(*words):
        line = next(each for each in plan(*words).splitlines() if each.startswith("memory"))
        return float(line.split(": ")[1].split()[0])

    alone = memory()
    assert memory("--num-ranks", "2") == alone
    assert memory("--num-ranks", "2", "parallel.num_shards=2") == pytest.approx(alone / 2, abs=0.1)
    assert memory("average.decay=0.9") == pytest.approx(alone * 5 / 4, abs=0.1)


def test_a_plan_writes_nothing_and_refuses_what_a_run_would(plan, daemon, capsys, tmp_path):
    plan()
    assert list(tmp_path.iterdir()) == []
    recipe = str(__file__).replace("test_plan.py", "tiny")
    words = [recipe, f"address={daemon.data}", "--dry-run"]
    assert main([*words, "data.dataset=nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main([*words, "--num-ranks", "3", "parallel.num_tensor=2"]) == 1
    assert "and 3 run" in capsys.readouterr().err


def test_folds_are_runs_of_their_own():
    recipe = load(str(__file__).replace("test_plan.py", "tiny"), ["data.num_folds=3", "run=r"])
    found = list(runs(recipe))
    assert [each.config.run for each in found] == ["r-fold0", "r-fold1", "r-fold2"]
    assert [each.config.data.fold for each in found] == [0, 1, 2]
    assert len({each.config.output.folder for each in found}) == 3
    only = load(str(__file__).replace("test_plan.py", "tiny"), ["data.num_folds=3", "data.fold=1"])
    assert list(runs(only)) == [only]


def test_the_spread_over_folds():
    spread = together([{"a": 1.0, "b": 2.0}, {"a": 3.0, "test_samples": 1}])
    assert spread.keys() == {"a"}
    assert (spread["a"].mean, spread["a"].values) == (2.0, (1.0, 3.0))
    assert spread["a"].deviation == pytest.approx(2**0.5)


def test_all_folds_are_trained_and_summed_up(launch):
    keys = ("data.num_folds=2", "max_steps=3", "data.test_split=none")
    ranks = launch(*keys, num_ranks=2, run="folds")
    text = ranks.finish()
    assert "-folds-fold0, attempt 1" in text
    assert "-folds-fold1, attempt 1" in text
    table = json.loads((ranks.folder / "folds.json").read_text())
    assert len(table["test_loss"]["values"]) == 2
    assert "test_loss over 2 folds:" in text


def test_a_mesh_that_the_model_cannot_be_cut_for_is_refused(daemon, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["mnist_cnn", f"address={daemon.data}", "data.dataset=numbers", "--dry-run"]
    assert main([*words, "--num-ranks", "2"]) == 0
    for key in ("num_tensor", "num_stages"):
        assert main([*words, "--num-ranks", "2", f"parallel.{key}=2"]) == 1
        assert f"parallel.{key}" in capsys.readouterr().err
