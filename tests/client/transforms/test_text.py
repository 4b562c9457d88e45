"""Text is cleaned, tokenised and counted: the same in any batch, missing ones included."""

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
import torch

import forebay
from forebay import transforms
from forebay.transforms import columns


def cleaned(text, *steps, **options):
    given = (steps,) if steps else ()
    return transforms.clean_text("text", *given, **options)({"text": [text]})["text"][0]


@pytest.mark.parametrize(
    ("steps", "text", "expected"),
    [
        (["case"], "ÄRGER Straße", "ärger strasse"),
        (["punctuation"], "don't—stop, “now”!", "dont stop   now  "),
        (["whitespace"], " a\t\n b\u00a0c ", "a b c"),
        (["unicode"], "ﬁne ① x²", "fine 1 x2"),
        (["accents"], "déjà vu, Ångström", "deja vu, Angstrom"),
        (["digits"], "in 1984 and 7", "in 0 and 0"),
        (["html", "whitespace"], "<p class='x'>a&amp;b</p><br/>c < d", "a&b c < d"),
        (["html", "whitespace"], "a<!-- <b>no</b> -->b<script>x='<i>'</script >c", "a b c"),
        (["html", "whitespace"], "a <STYLE>p{}</style> <!-- open", "a <!-- open"),
        (
            ["urls", "whitespace"],
            "see https://a.b/c?d=e or www.x.org, mail me@x.org now",
            "see or mail now",
        ),
        ([str.upper, "whitespace"], " a  b", "A B"),
    ],
)
def test_each_step_does_what_it_says(steps, text, expected):
    assert cleaned(text, *steps) == expected


def test_the_usual_steps_together():
    text = "<p>The  Quick &quot;brown&quot; fox isn't at https://x.org!</p>"
    assert cleaned(text) == "the quick brown fox isnt at"
    assert cleaned(text, stop_words="english") == "quick brown fox"
    assert cleaned(text, stop_words=["FOX", "isn't"]) == "the quick brown at"


def test_missing_texts_stay_missing_and_the_batch_stays_as_it_was():
    batch = {"text": ["A", None], "label": torch.arange(2)}
    found = transforms.clean_text("text")(batch)
    assert found["text"] == ["a", None]
    assert batch["text"] == ["A", None]
    assert found["label"] is batch["label"]


@pytest.mark.parametrize("piece", ["<!-- ", "<script>", "<a ", "</", "<", "a@", "http://"])
def test_cleaning_takes_time_in_proportion_to_the_length(piece):
    began = time.process_time()
    cleaned(piece * 100_000)
    assert time.process_time() - began < 10  # what is quadratic takes many minutes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transforms.clean_text("text", ["lower"]), "step 'lower'.*whitespace"),
        (lambda: transforms.clean_text("text", stop_words="german"), "german"),
        (lambda: transforms.clean_text("txt")({"text": ["a"]}), r"txt.*it has text"),
        (lambda: transforms.clean_text("text")({"text": torch.arange(2)}), "column of text"),
        (lambda: transforms.count_words("text", ["a", "A"]), "each word once"),
        (lambda: transforms.hash_words("text", 0), "at least 1"),
        (lambda: transforms.tokenize("text", 3), "got int"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        make()


WORDS = ["[PAD]", "[UNK]", "[CLS]", "the", "quick", "fox", "jumps"]


@pytest.fixture
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    return made


BATCH = {"text": ["the quick fox jumps", None, "fox cat", ""]}
IDS = [[2, 3, 4, 5, 6], [], [2, 5, 1], [2]]


def test_tokens_are_padded_to_the_longest(tokenizer):
    found = transforms.tokenize("text", tokenizer, pad_id=9)(BATCH)
    assert found["tokens"].dtype == torch.int64
    assert found["tokens_lengths"].tolist() == [5, 0, 3, 1]
    assert found["tokens"].tolist() == [row + [9] * (5 - len(row)) for row in IDS]
    assert found["text"] == BATCH["text"]


def test_tokens_are_cut_and_come_nested_or_one_by_one(tokenizer):
    nested = transforms.tokenize("text", tokenizer, ragged="nested", max_length=3)(BATCH)
    assert [one.tolist() for one in nested["tokens"].unbind(0)] == [row[:3] for row in IDS]
    plain = transforms.tokenize(
        "text", tokenizer, ragged="list", into="ids", add_special_tokens=False
    )(BATCH)
    assert [None if one is None else one.tolist() for one in plain["ids"]] == [
        [3, 4, 5, 6],
        None,
        [5, 1],
        [],
    ]


def test_the_tokenizer_itself_stays_as_it_was(tokenizer, tmp_path):
    tokenizer.enable_padding(length=12)
    made = transforms.tokenize("text", tokenizer, max_length=2)
    assert tokenizer.truncation is None
    assert len(tokenizer.encode("fox").ids) == 12
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = transforms.tokenize("text", tmp_path / "tokenizer.json", max_length=2)
    for one in (made, other, pickle.loads(pickle.dumps(made))):  # noqa: S301 - our own
        assert one(BATCH)["tokens"].tolist() == [[2, 3], [0, 0], [2, 5], [2, 0]]


def test_an_empty_batch_has_no_tokens(tokenizer):
    assert transforms.tokenize("text", tokenizer)({"text": []})["tokens"].shape == (0, 0)


@pytest.mark.parametrize(("module", "extra"), [("tokenizers", "text"), ("soundfile", "audio")])
def test_a_library_that_lacks_is_named_with_the_command_that_installs_it(
    monkeypatch, module, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    make = {
        "text": lambda: transforms.tokenize("text", "tokenizer.json"),
        "audio": lambda: transforms.decode_audio("sound"),
    }[extra]
    with pytest.raises(forebay.InvalidRequest, match=rf"pip install 'forebay\[{extra}\]'"):
        make()
    assert columns.required("json", extra, "test")


def test_words_are_counted_by_the_vocabulary():
    found = transforms.count_words("text", ["Fox", "the", "cat"])(
        {"text": ["The fox, the FOX: the_end", None, "dog"]}
    )
    assert found["words"].tolist() == [[2, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert found["words"].dtype == torch.float32


def test_hashed_words_do_not_depend_on_the_batch_or_the_process():
    texts = [f"word{number} common word{number * 7 % 50}" for number in range(50)]
    bag = transforms.hash_words("text", 64, ngrams=2, seed=3)
    whole = bag({"text": texts})["words"]
    assert whole.shape == (50, 64)
    for start in range(0, 50, 7):
        assert torch.equal(bag({"text": texts[start : start + 7]})["words"], whole[start:][:7])
    assert not torch.equal(
        transforms.hash_words("text", 64, seed=4)({"text": texts})["words"], whole
    )
    code = (
        "from forebay import transforms;"
        "print(transforms.hash_words('t', 8, ngrams=2)({'t': ['a b a']})['words'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    here = transforms.hash_words("t", 8, ngrams=2)({"t": ["a b a"]})["words"]
    assert done.stdout.strip() == str(here.tolist())
    assert np.abs(here.numpy()).sum() <= 5


def test_hashed_words_are_the_same_in_all_releases():
    found = transforms.hash_words("t", 16)({"t": ["the quick brown fox"]})["words"]
    assert {place: found[0, place].item() for place in found[0].nonzero()[:, 0].tolist()} == {
        2: -1.0,
        11: 1.0,
        13: -1.0,
        15: -1.0,
    }
