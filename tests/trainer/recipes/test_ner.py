"""Named entities: from files in columns to entity F1, whole models and adapters, on any mesh."""

import itertools
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from forebay_trainer.__main__ import main
from forebay_trainer.models.bert import Bert, BertShape, TokenClassifier
from forebay_trainer.modules import imported
from forebay_trainer.preparation.conll import read_sentences, scheme_of, to_iob2
from forebay_trainer.preparation.wordpieces import NO_LABEL, WordPieces, cut
from forebay_trainer.recipe import RECIPES
from forebay_wire.errors import InvalidRequest

RECIPE = imported(RECIPES / "ner_minilm" / "recipe.py")
PREPARE = imported(RECIPES / "ner_minilm" / "prepare.py")

LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
LETTERS = "abcdefgh"
SPECIAL = ["[PAD]", *(f"[unused{number}]" for number in range(99)), "[UNK]", "[CLS]", "[SEP]"]
KNOWN_WORDS = ["in", "met", "##en", "paris", "rome", "york", "new", "ada", "max"]
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *KNOWN_WORDS]


def word_pieces(vocabulary):
    numbers = {each: number for number, each in enumerate(vocabulary)}
    return models.WordPiece(vocab=numbers, unk_token="[UNK]")


def tokenizer():
    made = Tokenizer(word_pieces(VOCABULARY))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made.to_str()


PIECES = WordPieces(tokenizer(), characters=["z"])


def names(tokens):
    return [VOCABULARY[each] if each < len(VOCABULARY) else "z" for each in tokens]


# Files in columns.

words = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=8).filter(
    lambda word: not word.startswith("-DOCSTART-")
)
entities = st.lists(
    st.tuples(st.sampled_from(["", "LOC", "PER"]), st.lists(words, min_size=1, max_size=3)),
    min_size=1,
    max_size=6,
)


def in_scheme(spans, scheme):
    """(words, tags) of a sentence in a scheme."""
    found, tags, before = [], [], ""
    for kind, inside in spans:
        begins = "B" if scheme == "IOB2" or kind == before else "I"
        found += inside
        tags += ["O"] * len(inside) if not kind else [f"{begins}-{kind}"]
        tags += [f"I-{kind}"] * (len(inside) - 1) if kind else []
        before = kind
    return found, tags


@given(st.lists(entities, max_size=4), st.sampled_from(["IOB1", "IOB2"]), st.sampled_from(" \t"))
def test_what_was_written_in_columns_is_read_again(corpus, scheme, separator):
    lines = ["-DOCSTART- -X- O O\n", "\n"]
    for spans in corpus:
        for word, tag in zip(*in_scheme(spans, scheme), strict=True):
            lines.append(separator.join([word, "NN", "I-NP", tag]) + "\n")
        lines.append("\n")
    found = list(read_sentences(lines, "file"))
    assert [list(each.words) for each in found] == [in_scheme(each, "IOB2")[0] for each in corpus]
    assert [to_iob2(each.tags) for each in found] == [in_scheme(each, "IOB2")[1] for each in corpus]


@given(st.lists(entities, min_size=1, max_size=4), st.sampled_from(["IOB1", "IOB2"]))
def test_schemes_are_told_apart_where_there_is_an_entity(corpus, scheme):
    assume(any(kind for spans in corpus for kind, _ in spans))
    tags = [in_scheme(spans, scheme)[1] for spans in corpus]
    assert scheme_of(tags) == scheme
    assert scheme_of([to_iob2(each) for each in tags]) == "IOB2"


def test_a_slip_does_not_change_the_scheme_of_a_file():
    assert scheme_of([["B-LOC", "O", "B-PER", "I-PER"], ["O", "I-LOC"]]) == "IOB2"
    assert to_iob2(["O", "I-LOC", "I-LOC", "I-PER"]) == ["O", "B-LOC", "I-LOC", "B-PER"]


def test_documents_are_numbered():
    lines = ["-DOCSTART-", "", "a O", "", "-DOCSTART-", "", "b O", "", "c O"]
    found = [(each.words, each.document) for each in read_sentences(lines, "file")]
    assert found == [(("a",), 0), (("b",), 1), (("c",), 1)]


@pytest.mark.parametrize(
    ("line", "said"), [("word", "one column"), ("word S-LOC", "'S-LOC' is neither O nor B-TYPE")]
)
def test_a_line_that_is_no_row_is_named(line, said):
    with pytest.raises(InvalidRequest, match=f"corpus, line 3.*{said}"):
        list(read_sentences(["a O\n", "\n", line + "\n"], "corpus"))


