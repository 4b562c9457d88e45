"""The transformer of the language models: what a place sees, and that every mesh computes alike."""

import numpy as np
import pyarrow as pa
import pytest
import torch

import forebay
from forebay_trainer.dropout import Draws, SampleDropout, replace_dropout
from forebay_trainer.metrics.flops import counted
from forebay_trainer.models.transformer import (
    Architecture,
    Transformer,
    flops,
    rotated,
    rotation,
    stage_of,
)
from forebay_trainer.preparation.tokens import FIRST, LAST, PADDING, SPECIAL
from forebay_wire.errors import InvalidRequest

SIZES = {
    "vocabulary_size": 20,
    "num_places": 12,
    "num_layers": 2,
    "num_heads": 2,
    "width": 16,
    "dropout": 0.0,
    "is_causal": True,
    "positions": "rotary",
    "ties_embedding": False,
}


def made(**changes):
    torch.manual_seed(0)
    return Transformer(Architecture(**{**SIZES, **changes})).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 20, (3, 12), generator=torch.Generator().manual_seed(1))


positions = pytest.mark.parametrize("positions", ["learned", "rotary"])


@positions
def test_a_decoder_sees_nothing_that_comes_later(tokens, positions):
    model = made(positions=positions)
    before = model(tokens)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    after = model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert all((before[:, place] != after[:, place]).any() for place in range(5, 12))


@positions
def test_an_encoder_sees_all_but_padding(tokens, positions):
    model = made(is_causal=False, positions=positions)
    is_token = torch.arange(12) < torch.tensor([12, 7, 1])[:, None]
    answer = model(tokens, is_token)
    other = torch.where(is_token, tokens, (tokens + 3) % 20)
    assert torch.equal(answer[is_token], model(other, is_token)[is_token])
    torch.testing.assert_close(model(tokens[1:2, :7])[0], answer[1, :7])
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 20
    assert (model(changed, is_token)[0, 0] != answer[0, 0]).any()


def test_a_row_of_nothing_but_padding_is_finite_and_so_are_its_gradients(tokens):
    model = made(is_causal=False).train()
    answer = model(tokens, torch.zeros(3, 12, dtype=torch.bool))
    (answer * 0).sum().backward()
    assert answer.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_rotated_queries_and_keys_know_how_far_apart_they_are():
    turn = rotation(12, 8, torch.device("cpu"))
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    products = rotated(query.expand(12, 8), turn) @ rotated(key.expand(12, 8), turn).T
    for distance in range(-11, 12):
        same = products.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert not torch.isclose(products[0, 0], products[0, 1])


