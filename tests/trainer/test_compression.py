"""Gradients that travel compressed: nearly the mean, what is left out arrives later, a resumed run
goes on exactly. B numbers of a gradient, T rounds."""

import os

import pytest
import torch

from forebay_trainer.parallel import ParallelConfig, Shape
from forebay_wire.errors import InvalidRequest

pytestmark = pytest.mark.timeout(300)

METHODS = ("bf16", "fp16", "topk", "powersgd")


@pytest.fixture(scope="module")
def ranks(warm_torch, tmp_path_factory):
    """What compressing/methods.py saw on two ranks."""
    folder = tmp_path_factory.mktemp("methods")
    program = os.path.join(os.path.dirname(__file__), "compressing", "methods.py")
    shared = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w+") as log, open(os.devnull) as nothing:
        streams = (nothing.fileno(), log.fileno(), log.fileno())
        started = [
            warm_torch.start([program, str(folder)], {**shared, "RANK": rank}, *streams)
            for rank in "01"
        ]
        try:
            statuses = [each.wait(100) for each in started]
        finally:
            for each in started:
                each.kill()
                each.wait()
        log.seek(0)
        assert statuses == [0, 0], log.read()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.fixture(params=["normal", "wide", "low rank"])
def case(request, ranks):
    """One gradient of each rank: what the methods made of it; its mean and mean magnitude."""
    both = [rank[request.param] for rank in ranks]
    mine = torch.stack([each["mine"] for each in both]).double()
    return request.param, both, mine.mean(dim=0), mine.abs().mean(dim=0)


def error_of(both, method, exact_B):
    first, second = (each[method]["mean"] for each in both)
    assert first.equal(second)
    return (first - exact_B).abs()


@pytest.mark.parametrize(("method", "bits"), [("bf16", 8), ("fp16", 11)])
def test_types_round_twice_over_their_whole_range(case, method, bits):
    _, both, exact_B, size_B = case
    # Each rank's number to half a unit, and their mean again. fp16 ends 2^-39 below the largest.
    bound_B = 2.0**-bits * 2 * size_B + (2.0**-38 * both[0]["mine"].abs().max() * 2)
    assert (error_of(both, method, exact_B) <= bound_B).all()


