"""The recipe of the masked language model: its rows, what is hidden in them, and that it learns."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forebay_trainer.__main__ import main
from forebay_trainer.modules import imported
from forebay_trainer.preparation.tokens import FIRST, LAST, MASK, PADDING, SPECIAL, tokens_of
from forebay_trainer.recipe import RECIPES

prepare_code = imported(RECIPES / "bert_shakespeare" / "prepare.py")
recipe = imported(RECIPES / "bert_shakespeare" / "recipe.py")

SIZE = 1000


@pytest.fixture(scope="module")
def tokens():
    """Rows of 50 words between their special tokens, and padding."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(len(SPECIAL), SIZE, (400, 60), generator=generator)
    found[:, 0], found[:, 51], found[:, 52:] = FIRST, LAST, PADDING
    return found


def hidden(tokens, words=(1, 0, 0), ids=None):
    ids = torch.arange(len(tokens)) if ids is None else ids
    return recipe.hidden(tokens, ids, words, told_share=0.15, vocabulary_size=SIZE)


def test_of_the_words_15_percent_are_told_and_of_these_80_masked_and_10_random(tokens):
    seen, is_told = hidden(tokens)
    is_word = tokens >= len(SPECIAL)
    assert not (is_told & ~is_word).any()
    assert torch.equal(seen[~is_told], tokens[~is_told])
    num_told = int(is_told.sum())
    assert num_told / int(is_word.sum()) == pytest.approx(0.15, abs=0.01)
    told = seen[is_told]
    is_masked, is_same = told == MASK, told == tokens[is_told]
    assert int(is_masked.sum()) / num_told == pytest.approx(0.8, abs=0.03)
    assert int(is_same.sum()) / num_told == pytest.approx(0.1, abs=0.03)
    others = told[~is_masked & ~is_same]
    assert others.min() >= len(SPECIAL)
    assert others.max() < SIZE
    assert len(others.unique()) > len(others) / 2


def test_what_is_hidden_of_a_sample_is_the_same_in_every_batch(tokens):
    seen, is_told = hidden(tokens)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:7]
    part_seen, part_told = hidden(tokens[order], ids=order)
    assert torch.equal(part_seen, seen[order])
    assert torch.equal(part_told, is_told[order])


def test_another_step_or_seed_hides_others(tokens):
    _, told = hidden(tokens)
    for words in ((1, 0, 1), (1, 1, 0), (2,)):
        _, other = hidden(tokens, words)
        common = int((told & other).sum()) / int(told.sum())
        assert common == pytest.approx(0.15, abs=0.03)


def test_evaluations_hide_the_same_and_training_another_part_each_step(tokens):
    task = recipe.build(recipe.Config(width=8), {"vocabulary_size": SIZE, "num_places": 60})
    weight = torch.ones(400)
    weight[3] = 0
    batch = {"tokens": tokens.int(), "id": torch.arange(400), "weight": weight}
    evaluated = task.prepare(batch)
    assert torch.equal(evaluated["weights"], task.prepare(batch)["weights"])
    trained = [task.augment(evaluated, 0, step)["weights"] for step in (0, 1, 1)]
    assert not torch.equal(trained[0], trained[1])
    assert torch.equal(trained[1], trained[2])
    assert task.weights(evaluated)[3].sum() == 0
    assert task.weights(evaluated)[4].sum() > 0
    assert task.num_tokens(evaluated) == 399 * 52


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 12))
def test_rows_are_passages_in_order_that_fit(lengths, num_tokens):
    passages = [[number] * length for number, length in enumerate(lengths)]
    rows = list(prepare_code.packed(passages, num_tokens))
    assert [each for row in rows for each in row] == [each for one in passages for each in one]
    assert all(0 < len(row) <= num_tokens for row in rows)
    whole = {number for number, length in enumerate(lengths) if 0 < length <= num_tokens}
    assert all(sum(number in row for row in rows) == 1 for number in whole)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sayings, in which each word follows from the others."""
    folder = tmp_path_factory.mktemp("works")
    sayings = ["The king is dead.", "My horse was lost!", "A rose has thorns?", "No man can fly;"]
    generator = random.Random(0)
    for name in ("a", "b", "tested"):
        text = "\n\n".join(" ".join(generator.choices(sayings, k=3)) for _ in range(200))
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_it_learns_the_words_that_are_hidden(launch, daemon, client, corpus, capsys):
    words = [f"address={daemon.data}", "data.dataset=sayings", f"prepare.source={corpus}"]
    words += ['prepare.test_works=["tested"]', "prepare.num_places=24", "--num-processes", "1"]
    assert main(["prepare", "bert_shakespeare", *words, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    about = client.dataset("sayings").manifest.metadata
    row = client.dataset("sayings", split="test").table()["tokens"].combine_chunks()
    numbers = row.to_numpy_ndarray()[0].tolist()
    text = tokens_of(about).decode([each for each in numbers if each != PADDING])
    assert text.startswith("[CLS] ")
    assert text.endswith(" [SEP]")
    assert done["splits"]["test"] * 2 == done["splits"]["train"]

    sizes = ("model.num_layers=2", "model.width=32", "data.global_batch_size=32")
    keys = (*sizes, "num_epochs=99", "max_steps=150", "optimizer.warmup_steps=10")
    ranks = launch(
        *keys,
        *("data.dataset=sayings", "num_compute_threads=1", "checkpoint.every_steps=0"),
        "evaluation.every_steps=150",
        recipe="bert_shakespeare",
    )
    ranks.finish()
    assert ranks.values("test_accuracy", "evaluation")[150][0] > 0.6
