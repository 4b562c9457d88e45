"""Recipe text_lstm: glosses and rated sentences into classes by a bidirectional LSTM."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from forebay_trainer.__main__ import main
from forebay_trainer.models.lstm import BiLstmClassifier
from forebay_trainer.modules import imported
from forebay_trainer.recipe import RECIPES, load
from forebay_wire.errors import InvalidRequest

preparation = imported(RECIPES / "text_lstm" / "prepare.py")
macro_f1 = imported(RECIPES / "text_lstm" / "recipe.py").macro_f1

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  "
GLOSS = '00007846 18 n 02 person 0 soul 0 002 @ 1 n 0000 | a human being; "much too much"; "two"  '


# The corpora.


def test_a_gloss_is_its_definition_and_the_class_its_lexicographers_file():
    text, label = preparation.gloss_of(GLOSS)
    assert text == "a human being"
    assert preparation.LEXICOGRAPHER_FILES[label] == "noun.person"
    assert preparation.gloss_of("1 30 v 0 | alter; as if; by far") == ("alter; as if; by far", 30)


@pytest.mark.parametrize(
    "line", [LICENCE, '1 18 n 0 | "she is one"', "1 18 n 0", "1 45 n 0 | x", "1 x n | y", ""]
)
def test_what_has_no_definition_or_class_is_no_gloss(line):
    assert preparation.gloss_of(line) is None


def test_sentences_of_one_review_are_a_group():
    first = preparation.rated("12_1\t-1.5\tNot good.\r\n", "reviews")
    assert first == ("Not good.", -1.5, "reviews/12")
    assert preparation.rated("12_2\t0.1\tSo, so\r\n", "reviews")[2] == first[2]
    assert preparation.rated("12\t0.1\tOh\r\n", "tweets")[2] != first[2]
    for broken in ("12\t0.1\n", "12\thigh\tOh\n", "12\t4.5\tOh\n", "12\t1\t \n"):
        assert preparation.rated(broken, "tweets") is None


@pytest.mark.parametrize(
    ("rating", "expected"),
    [(-4, "negative"), (-0.5, "negative"), (-0.4, "neutral"), (0.49, "neutral"), (0.5, "positive")],
)
def test_a_mean_that_rounds_to_0_is_neutral(rating, expected):
    assert preparation.MOODS[preparation.mood(rating, 0.5)] == expected


def test_the_packaged_corpora_are_read_whole(source):
    with (source("wordnet") / "data.adv").open() as lines:
        glosses = [gloss for gloss in map(preparation.gloss_of, lines) if gloss is not None]
    assert Counter(preparation.LEXICOGRAPHER_FILES[label] for _, label in glosses) == {
        "adv.all": 3621
    }
    config = preparation.Config(corpus="ratings", source=str(source("vader")))
    ratings = preparation.prepare(config)
    rows = pa.concat_tables(ratings.clean(chunk) for chunk in ratings.read())
    groups = rows["group"].to_pylist()
    found = Counter(group.partition("/")[0] for group in groups)
    assert found == {
        "amazonReviewSnippets": 3708,
        "movieReviewSnippets": 10605,
        "nytEditorialSnippets": 5190,
        "tweets": 4200,
    }
    assert len({each for each in groups if each.startswith("nyt")}) == 498
    assert len({each for each in groups if each.startswith("tweets")}) == 4200


# Words.


def test_texts_of_one_meaning_have_one_spelling():
    assert preparation.normalised(
        " The\u00a0PRICE of  12 \u2018caf\u00e9s\u2019 &amp; 7 \uff21\t"
    ) == ("the price of 00 'caf\u00e9s' & 0 a")


def test_words_keep_apostrophes_and_signs_stand_alone():
    assert preparation.words_of("it isn't 000 f_a :)") == (
        ["it", "isn't", "000", "f", "_", "a", ":", ")"]
    )


def test_the_vocabulary_has_the_most_frequent_words_and_rare_ones_are_unknown():
    words = preparation.vocabulary(["b a c", "a b d", "a e e"], 3, 2)
    assert words == [*preparation.SPECIAL_WORDS, "a", "b", "e"]
    own = preparation.prepare(preparation.Config(max_tokens=3))
    rows = own.tokenise(pa.table({"text": ["a x e a", ""], "label": [0, 1]}), {"words": words})
    assert rows["tokens"].to_pylist() == [[2, preparation.UNKNOWN, 4], []]


def test_copies_have_unknown_words_beside_the_text_as_it_is():
    config = preparation.Config(num_copies=2, unknown_share=0.25)
    tokens = [[2] * 400, [], [3] * 600]
    rows = pa.table({"tokens": pa.array(tokens, pa.list_(pa.int32())), "label": [0, 1, 2]})
    found = preparation.prepare(config).augment(rows, {}, np.random.default_rng(0))
    assert found.slice(0, 3).equals(rows)
    assert found["label"].to_pylist() == [0, 1, 2] * 3
    assert [len(each) for each in found["tokens"].to_pylist()] == [400, 0, 600] * 3
    for copy in (found["tokens"].to_pylist()[3:6], found["tokens"].to_pylist()[6:]):
        shares = [np.mean(np.array(copy[n]) == preparation.UNKNOWN) for n in (0, 2)]
        assert shares == pytest.approx([0.25, 0.25], abs=0.08)
    assert found["tokens"].to_pylist()[3:6] != found["tokens"].to_pylist()[6:]


# The model.


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BiLstmClassifier(
        vocabulary_size=20,
        num_classes=4,
        embedding_features=6,
        hidden_features=5,
        num_layers=2,
        dropout=0.0,
    )


def test_what_stands_behind_a_text_changes_nothing(model):
    tokens = torch.randint(20, (6, 9))
    lengths = torch.tensor([9, 4, 1, 7, 0, 2])
    logits = model(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        for width in (max(1, length), length + 3):
            alone = torch.randint(20, (1, width))
            alone[0, :length] = tokens[row, :length]
            found = model(alone, torch.tensor([length]))
            assert torch.allclose(found[0], logits[row], atol=1e-6), (row, width)
    logits.sum().backward()
    seen = {int(token) for row, n in zip(tokens, lengths, strict=True) for token in row[:n]}
    moved = set(model.embedding.weight.grad.abs().sum(dim=1).nonzero()[:, 0].tolist())
    assert moved == seen


def test_an_empty_row_alone_has_gradients_for_every_weight(model):
    logits = model(torch.zeros(1, 0, dtype=torch.int32), torch.tensor([0]))
    assert logits[0].equal(model.classifier.bias)
    (logits * 0).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_text_reads_differently_from_behind(model):
    tokens, lengths = torch.tensor([[1, 2, 3, 4]]), torch.tensor([4])
    assert not torch.allclose(model(tokens, lengths), model(tokens.flip(1), lengths))


def test_f1_is_the_mean_over_the_classes_that_occur():
    right = torch.tensor([0, 0, 0, 1, 1, 2])
    found = torch.tensor([0, 0, 1, 1, 2, 0])
    of_classes = (right[right == found], found, right)
    f1 = macro_f1(*(torch.bincount(each, minlength=4).double() for each in of_classes))
    # Precision and recall of class 0: 2/3 and 2/3; of class 1: 1/2 and 1/2; of class 2: none.
    assert f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_data_that_the_recipe_did_not_prepare_are_named():
    with pytest.raises(InvalidRequest, match=r"classes and words.*prepare text_lstm"):
        load("text_lstm").build({})


# Runs.


@pytest.fixture
def glosses(tmp_path):
    """A folder like WordNet's in which the word tells the class, 150 texts."""
    for name in preparation.WORDNET_FILES:
        (tmp_path / name).write_text(LICENCE + "\n")
    chance = np.random.default_rng(0)
    lines = []
    for number in range(150):
        label = number % 3
        around = ["uvwxyz"[each] for each in chance.integers(6, size=chance.integers(1, 6))]
        around.insert(chance.integers(len(around) + 1), "abc"[label] * 3)
        lines.append(f"{number:08d} {label:02d} n 01 x 0 000 | {' '.join(around)} {'i' * number}")
    (tmp_path / "data.noun").write_text("\n".join([LICENCE, *lines]) + "\n")
    return tmp_path


