"""Mixtures through both loaders: by definition the same samples, from any ranks and batch sizes."""

import json
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import forebay
from forebay.dataset.reading import DatasetReading, OrderOptions, PlanParameters
from forebay_server.model.uses import ReadOrder, windows
from forebay_server.testing.rpc import rpc_client
from forebay_wire.blocks import BlockParameters
from forebay_wire.mixture import MixtureOrder
from forebay_wire.mixture_lanes import LanedOrder
from forebay_wire.order import Order
from forebay_wire.v1 import plans_pb2 as messages

SIZES = {"web": 211, "code": 60, "books": 33}
WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}
SCHEMA = {"number": "int64", "tokens": "list[int32]", "text": "string"}

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def way(monkeypatch):
    """By descriptors; one test goes by HTTP."""
    monkeypatch.delenv("FOREBAY_NO_LOCAL", raising=False)
    return "local"


@pytest.fixture(scope="module")
def _datasets(daemon):
    with forebay.connect(daemon.data) as client:
        for dataset, (name, size) in enumerate(SIZES.items()):
            with client.create_dataset(
                name, schema=SCHEMA, shard_bytes=64 * 1024, batch_bytes=2048
            ) as writer:
                for number in range(size):
                    tokens = [number] * (10 * (dataset + 1))
                    writer.write(number=number, tokens=tokens, text=f"{name} {number}")
        client.dataset("web").define_splits({"train": 0.8, "test": 0.2}, seed=1)


@pytest.fixture
def datasets(client, _datasets):
    return {name: client.dataset(name) for name in SIZES}


@pytest.fixture
def mixture(datasets):
    return forebay.Mixture(datasets, WEIGHTS, num_samples=250)


def expected(mixture, *, shuffle="full", seed=5, epoch=0):
    """(dataset, row) of each position, by definition: no loader runs."""
    order = MixtureOrder(mixture.recipe, mixture.identity, seed, epoch)
    found = []
    datasets = list(mixture.datasets.values())
    for number, ordinal in zip(*order.at(np.arange(len(mixture))), strict=True):
        dataset = datasets[number]
        turn, place = divmod(int(ordinal), len(dataset))
        own = Order(len(dataset), shuffle, seed, turn, dataset.identity)
        found.append((int(number), int(dataset.rows_at(own.between(place, place + 1))[0])))
    return found


def make(mixture, **options):
    options = {"global_batch_size": 24, "shuffle": "full", "seed": 5, "include_ids": True} | options
    return forebay.DataLoader(mixture, **options)


def samples_of(batch):
    names = list(SIZES)
    found = list(zip(batch["_dataset"].tolist(), batch["_ids"].tolist(), strict=True))
    assert batch["number"].tolist() == [row for _, row in found]
    assert batch["text"] == [f"{names[number]} {row}" for number, row in found]
    if "_mask" in batch:
        found = [one for one, real in zip(found, batch["_mask"].tolist(), strict=True) if real]
    return found