# Pieces and labels.


def test_words_that_cannot_be_taken_apart_are_taken_by_characters():
    assert names(PIECES.pieces("Paris")) == ["paris"]
    assert names(PIECES.pieces("abc")) == ["a", "##b", "##c"]
    assert names(PIECES.pieces("azqb")) == ["a", "z", "[UNK]", "##b"]
    assert names(PIECES.pieces("\u3000")) == ["[UNK]"]
    assert PIECES.unknown_characters(["azqq", "qa", "paris"]) == {"q": 3}


@given(
    st.lists(st.tuples(st.text("abinqz.", min_size=1, max_size=9), st.integers(0, 4)), min_size=1)
)
def test_every_word_has_its_label_at_its_first_piece_alone(pairs):
    sentence, labels = zip(*pairs, strict=True)
    encoded = PIECES.encode(sentence, labels, 1000)
    assert len(encoded.tokens) == len(encoded.labels)
    assert [each for each in encoded.labels if each != NO_LABEL] == list(labels)
    assert names([encoded.tokens[0], encoded.tokens[-1]]) == ["[CLS]", "[SEP]"]
    place = 1
    for word, label in pairs:
        pieces = PIECES.pieces(word)
        assert encoded.tokens[place : place + len(pieces)] == pieces
        assert encoded.labels[place] == label
        place += len(pieces)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "LOC"]), st.lists(st.integers(1, 4), min_size=1, max_size=3))
    ),
    st.integers(12, 20),
)
def test_long_sentences_are_cut_between_words_and_no_entity_is(spans, limit):
    sizes, tags = in_scheme(spans, "IOB2")
    parts = cut(sizes, tags, limit)
    assert [word for part in parts for word in part] == list(range(len(sizes)))
    for part in parts:
        assert sum(sizes[word] for word in part) <= limit
        assert not tags[part.start].startswith("I-")
    for one, after in itertools.pairwise(parts):
        assert sum(sizes[word] for word in (*one, *after)) > limit, "fewer would have done"


def test_an_entity_that_is_too_long_is_refused_and_a_word_loses_its_end():
    with pytest.raises(
        InvalidRequest, match=r"entity of 2 words has 8 pieces.*prepare\.max_tokens"
    ):
        cut([4, 4], ["B-LOC", "I-LOC"], 7)
    assert cut([30], ["O"], 7) == [range(1)]
    assert len(PIECES.encode(["a" * 30], [1], 9).tokens) == 9


# Entities counted.

tag_lists = st.lists(st.lists(st.sampled_from(LABELS), min_size=1, max_size=6), min_size=1)


@given(tag_lists, st.randoms(use_true_random=False), st.integers(1, 4))
def test_sums_over_batches_make_the_f1_of_the_whole(actual, chance, batch_size):
    found = [[chance.choice([tag, *LABELS]) for tag in tags] for tags in actual]
    sums = dict.fromkeys(("right", "found", "actual"), 0)
    for start in range(0, len(actual), batch_size):
        part = slice(start, start + batch_size)
        for name, number in RECIPE.entity_counts(actual[part], found[part]).items():
            sums[name] += number
    assume(sums["actual"] + sums["found"])
    assert tagging().metrics(sums)["f1"] == pytest.approx(f1_score(actual, found, zero_division=0))


def tagging():
    shape = BertShape(
        vocabulary_size=8, width=4, num_layers=1, num_heads=1, feed_forward_width=4, num_positions=9
    )
    return RECIPE.Tagging(TokenClassifier(Bert(shape), len(LABELS)), LABELS, new_rate=1.0)


def test_only_first_pieces_of_real_rows_count():
    task = tagging()
    labels = [[NO_LABEL, 1, NO_LABEL, 2, 0, NO_LABEL], [NO_LABEL, 3, NO_LABEL], []]
    batch = task.prepare(
        {
            "tokens": [torch.tensor([1] * len(each), dtype=torch.int32) for each in labels],
            "labels": [torch.tensor(each, dtype=torch.int16) for each in labels],
            "weight": torch.tensor([1.0, 0.0, 0.0]),
            "id": torch.tensor([0, -1, -1]),
        }
    )
    assert batch["tokens"].shape == (3, 6)
    assert batch["lengths"].tolist() == [6, 3, 0]
    assert task.weights(batch).sum() == 3
    found = torch.tensor([[4, 1, 3, 2, 0, 3], [1] * 6, [1] * 6])
    outputs = torch.nn.functional.one_hot(found, len(LABELS)).float()
    sums = {name: float(value) for name, value in task.evaluate(outputs, batch).items()}
    assert sums == {"right": 1, "found": 1, "actual": 1}
    assert task.losses(outputs, batch).shape == (3, 6)