def test_tied_weights_are_one_tensor_which_no_pipeline_can_have():
    model = made(ties_embedding=True)
    assert model.head.weight is model.embedding.tokens.weight
    with pytest.raises(InvalidRequest, match="ties_embedding=false"):
        stage_of(model, 0, 2)
    with pytest.raises(InvalidRequest, match=r"num_stages=3 is more than model\.num_layers=2"):
        stage_of(made(), 0, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide width=16"),
        ({"num_heads": 16}, "positions=rotary"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, said):
    with pytest.raises(InvalidRequest, match=said):
        Architecture(**{**SIZES, **changes})


@positions
@pytest.mark.parametrize("ties_embedding", [False, True])
def test_its_operations_are_those_that_torch_counts(positions, ties_embedding):
    model = made(positions=positions, ties_embedding=ties_embedding)
    expected = counted(model, torch.zeros(1, 12, dtype=torch.int64))(5, 60)
    assert flops(model.architecture)(5, 60) == expected


def test_its_dropout_can_be_drawn_by_sample():
    model = made(dropout=0.1)
    num_layers = replace_dropout(model, Draws(0))
    assert num_layers == 1 + 2 * 2 == sum(isinstance(m, SampleDropout) for m in model.modules())


# On meshes.

SMALL = ("model.num_layers=2", "model.num_heads=2", "model.width=16", "data.global_batch_size=12")
SMALL += ("num_epochs=9", "evaluation.at_start=true", "checkpoint.every_steps=0")
SMALL += (
    "num_compute_threads=1",
    "optimizer.warmup_steps=0",
    "optimizer.schedule=constant",
    "metrics.sinks=['jsonl']",
)

TENSOR = (2, ("parallel.num_tensor=2",))
PIPELINE = (2, ("parallel.num_stages=2", "parallel.num_microbatches=2"))
SHARDS = (2, ("parallel.num_shards=2",))
REPLICAS = (2, ())


@pytest.fixture(scope="module")
def datasets(daemon):
    """``blocks`` for the decoder, the last ones cut short, and ``rows`` for the encoder, padded to
    different lengths."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 20, (41, 9)).astype(np.int32)
    blocks[35:, 4:] = -1
    rows = generator.integers(len(SPECIAL), 20, (41, 10)).astype(np.int32)
    rows[:, 0] = FIRST
    for row, length in zip(rows, generator.integers(2, 10, 41), strict=True):
        row[length], row[length + 1 :] = LAST, PADDING
    array = pa.FixedShapeTensorArray.from_numpy_ndarray
    columns = {
        "blocks": {"tokens": array(blocks), "num_characters": pa.array([8] * 41, pa.int32())},
        "rows": {"tokens": array(rows)},
    }
    about = {"vocabulary_size": 20, "block_length": 8, "num_places": 10}
    with forebay.connect(daemon.data) as client:
        for name, each in columns.items():
            with client.create_dataset(name, metadata=about) as writer:
                writer.write_table(pa.table(each))
            client.dataset(name).define_splits({"train": 0.7, "test": 0.3}, seed=0)


def losses(ranks):
    """Of every step, and of every evaluation."""
    values = {("step", step): found[-1] for step, found in ranks.values("loss").items()}
    for name in ("test_loss", "test_perplexity"):
        for step, found in ranks.values(name, "evaluation").items():
            values[name, step] = found[-1]
    return values


def start(launch, recipe, run, mesh=(1, ()), *more):
    num_ranks, keys = mesh
    dataset = {"gpt_shakespeare": "blocks", "bert_shakespeare": "rows"}[recipe]
    words = (*SMALL, f"data.dataset={dataset}", *keys, *more)
    return launch(*words, recipe=recipe, run=run, num_ranks=num_ranks)


def test_a_decoder_computes_on_every_mesh_what_one_process_does(launch, datasets):
    meshes = {"alone": (1, ()), "tensor": TENSOR, "pipeline": PIPELINE, "shards": SHARDS}
    found = {}
    for name, mesh in meshes.items():
        ranks = start(launch, "gpt_shakespeare", name, mesh, "max_steps=2")
        ranks.finish()
        found[name] = losses(ranks)
    assert len(found["alone"]) == 2 + 2 * 2
    for each in found.values():
        assert each == pytest.approx(found["alone"], rel=1e-4)


def test_dropout_by_sample_is_the_same_on_one_rank_and_on_two(launch, datasets):
    found = []
    for name, mesh in (("alone", (1, ())), ("replicas", REPLICAS)):
        keys = ("max_steps=3", "deterministic=true", "model.dropout=0.3")
        ranks = start(launch, "bert_shakespeare", name, mesh, *keys)
        ranks.finish()
        found.append(losses(ranks))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_an_encoder_hides_the_same_tokens_on_every_mesh_and_after_a_resume(launch, datasets):
    """Two steps as a pipeline, then two on tensor-parallel ranks, then two on replicas."""
    alone = start(launch, "bert_shakespeare", "alone", (1, ()), "max_steps=6")
    for number, mesh in enumerate((PIPELINE, TENSOR, REPLICAS), start=1):
        walk = start(launch, "bert_shakespeare", "walk", mesh, f"max_steps={2 * number}")
        walk.finish()
    alone.finish()
    expected, found = losses(alone), losses(walk)
    assert {key for key in expected if key[0] == "step"} == {("step", n) for n in range(1, 7)}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_tied_weights_go_on_on_another_mesh(launch, datasets):
    tied = "model.ties_embedding=true"
    alone = start(launch, "gpt_shakespeare", "alone", (1, ()), tied, "max_steps=4")
    start(launch, "gpt_shakespeare", "walk", (1, ()), tied, "max_steps=2").finish()
    walk = start(launch, "gpt_shakespeare", "walk", SHARDS, tied, "max_steps=4")
    walk.finish()
    alone.finish()
    expected, found = losses(alone), losses(walk)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_heads_that_ranks_cannot_share_are_refused_by_name(launch, datasets):
    ranks = start(launch, "gpt_shakespeare", "a", TENSOR, "model.num_heads=1")
    assert ranks.statuses() == [2, 2] or 0 not in ranks.statuses()
    assert "num_tensor=2 does not divide model.num_heads=1" in ranks.output()