def read(mixture, num_ranks, *, state=None, steps=None, **options):
    """Samples that all ranks read, batch by batch, and the state after them."""
    loaders = [
        make(mixture, rank=rank, world_size=num_ranks, **options) for rank in range(num_ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    found = []
    for parts in zip(*loaders, strict=True):
        found.append([one for part in parts for one in samples_of(part)])
        states = [loader.state_dict() for loader in loaders]
        assert all(one == states[0] for one in states)
        if len(found) == steps:
            break
    for loader in loaders:
        loader.close()
    return [one for batch in found for one in batch], json.loads(json.dumps(states[0]))


@pytest.mark.parametrize("last_batch", ["keep", "pad"])
def test_ranks_and_batch_size_change_in_the_middle_and_nothing_else(mixture, last_batch):
    first, state = read(mixture, 1, steps=3)
    second, state = read(mixture, 3, state=state, steps=4, global_batch_size=7)
    third, _ = read(mixture, 2, state=state, global_batch_size=31, last_batch=last_batch)
    assert first + second + third == expected(mixture)


def test_of_each_dataset_every_sample_comes_once_before_any_comes_again(mixture):
    with make(mixture) as loader:
        seen = [one for epoch in loader.epochs(5) for batch in epoch for one in samples_of(batch)]
    assert len(seen) == 5 * 250
    for number, size in enumerate(SIZES.values()):
        own = [row for dataset, row in seen if dataset == number]
        for start in range(0, len(own), size):
            turn = own[start : start + size]
            assert len(set(turn)) == len(turn)
    shares = np.bincount([number for number, _ in seen]) / len(seen)
    assert np.abs(shares - [0.6, 0.3, 0.1]).max() < 0.01


@pytest.mark.parametrize("stop", ["first", "all"])
def test_an_epoch_ends_by_a_rule(datasets, stop):
    mixture = forebay.Mixture(datasets, WEIGHTS, stop=stop)
    found, _ = read(mixture, 2, global_batch_size=40)
    times = [
        [found.count((number, row)) for row in range(size)]
        for number, size in enumerate(SIZES.values())
    ]
    if stop == "first":
        assert max(map(max, times)) == 1
        assert {1} in map(set, times)  # one dataset came whole
    else:
        assert min(map(min, times)) == 1


def test_fixed_sizes_and_repeats(datasets):
    sizes = {"web": 100, "code": 60, "books": 50}
    found, _ = read(forebay.Mixture(datasets, sizes=sizes), 1)
    assert np.bincount([number for number, _ in found]).tolist() == [100, 60, 50]
    repeated = forebay.Mixture(datasets, repeats={"web": 0.5, "code": 1, "books": 3})
    found, _ = read(repeated, 1)
    assert np.bincount([number for number, _ in found]).tolist() == [106, 60, 99]
    assert {found.count((2, row)) for row in range(33)} == {3}


def test_weights_by_token_become_shares_of_samples_by_the_mean_length(datasets):
    weights = {"web": 1, "code": 1, "books": 1}
    mixture = forebay.Mixture(datasets, weights, by="tokens", num_samples=1100)
    with make(mixture, global_batch_size=100) as loader:
        tokens = np.zeros(3)
        for batch in loader:
            lengths = torch.tensor([len(one) for one in batch["tokens"]])
            tokens += np.bincount(batch["_dataset"], weights=lengths, minlength=3)
    assert np.abs(tokens / tokens.sum() - 1 / 3).max() < 0.02
    said = {"web": 10, "code": 20, "books": 30}
    again = forebay.Mixture(datasets, weights, by="tokens", num_samples=1100, mean_tokens=said)
    assert again.identity == mixture.identity


def test_a_schedule_counts_samples_or_tokens_through_all_epochs(datasets):
    only = {"web": 0, "code": 0, "books": 0}
    stages = [
        forebay.Stage(only | {"web": 1}),
        forebay.Stage(only | {"code": 1}, from_samples=150),
        forebay.Stage(only | {"books": 1}, from_tokens=150 * 10 + 100 * 20),
    ]
    mixture = forebay.Mixture(datasets, stages, num_samples=200)
    with make(mixture) as loader:
        seen = [one[0] for epoch in loader.epochs(2) for b in epoch for one in samples_of(b)]
    assert seen == [0] * 150 + [1] * 100 + [2] * 150


def test_the_streaming_dataset_reads_the_same_beside_workers(mixture):
    stream = forebay.StreamingDataset(
        mixture, global_batch_size=24, shuffle="full", seed=5, include_ids=True
    )
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    batches = list(loader)
    assert [one for batch in batches for one in samples_of(batch)] == expected(mixture)
    state = stream.state_dict(after=batches[3])
    rest, _ = read(mixture, 2, state=state)
    assert rest == expected(mixture)[4 * 24 :]


def test_the_scripts_of_the_page_about_loaders(datasets, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/loader.md").read_text(encoding="utf-8")
    scripts = re.findall(r"^```python\n(.*?)^```", page[page.index("## Mixtures") :], re.M | re.S)
    names = {"forebay": forebay, "web": datasets["web"], "code": datasets["code"]}
    for script in scripts[:3]:
        exec(compile(script.replace("_000", ""), "docs/loader.md", "exec"), names)  # noqa: S102
    shares = [stage.shares for stage in names["curriculum"].recipe.stages]
    assert shares[0][1] == 0
    assert shares[-1][0] == shares[-1][1]
    assert names["batch"]["tokens"].shape[1] == 2048


def test_by_http_the_samples_are_the_same(daemon, mixture, monkeypatch):
    monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    with forebay.connect(daemon.data) as client:
        datasets = {name: client.dataset(name) for name in SIZES}
        found, _ = read(forebay.Mixture(datasets, WEIGHTS, num_samples=250), 2)
    assert found == expected(mixture)


def test_bad_samples_of_any_dataset_are_holes(mixture):
    def check(sample):
        if sample["number"] % 10 == 3:
            raise ValueError("bad")
        return sample

    options = {"on_error": "mask", "max_errors": 40, "transform": forebay.per_sample(check)}
    with make(mixture, num_threads=0, **options) as loader:
        batches = list(loader)
        report = loader.report()
    pairs = [
        (pair, real)
        for batch in batches
        for pair, real in zip(
            zip(batch["_dataset"].tolist(), batch["_ids"].tolist(), strict=True),
            batch["_mask"].tolist(),
            strict=True,
        )
    ]
    assert [pair for pair, _ in pairs] == expected(mixture)
    assert all(real == (row % 10 != 3) for (_, row), real in pairs)
    assert report.masked_samples == sum(not real for _, real in pairs) > 0
    assert len(report.bad_samples) == len({pair for pair, real in pairs if not real})


def test_what_cannot_be_read_of_one_dataset_is_masked_and_the_rest_is_right(client, datasets, name):
    broken = pa.array([b"no\xff", b"\xff"] * 20).view(pa.string())  # none of them is UTF-8
    with client.create_dataset(name, schema={"text": "string"}) as writer:
        writer.write_table(pa.table({"text": broken}))
    both = {"web": datasets["web"], "broken": client.dataset(name)}
    mixture = forebay.Mixture(both, {"web": 3, "broken": 1}, num_samples=100)
    options = {"columns": ["text"], "on_error": "mask", "global_batch_size": 20}
    with make(mixture, **options) as loader:
        batches = list(loader)
        report = loader.report()
    masked = 0
    for batch in batches:
        for number, row, text, real in zip(
            batch["_dataset"], batch["_ids"], batch["text"], batch["_mask"], strict=True
        ):
            assert text == (None if number else f"web {row}")
            assert bool(real) == (number == 0)
            masked += not real
    assert report.masked_samples == masked > 10
    first = len(datasets["web"])  # rows are counted through all datasets
    assert all(first <= row < first + 40 for row in report.bad_samples)


@pytest.mark.parametrize("shuffle", ["none", "block"])
def test_other_shuffles_keep_each_dataset_s_own_order(datasets, shuffle):
    mixture = forebay.Mixture(datasets, WEIGHTS, stop="first")
    options = {"block_rows": 10, "window_blocks": 2} if shuffle == "block" else {}
    found, state = read(mixture, 2, shuffle=shuffle, steps=2, **options)
    rest, _ = read(mixture, 1, shuffle=shuffle, state=state, **options)
    assert len(set(found + rest)) == len(mixture) == len(found + rest)
    if shuffle == "none":
        assert found + rest == expected(mixture, shuffle="none")


def test_a_split_is_a_component_like_any_other(client, datasets):
    train = client.dataset("web", split="train")
    mixture = forebay.Mixture({"train": train, "code": datasets["code"]}, {"train": 3, "code": 1})
    with make(mixture) as loader:
        rows = [
            row
            for batch in loader
            for n, row in zip(batch["_dataset"], batch["_ids"], strict=True)
            if n == 0
        ]
    assert set(map(int, rows)) <= set(train.rows_at(np.arange(len(train))).tolist())


def test_a_state_of_another_mixture_is_refused(mixture, datasets):
    with make(mixture) as loader:
        state = loader.state_dict()
    others = [
        forebay.Mixture(datasets, {**WEIGHTS, "web": 0.61}, num_samples=250),
        forebay.Mixture({name: datasets[name] for name in ("web", "code")}, {"web": 6, "code": 3}),
    ]
    for other in others:
        with make(other) as loader, pytest.raises(forebay.InvalidRequest, match="was taken with"):
            loader.load_state_dict(state)
    with make(datasets["web"]) as loader, pytest.raises(forebay.InvalidRequest):
        loader.load_state_dict(state)
    with make(mixture) as loader:
        with pytest.raises(forebay.InvalidRequest, match="a mixture"):
            loader.load_state_dict(make(datasets["web"]).state_dict())
        with pytest.raises(forebay.InvalidRequest, match="seed"):
            loader.load_state_dict({**state, "seed": 6})
        with pytest.raises(forebay.InvalidRequest, match="stands at"):
            loader.load_state_dict({**state, "position": 251})


def test_datasets_with_other_columns_are_refused_unless_projected(client, datasets, name):
    with client.create_dataset(name, schema={"number": "int64", "text": "int32"}) as writer:
        writer.write(number=1, text=1)
    mixture = forebay.Mixture(
        {"web": datasets["web"], "odd": client.dataset(name)}, {"web": 1, "odd": 1}, num_samples=8
    )
    with pytest.raises(forebay.SchemaMismatch, match="other columns"):
        make(mixture)
    with pytest.raises(forebay.SchemaMismatch, match=r"'text'.*string in 'web' and int32 in 'odd'"):
        make(mixture, columns=["text"])
    with make(mixture, columns=["number"], include_ids=False) as loader:
        assert len(next(iter(loader))["number"]) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of weights"),
        ({"weights": WEIGHTS, "sizes": SIZES}, "exactly one of weights"),
        ({"weights": {"web": 1}}, "datasets are"),
        ({"weights": WEIGHTS, "stop": "never"}, "stop"),
        ({"weights": WEIGHTS, "num_samples": 5, "stop": "all"}, "without stop"),
        ({"weights": [forebay.Stage(WEIGHTS), forebay.Stage(WEIGHTS, 5)]}, "num_samples"),
        ({"weights": WEIGHTS | {"web": -1}}, "none below 0"),
        ({"weights": WEIGHTS | {"web": float("nan")}}, "weights: 'web' has nan"),
        ({"repeats": SIZES | {"web": float("inf")}}, "repeats: 'web' has inf"),
        ({"sizes": SIZES, "stop": "all"}, "belong to weights"),
    ],
)
def test_what_makes_no_mixture_is_refused(datasets, options, words):
    with pytest.raises(forebay.InvalidRequest, match=words):
        forebay.Mixture(datasets, **options)


BLOCKS = {"shuffle": "block", "block_rows": 10, "window_blocks": 2}


def in_lanes(mixture, lanes, epoch=0, seed=5):
    """(dataset, row) of each position of a mixture in blocks and lanes, by definition."""
    order = LanedOrder(mixture.in_lanes(lanes), mixture.identity_in(lanes), seed, epoch)
    options = OrderOptions("block", seed, block_rows=10, window_blocks=2)
    readings = [DatasetReading(dataset, options) for dataset in mixture.datasets.values()]
    positions = np.arange(order.mixture.num_samples, dtype=np.int64)
    found = []
    for number, turn, place in zip(*order.at(positions), strict=True):
        rows = readings[number].epoch(int(turn), lanes).rows(np.array([place]))
        found.append((int(number), int(rows[0])))
    return found


@pytest.mark.parametrize("how", [{"num_samples": 250}, {"stop": "all"}])
@pytest.mark.parametrize(("num_ranks", "lanes"), [(1, 2), (2, 2), (3, 2), (2, 4), (4, 2)])
def test_in_lanes_all_ranks_together_read_the_same_batches(datasets, num_ranks, lanes, how):
    mixture = forebay.Mixture(datasets, WEIGHTS, **how)
    wanted = in_lanes(mixture, lanes, epoch=1)
    ranks = [
        make(mixture, rank=rank, world_size=num_ranks, lanes=lanes, **BLOCKS)
        for rank in range(num_ranks)
    ]
    for one in ranks:
        one.set_epoch(1)
        assert len(one) == -(-len(wanted) // 24)
    for number, parts in enumerate(zip(*ranks, strict=True)):
        found = [sample for part in parts for sample in samples_of(part)]
        assert sorted(found) == sorted(wanted[number * 24 : (number + 1) * 24])
    for one in ranks:
        one.close()


def test_in_lanes_each_rank_reads_blocks_of_its_own_of_every_dataset(datasets):
    mixture = forebay.Mixture(datasets, WEIGHTS, stop="first")
    read_by: list[list[set[int]]] = []
    for rank in range(2):
        with make(mixture, rank=rank, world_size=2, lanes=2, **BLOCKS) as loader:
            blocks: list[set[int]] = [set() for _ in SIZES]
            for batch in loader:
                for number, row in samples_of(batch):
                    blocks[number].add(row // 10)
            read_by.append(blocks)
    for one, other, size in zip(*read_by, SIZES.values(), strict=True):
        assert len(one & other) <= 1  # in which one lane ends and the other begins
        assert max(len(one), len(other)) <= size // 10 // 2 + 2


def test_lanes_are_kept_in_the_state_and_those_of_others_are_refused(mixture):
    options = {"lanes": 2, **BLOCKS}
    first, state = read(mixture, 2, steps=4, **options)
    assert state["lanes"] == 2
    rest, _ = read(mixture, 3, state=state, global_batch_size=14, **BLOCKS)  # takes them over
    assert sorted(first + rest) == sorted(in_lanes(mixture, 2))
    other = make(mixture, lanes=3, **BLOCKS)
    with other, pytest.raises(forebay.InvalidRequest, match=r"taken with lanes=2, this .* has 3"):
        other.load_state_dict(state)
    with pytest.raises(forebay.InvalidRequest, match='lanes belong to shuffle="block"'):
        make(mixture, lanes=2)
    many = make(mixture, lanes=34, **BLOCKS)
    with many, pytest.raises(forebay.InvalidRequest, match="has 33 samples, fewer than"):
        next(iter(many))


def test_lanes_are_as_many_as_nodes(mixture, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with make(mixture, rank=0, world_size=4, **BLOCKS) as loader:
        next(iter(loader))
        assert loader.state_dict()["lanes"] == 2
    with make(mixture, rank=0, world_size=4) as loader:  # of a full shuffle there are none
        next(iter(loader))
        assert "lanes" not in loader.state_dict()


def test_a_plan_of_a_rank_in_lanes_is_of_what_it_reads(datasets):
    """The uses that the daemon computes of what it is told, and the rows that the rank reads."""
    mixture = forebay.Mixture(datasets, WEIGHTS, stop="first")
    options = OrderOptions(block_rows=10, shuffle="block", window_blocks=2, seed=5)
    reading = mixture.arranged(options)
    cut = reading.cut(0, 0, 24, "keep", 4)
    samples = reading.epoch(0, 4)
    for rank in range(2):
        told = reading.component_plans(PlanParameters(24, "keep", rank, 2, 4))
        parts = [cut.part(step, rank, 2) for step in cut.steps()]
        rows = samples.rows(np.concatenate([part.positions(cut.num_samples) for part in parts]))
        read_rows = {
            number: set((own // 10).tolist()) for number, _, _, own in mixture.share_out(rows)
        }
        for number, (dataset, plan) in enumerate(zip(datasets.values(), told, strict=True)):
            planned = planned_blocks(DatasetReading(dataset, options), plan)
            assert read_rows[number] <= planned
            assert len(planned) <= len(dataset) // 10 // 2 + 2


def planned_blocks(reading, plan) -> set[int]:
    """Blocks of 10 rows that a daemon expects to be read in the first pass."""
    told = reading.plan_order(plan)
    order = ReadOrder(
        manifest=told["manifest"],
        identity=reading.dataset.identity,
        num_samples=len(reading.dataset),
        num_version_rows=len(reading.dataset),
        selection=None,
        shuffle=told["shuffle"],
        seed=told["seed"],
        global_batch_size=told["global_batch_size"],
        last_batch=told["last_batch"],
        rank=told["rank"],
        num_ranks=told["num_ranks"],
        num_epochs=1,
        blocks=BlockParameters(told["window_blocks"], told["block_rows"], told["lanes"]),
    )
    starts = np.array([*range(0, len(reading.dataset), 10), len(reading.dataset)])
    return {shard for one in windows(order, starts, 0, 0) for shard in one.shards.tolist()}


def test_a_pickle_is_the_same_mixture(mixture):
    assert pickle.loads(pickle.dumps(mixture)).identity == mixture.identity  # noqa: S301 - our own


def test_the_daemon_has_a_plan_for_each_dataset(daemon, mixture):
    with make(mixture, columns=["number"], include_ids=False) as loader:
        batches = iter(loader)
        for _ in range(4):
            next(batches)
        deadline = time.monotonic() + 20
        plans = {}
        with rpc_client(daemon) as rpc:
            while len(plans) < 3 and time.monotonic() < deadline:
                told = rpc.call(rpc.plans.ListPlans, messages.ListPlansRequest()).plans
                plans = {one.dataset: one for one in told if "web v1" in one.loader}
                time.sleep(0.05)
        assert {name.partition("@")[0] for name in plans} == set(SIZES)
        assert loader.report().plan_problem == ""


@pytest.mark.parametrize("repeats", [True, False])
def test_fixed_sizes_have_one_lane_on_any_nodes(datasets, monkeypatch, repeats):
    """As many times as is said, each sample: also where another mixture would have lanes."""
    how = {"repeats": dict.fromkeys(SIZES, 1)} if repeats else {"sizes": SIZES}
    mixture = forebay.Mixture(datasets, **how)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with make(mixture, rank=0, world_size=4, **BLOCKS) as loader:
        next(iter(loader))
        assert "lanes" not in loader.state_dict()
    with pytest.raises(forebay.InvalidRequest, match="lanes=1"):
        make(mixture, lanes=3, **BLOCKS)