def test_counts_are_exact_where_the_model_computes_in_16_bits():
    batch = {"labels": torch.ones(1, 257, dtype=torch.int64), "weight": torch.ones(1)}
    outputs = torch.nn.functional.one_hot(batch["labels"], len(LABELS)).bfloat16()
    assert float(tagging().evaluate(outputs, batch)["right"]) == 257


# A corpus and a base that are small enough to train on.

SENTENCES = [
    ("{person} met {person} in {place}", 60),
    ("{place} met {place}", 20),
    ("ab {person} cd in {place} ef", 40),
]
NAMES = {
    "person": (["ada", "max", "max cab"], "PER"),
    "place": (["paris", "rome", "new york"], "LOC"),
}


def corpus_lines(seed):
    """In IOB1, with four columns."""
    chance = random.Random(seed)
    yield from ("-DOCSTART- -X- -X- O\n", "\n")
    for pattern, number in SENTENCES:
        for _ in range(number):
            for part in pattern.split():
                known = NAMES.get(part.strip("{}"))
                inside = chance.choice(known[0]).split() if known else [part]
                for word in inside:
                    yield f"{word} NN I-NP {'I-' + known[1] if known else 'O'}\n"
            yield "\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as a published model has it, of random weights."""
    folder = tmp_path_factory.mktemp("base")
    shape = {"vocab_size": 4000, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    config = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps({**config, **shape, "type_vocab_size": 2}))
    filler = [f"[unused{number}]" for number in range(99, 4000 - len(VOCABULARY) + 99)]
    made = Tokenizer.from_str(tokenizer())
    made.model = word_pieces([*VOCABULARY, *filler])
    (folder / "tokenizer.json").write_text(made.to_str())
    torch.manual_seed(0)
    generator = Bert(
        BertShape(
            vocabulary_size=4000,
            width=32,
            num_layers=2,
            num_heads=2,
            feed_forward_width=64,
            num_positions=32,
        )
    )
    (folder / "model.safetensors").write_bytes(safetensors_of(published(generator)))
    return folder