def test_it_learns_alike_on_one_and_two_ranks(daemon, launch, glosses, capsys):
    name = f"glosses-{glosses.name}"
    words = [f"address={daemon.data}", f"data.dataset={name}", f"prepare.source={glosses}"]
    assert main(["prepare", "text_lstm", *words, "--num-processes", "1"]) == 0, capsys.readouterr()
    keys = [f"data.dataset={name}", "model.hidden_features=16", "model.dropout=0.1"]
    keys += ["data.global_batch_size=33", "deterministic=true", "max_steps=24", "num_epochs=6"]
    keys += ["optimizer.learning_rate=0.02", "optimizer.warmup_steps=0"]
    started = {n: launch(*keys, recipe="text_lstm", num_ranks=n, run=f"on-{n}") for n in (1, 2)}
    losses, qualities = {}, {}
    for num_ranks, ranks in started.items():
        ranks.finish()
        losses[num_ranks] = {step: each[0] for step, each in ranks.values("loss").items()}
        names = ("test_accuracy", "test_macro_f1", "test_samples")
        qualities[num_ranks] = [ranks.values(name, "evaluation") for name in names]
    assert len(losses[1]) == 24
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
    assert qualities[2] == qualities[1]
    accuracy, f1, _ = ({step: each[0] for step, each in one.items()} for one in qualities[1])
    assert accuracy[24] > 0.9
    assert f1[24] > 0.9