def test_top_k_is_the_exact_mean_of_the_largest_entries(case):
    _, both, *_ = case
    expected = torch.zeros_like(both[0]["mine"])
    for each in both:
        for piece, into in zip(pieces(each["mine"]), pieces(expected), strict=True):
            places = piece.abs().topk(-(-len(piece) // 10)).indices
            into[places] += piece[places]
    assert both[0]["topk"]["mean"].equal(expected / 2)
    assert both[1]["topk"]["mean"].equal(expected / 2)


def pieces(flat):
    return flat.split([24 * 16, 8 * 3 * 3 * 3, 17])


def test_powersgd_is_no_worse_than_a_projection_and_exact_at_low_rank(case):
    kind, both, exact_B, size_B = case
    error = error_of(both, "powersgd", exact_B)
    assert pieces(error)[2].max() <= 1e-6 * size_B.max()  # a bias is added up as it is
    matrices = (piece.view(rows, -1) for piece, rows in zip(pieces(exact_B), (24, 8), strict=False))
    for left, matrix in zip(pieces(error), matrices, strict=False):
        best = torch.linalg.svdvals(matrix)[2:].norm()
        assert best * 0.999 - 1e-5 * matrix.norm() <= left.norm()
        assert left.norm() <= (1e-5 if kind == "low rank" else 1.0) * matrix.norm()


def test_steps_before_the_start_are_not_compressed(case):
    _, both, exact_B, size_B = case
    assert (error_of(both, "later", exact_B) <= 1e-6 * size_B).all()


def test_the_bytes_that_a_rank_sends_are_counted(ranks):
    plain = 4 * 617  # two ranks: half of the gradient there, and the mean of the other half back
    expected = {
        "bf16": plain / 2 + 2 * 2 / 2,  # 617 is odd: one number more
        "fp16": plain / 2 + 2 * 2 / 2 + 2 * 2,  # and the exponents
        "topk": 8 * (39 + 22 + 2),
        "powersgd": 4 * (2 * (24 + 16) + 2 * (8 + 27) + 17),
        "later": plain,
    }
    for method, sent in expected.items():
        assert ranks[0]["normal"][method]["taken"] == (sent, plain), method


@pytest.mark.parametrize("method", ["powersgd", "cold powersgd", "topk"])
def test_what_is_left_out_arrives_later(ranks, method):
    exact_B = sum(rank["normal"]["mine"] for rank in ranks) / 2
    sent_TB = ranks[0]["constant"][method]["means"].cumsum(dim=0)
    left_TB = sum(rank["constant"][method]["errors"] for rank in ranks) / 2
    numbers_T1 = torch.arange(1, len(sent_TB) + 1)[:, None]
    assert (sent_TB + left_TB).allclose(exact_B * numbers_T1, rtol=1e-4, atol=1e-3)
    assert left_TB.norm(dim=1).max() < 8 * exact_B.norm()
    away_T = (sent_TB / numbers_T1 - exact_B).norm(dim=1) / exact_B.norm()
    assert away_T[-1] < 0.2 < 0.5 < away_T[0]
    without = ranks[0]["constant"][f"{method.removeprefix('cold ')} without"]["means"]
    assert (without.mean(dim=0) - exact_B).norm() / exact_B.norm() > 0.3


@pytest.mark.parametrize("method", ["powersgd", "topk", "fp16"])
def test_an_overflow_is_seen_and_forgotten_and_the_scale_of_the_loss_does_not_matter(ranks, method):
    found = ranks[0]["disturbed"][method]
    assert not found["bad"].isfinite().all()
    assert found["disturbed"].allclose(found["calm"], rtol=1e-5, atol=1e-6)


def test_a_type_that_the_backend_cannot_add_up_is_refused_by_name(ranks):
    refusals = ranks[0]["refusals"]
    assert refusals.pop("torch.float8_e5m2").startswith(
        "parallel.compression.method: gloo cannot add up float8_e5m2 (Invalid scalar type)"
    )
    assert refusals == {"torch.float32": None, "torch.bfloat16": None}


@pytest.mark.parametrize(
    ("method", "shape", "reason"),
    [
        ("bf16", Shape(tensor=2), "tensor parallelism are not compressed; set it to none, or"),
        ("topk", Shape(stages=2), "a pipeline are not compressed; set it to none, or"),
        ("topk", Shape(shards=2), r"between replicas, and FSDP2 has none here; give .*=2 or more"),
        ("powersgd", Shape(shards=4), "between replicas, and FSDP2 has none here"),
    ],
)
def test_a_mesh_without_such_gradients_is_refused_with_what_to_do(method, shape, reason):
    stages, replicas, shards, tensor = shape.sizes
    keys = ParallelConfig(
        num_stages=stages,
        num_replicas=replicas,
        num_shards=shards,
        num_tensor=tensor,
        compression=type(ParallelConfig().compression)(method=method),
    )
    with pytest.raises(InvalidRequest, match=rf"parallel.compression.method={method}.*{reason}"):
        keys.shape(stages * replicas * shards * tensor)


# In a run.

KEYS = ("deterministic=true", "optimizer.schedule=constant", "checkpoint.every_steps=0")
KEYS += ("data.num_threads=0", "metrics.sinks=['jsonl']", "data.micro_batch_size=3")


def compressed(method, **keys):
    words = [f"parallel.compression.{key}={value}" for key, value in keys.items()]
    return (*KEYS, f"parallel.compression.method={method}", *words)


RUNS = {
    "topk": (compressed("topk", share=0.1, start_step=2), 2),
    "powersgd": (compressed("powersgd", rank=1), 2),
    "cold powersgd": (compressed("powersgd", rank=1, warm_start="false"), 2),
    "HSDP topk": ((*compressed("topk", share=0.1), "parallel.num_shards=2"), 4),
    "HSDP powersgd": ((*compressed("powersgd", rank=1), "parallel.num_shards=2"), 4),
}


@pytest.mark.parametrize(
    "name", ["topk", *(pytest.param(each, marks=pytest.mark.slow) for each in [*RUNS][1:])]
)
def test_a_resumed_run_goes_on_exactly_and_on_other_ranks_begins_anew(launch, name):
    keys, num_ranks = RUNS[name]
    whole = launch(*keys, "max_steps=12", num_ranks=num_ranks, run="whole")
    parts = launch(*keys, "max_steps=6", num_ranks=num_ranks, run="parts")
    whole.finish()
    parts.finish()
    parts = launch(*keys, "max_steps=12", num_ranks=num_ranks, run="parts")
    assert "dropped" not in parts.finish()
    assert parts.values("loss") == whole.values("loss")
    assert len(whole.values("loss")) == 12
    for event in whole.events():
        if event["event"] == "step":
            is_smaller = event["wire_bytes"] < event["wire_bytes_plain"]
            assert is_smaller == (name != "topk" or event["step"] > 2)
    other = launch(*keys, "max_steps=14", num_ranks=num_ranks + num_ranks // 2, run="parts")
    mesh = "HSDP 2 x FSDP2 2" if num_ranks == 4 else "DDP 2"
    method = name.rpartition(" ")[2]
    assert f"; what {method} on {mesh} had left out of gradients is dropped" in other.finish()


def losses(launch, run, *keys, num_ranks=2):
    ranks = launch(*KEYS, *keys, num_ranks=num_ranks, run=run)
    ranks.finish()
    return [found[0] for _, found in sorted(ranks.values("loss").items())], ranks


TINY = ("max_steps=120", "optimizer.learning_rate=3e-3")
FP16 = ("precision=fp16", "model.dropout=0")
SHARDS = ("parallel.num_shards=2",)
WAYS = {
    "bf16": (compressed("bf16"), 2, 0.51),
    "fp16": (compressed("fp16"), 2, 0.55),
    "topk": (compressed("topk", share=0.2), 2, 0.45),
    "powersgd": (compressed("powersgd", rank=1), 2, 0.6),
    "fp16 topk": ((*compressed("topk", share=0.2), *FP16), 2, 0.45),
    "FSDP2 bf16": ((*compressed("bf16"), *SHARDS), 2, 0.5),
    "FSDP2 fp16": ((*compressed("fp16"), *SHARDS, *FP16), 2, 0.5),
    "HSDP bf16": ((*compressed("bf16"), *SHARDS), 4, 0.5),
    "HSDP topk": ((*compressed("topk", share=0.2), *SHARDS), 4, 0.75),
    "HSDP powersgd": ((*compressed("powersgd", rank=1), *SHARDS), 4, 0.9),
}


@pytest.mark.slow
def test_compressed_runs_end_near_the_plain_one_with_fewer_bytes(launch):
    plain, _ = losses(launch, "plain", *TINY)
    assert sum(plain[-10:]) < 0.5 * sum(plain[:10])
    for name, (keys, num_ranks, most) in WAYS.items():
        found, ranks = losses(launch, name.replace(" ", "-"), *keys, *TINY, num_ranks=num_ranks)
        assert sum(found[-10:]) <= 1.6 * sum(plain[-10:]), name
        last = ranks.events()[-1]
        assert last["event"] == "end"
        assert last["wire_bytes"] <= most * last["wire_bytes_plain"], name


@pytest.mark.slow
def test_all_entries_sent_are_the_plain_mean_on_every_mesh(launch):
    for number, (mesh, num_ranks) in enumerate([((), 3), (SHARDS, 4)]):
        few = (*mesh, "max_steps=8")
        plain, _ = losses(launch, f"plain-{number}", *few, num_ranks=num_ranks)
        whole = compressed("topk", share=1)
        found, _ = losses(launch, f"whole-{number}", *whole, *few, num_ranks=num_ranks)
        assert found == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_a_run_may_begin_and_end_to_compress_at_any_start(launch):
    steps = iter(range(3, 100, 3))

    def go(*keys, num_ranks=2):
        return losses(launch, "one", *keys, f"max_steps={next(steps)}", num_ranks=num_ranks)[1]

    go()
    assert "dropped" not in go(*compressed("topk")).output()
    assert (
        "; what topk on DDP 2 had left out of gradients is dropped"
        in go(*compressed("powersgd")).output()
    )
    assert "; what powersgd on DDP 2 had" in go(*compressed("powersgd"), num_ranks=1).output()
    assert "dropped" not in go(*compressed("powersgd")).output()
    assert "; what powersgd on DDP 2 had" in go(*compressed("bf16")).output()
    last = go()
    assert "dropped" not in last.output()
    assert sorted(last.values("loss")) == list(range(1, 22))


def test_fsdp_adds_up_no_fp16_gradients_of_a_loss_that_is_not_scaled(launch):
    ranks = launch(*compressed("fp16"), *SHARDS, num_ranks=2)
    assert all(ranks.statuses()), ranks.output()
    assert "set precision=fp16, or use method=bf16" in ranks.output()