PUBLISHED = {
    "embeddings.words": "embeddings.word_embeddings",
    "embeddings.positions": "embeddings.position_embeddings",
    "embeddings.kinds": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def published(model):
    found = {}
    for name, weight in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        if part.startswith("blocks."):
            _, number, leaf = part.split(".")
            part = f"encoder.layer.{number}.{PUBLISHED[leaf]}"
        else:
            part = PUBLISHED[part]
        found[f"{part}.{kind}"] = weight
    return found


def safetensors_of(weights):
    header, data = {}, b""
    for name, weight in weights.items():
        end = len(data) + weight.nbytes
        header[name] = {"dtype": "F32", "shape": [*weight.shape], "data_offsets": [len(data), end]}
        data += weight.numpy().tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conll")
    for seed, name in enumerate(("eng.train", "eng.testa", "eng.testb")):
        (folder / name).write_text("".join(corpus_lines(seed)))
    return folder


@pytest.fixture(scope="module")
def dataset(daemon, base, corpus):
    """The corpus, prepared."""
    words = [f"prepare.source={corpus}", f"prepare.base={base}", f"address={daemon.data}"]
    command = ["prepare", "ner_minilm", "data.dataset=entities", "prepare.max_tokens=16"]
    assert main([*command, *words, "--num-processes", "1"]) == 0
    return "entities"


@pytest.fixture
def train(launch, dataset, base):
    """Launches an attempt on the small corpus and the small base."""

    def start(*overrides, recipe="ner_minilm", **options):
        common = [f"data.dataset={dataset}", f"model.base={base}", "num_compute_threads=1"]
        return launch(*common, *overrides, recipe=recipe, **options)

    return start


def test_files_of_three_splits_are_one_dataset(client, dataset):
    about = client.dataset(dataset).manifest.metadata
    assert about["labels"] == list(LABELS)
    assert about["scheme"] == ["IOB1"]
    assert about["vocabulary_size"] == 4000
    for split in ("train", "validation", "test"):
        rows = client.dataset(dataset, split=split).table()
        assert len(rows) == 120
        assert max(len(each) for each in rows["tokens"].to_pylist()) <= 16
    first = client.dataset(dataset, split="train").table().slice(0, 1).to_pylist()[0]
    assert len(first["tokens"]) == len(first["labels"])
    assert first["labels"][1] == LABELS.index("B-PER")


def test_both_variants_train_on_the_same_dataset(dataset, client, daemon, base, corpus):
    words = [f"prepare.source={corpus}", f"prepare.base={base}", f"address={daemon.data}"]
    command = ["prepare", "ner_minilm/lora", f"data.dataset={dataset}", "prepare.max_tokens=16"]
    assert main([*command, *words, "--num-processes", "1"]) == 0
    assert client.dataset(dataset).version == 1


def test_a_folder_without_a_split_is_refused(tmp_path, capsys, daemon):
    (tmp_path / "train.txt").write_text("a O\n")
    words = [f"prepare.source={tmp_path}", f"address={daemon.data}", "data.dataset=none"]
    assert main(["prepare", "ner_minilm", *words, "--num-processes", "1"]) == 1
    assert "no file of the split 'test'" in capsys.readouterr().err


def test_a_folder_may_do_without_a_file_to_validate_on(tmp_path, daemon, client, base):
    (tmp_path / "train.txt").write_text("a I-LOC\nb O\n\nb O\n")
    (tmp_path / "test.txt").write_text("a I-LOC\n")
    words = [f"prepare.source={tmp_path}", f"prepare.base={base}", f"address={daemon.data}"]
    command = ["prepare", "ner_minilm", "data.dataset=two-files", "--num-processes", "1"]
    assert main([*command, *words]) == 0
    sizes = {name: len(client.dataset("two-files", split=name)) for name in ("train", "test")}
    assert sizes == {"train": 2, "test": 1}


def test_entities_that_only_the_test_data_have_are_refused(tmp_path, capsys, daemon, base):
    (tmp_path / "train.txt").write_text("a B-LOC\nb O\n")
    (tmp_path / "test.txt").write_text("a B-ORG\n")
    words = [f"prepare.source={tmp_path}", f"prepare.base={base}", f"address={daemon.data}"]
    command = ["prepare", "ner_minilm", "data.dataset=none", "--num-processes", "1"]
    assert main([*command, *words]) == 1
    assert "'test' has entities that the training data do not: B-ORG" in capsys.readouterr().err


def test_consecutive_sentences_of_the_packaged_corpus_share_a_split(tmp_path, base):
    text = "".join(f"a\tX\tB-LOC\nz{number}\tX\tO\n\n" for number in range(40))
    inside = tmp_path / "iob_sents.txt"
    inside.write_text(text)
    package = tmp_path / "corpus.tar.gz"
    with tarfile.open(package, "w:gz") as writing:
        writing.add(inside, "corpus-1/iob_sents.txt")
    config = PREPARE.Config(source=str(package), base=str(base), min_count=2)
    preparation = PREPARE.prepare(config)
    (rows,) = preparation.read()
    assert rows["group"].to_pylist() == [number // 10 for number in range(40)]
    learnt = preparation.learn([preparation.normalise(rows)])
    assert learnt["labels"] == ["O", "B-LOC", "I-LOC"]
    assert learnt["characters"] == [*"0123456789z"]


def test_it_learns_whole_and_with_adapters_and_counts_entities(train):
    fast = ["num_epochs=4", "optimizer.learning_rate=5e-3", "optimizer.warmup_steps=2"]
    fast += ["evaluation.every_steps=32", "checkpoint.every_steps=0"]
    for recipe, words in (
        ("ner_minilm", []),
        ("ner_minilm/lora", ["optimizer.learning_rate=2e-2"]),
    ):
        with train(*fast, *words, recipe=recipe, run=recipe.replace("/", "-")) as ranks:
            ranks.finish()
            f1 = list(ranks.values("test_f1", "evaluation").values())
        assert f1[-1][-1] > 0.8, f1


def test_later_generations_of_adapters_store_what_is_trained_and_forks_share_the_base(
    train, client
):
    words = ["checkpoint.every_steps=2", "max_steps=6", "data.test_split=none"]
    with train(*words, recipe="ner_minilm/lora") as ranks:
        ranks.finish()
        run = ranks.events()[0]["run"]
    _, found = client.describe_run(run)
    stored = {each.step: each.num_bytes - each.shared_bytes for each in found}
    model = built(client)
    frozen = sum(each.nbytes for each in model.parameters() if not each.requires_grad)
    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    assert frozen > 20 * trained
    assert stored[2] > frozen
    for step in (4, 6):
        assert trained < stored[step] < 3 * trained + 64 * 1024, stored

    for name in ("b", "c"):
        fork = [f"checkpoint.fork_from={run}@2", "optimizer.learning_rate=1e-3"]
        with train(*words, *fork, recipe="ner_minilm/lora", run=name) as ranks:
            ranks.finish()
            _, found = client.describe_run(ranks.events()[0]["run"])
        assert {each.step for each in found} == {4, 6}
        for each in found:
            assert each.num_bytes - each.shared_bytes < 3 * trained + 64 * 1024


def built(client):
    """The adapted model, for its sizes."""
    shape = BertShape(
        vocabulary_size=4000,
        width=32,
        num_layers=2,
        num_heads=2,
        feed_forward_width=64,
        num_positions=32,
    )
    model = TokenClassifier(Bert(shape), len(LABELS))
    RECIPE.adapt(model, ["query", "value"], rank=8, alpha=16.0, trained=["head"])
    return model


@pytest.mark.parametrize("mesh", ["num_replicas", "num_shards", "num_tensor"])
def test_adapters_train_alike_on_every_mesh_and_are_restored_on_another(train, mesh):
    words = ["model.dropout=0", "data.test_split=none", "optimizer.warmup_steps=0"]
    words += ["optimizer.learning_rate=1e-2"]
    words += ['model.lora.targets=["query", "value", "out", "up", "down"]']
    losses = []
    for run, parallel in (("alone", []), ("mesh", [f"parallel.{mesh}=2"])):
        options = {"recipe": "ner_minilm/lora", "run": run, "num_ranks": 1 + len(parallel)}
        with train("max_steps=3", *words, *parallel, **options) as ranks:
            ranks.finish()
            losses.append([values[0] for values in ranks.values("loss").values()])
    assert losses[0][0] - losses[0][2] > 0.05, "equal losses mean nothing before it learns"
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    with train("max_steps=4", *words, recipe="ner_minilm/lora", run="mesh") as ranks:
        assert "from step 3" in ranks.finish()


def test_a_run_without_its_base_says_how_to_get_it(train, tmp_path, monkeypatch):
    monkeypatch.setenv("FOREBAY_SOURCES", str(tmp_path / "nothing"))
    with train("model.base=none", "max_steps=1") as ranks:
        assert ranks.statuses() == [1]
        assert "prepare ner_minilm --fetch` gets it" in ranks.output()


def test_a_base_of_another_vocabulary_is_refused(base):
    about = {"labels": list(LABELS), "characters": [], "vocabulary_size": 7}
    with pytest.raises(InvalidRequest, match=r"4,000 tokens.*prepared with 7.*prepare\.base"):
        RECIPE.build(RECIPE.Config(base=str(base)), about)


def test_a_dataset_that_was_not_prepared_for_it_is_refused():
    with pytest.raises(InvalidRequest, match="does not say its characters, labels"):
        RECIPE.build(RECIPE.Config(base="random"), {"vocabulary_size": 7})


def test_without_a_base_the_sizes_are_those_of_the_recipe():
    about = {"labels": list(LABELS), "characters": ["z"], "vocabulary_size": 7}
    config = RECIPE.Config(base="random", width=8, num_layers=1, num_heads=2)
    encoder = RECIPE.build(config, about).modules["model"].encoder
    assert encoder.shape.width == encoder.embeddings.added.weight.shape[1] == 8
    assert len(encoder.blocks) == 1


def test_the_packaged_corpus_is_read(source):
    preparation = PREPARE.prepare(PREPARE.Config(source=str(source("hironsan"))))
    rows = [row for table in preparation.read() for row in table.to_pylist()]
    assert len(rows) == 500
    assert {row["scheme"] for row in rows} == {"IOB2"}
    kinds = {tag[2:] for row in rows for tag in row["tags"]} - {""}
    assert kinds == {"ART", "DAT", "LOC", "MON", "ORG", "PER", "PSN", "TIM"}
    assert Path(source("hironsan")).is_file()
