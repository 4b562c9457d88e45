"""Packed windows through both loaders: every token once, from any ranks, workers, batch sizes."""

import json
import pickle
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

import forebay
from forebay.dataset.reading import OrderOptions
from forebay_server.testing.rpc import rpc_client
from forebay_wire.order import Order
from forebay_wire.v1 import plans_pb2 as messages

NUM_DOCUMENTS = 150
WIDTH = 32
GROUP = 20
SEPARATOR = -7

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # by torchdata
]


def length_of(number: int) -> int:
    return 0 if number % 9 == 4 else number * 37 % 90 + 1


def tokens_of(number: int, dataset: int = 0) -> list[int]:
    """Tokens that say where they belong."""
    return [dataset * 10**6 + number * 1000 + place for place in range(length_of(number))]


@pytest.fixture
def way(monkeypatch):
    """By descriptors; one test goes by HTTP."""
    monkeypatch.delenv("FOREBAY_NO_LOCAL", raising=False)
    return "local"


@pytest.fixture(scope="module")
def _documents(daemon):
    with forebay.connect(daemon.data) as client:
        for dataset, name in enumerate(("documents", "others")):
            schema = {
                "tokens": "list[int32]",
                "number": "int64",
                "labels": "list[int64]",
                "weights": "list[float32]",
            }
            with client.create_dataset(
                name, schema=schema, shard_bytes=64 * 1024, batch_bytes=2048
            ) as writer:
                for number in range(NUM_DOCUMENTS):
                    tokens = tokens_of(number, dataset)
                    labels, weights = [-one for one in tokens], [one / 2 for one in tokens]
                    writer.write(tokens=tokens, number=number, labels=labels, weights=weights)


@pytest.fixture
def documents(client, _documents):
    return client.dataset("documents")


def stream_of(dataset, *, epoch=0, separator=None, shuffle="full"):
    """(row, token) of each group of documents, in order, by definition."""
    order = Order(len(dataset), shuffle, 5, epoch, dataset.identity)
    rows = order.between(0, len(dataset)).tolist()
    end = [] if separator is None else [separator]
    return [
        [
            (row, token)
            for row in rows[start : start + GROUP]
            if length_of(row)
            for token in tokens_of(row) + end
        ]
        for start in range(0, len(rows), GROUP)
    ]


def expected(dataset, **options):
    """The windows that fit="cut" makes."""
    return [
        group[start : start + WIDTH]
        for group in stream_of(dataset, **options)
        for start in range(0, len(group), WIDTH)
    ]


def pack(samples, **options):
    options = {"length": WIDTH, "group_samples": GROUP, "pad": -1} | options
    return forebay.Packed(samples, "tokens", **options)


def make(packed, **options):
    options = {"global_batch_size": 8, "shuffle": "full", "seed": 5, "include_ids": True} | options
    return forebay.DataLoader(packed, **options)


def windows_of(batch):
    """(row, token) of each window that is no padding; checks what stands beside the tokens."""
    found = []
    names = ("tokens", "_mask", "_ids", "_documents", "_positions")
    assert {batch[name].shape for name in names} == {batch["tokens"].shape}
    lists = (batch[name].tolist() for name in names)
    for tokens, mask, ids, documents, positions in zip(*lists, strict=True):
        real = sum(mask)
        if not real:
            continue
        assert mask == [True] * real + [False] * (len(mask) - real)
        assert ids[real:] == documents[real:] == [-1] * (len(mask) - real)
        assert tokens[real:] == [-1] * (len(mask) - real)
        starts = [at for at in range(real) if at == 0 or ids[at] != ids[at - 1]]
        assert documents[:real] == [sum(start <= at for start in starts) - 1 for at in range(real)]
        assert positions[:real] == [at - max(s for s in starts if s <= at) for at in range(real)]
        found.append(list(zip(ids[:real], tokens[:real], strict=True)))
    return found


def read(packed, num_ranks, *, state=None, steps=None, **options):
    loaders = [
        make(packed, rank=rank, world_size=num_ranks, **options) for rank in range(num_ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    found = []
    for count, parts in enumerate(zip(*loaders, strict=True), 1):
        found += [window for part in parts for window in windows_of(part)]
        states = [loader.state_dict() for loader in loaders]
        assert all(one == states[0] for one in states)
        if count == steps:
            break
    for loader in loaders:
        loader.close()
    return found, json.loads(json.dumps(states[0]))


@pytest.mark.parametrize("separator", [None, SEPARATOR])
@pytest.mark.parametrize("last_batch", ["keep", "pad"])
def test_ranks_and_batch_size_change_in_the_middle_and_nothing_else(
    documents, separator, last_batch
):
    packed = pack(documents, separator=separator)
    first, state = read(packed, 1, steps=4)
    second, state = read(packed, 3, steps=5, state=state, global_batch_size=7)
    third, _ = read(packed, 2, state=state, global_batch_size=31, last_batch=last_batch)
    assert first + second + third == expected(documents, separator=separator)


@pytest.mark.parametrize("steps", range(1, 7))
def test_interrupted_anywhere_it_goes_on_at_the_next_window(documents, steps):
    packed = pack(documents)
    first, state = read(packed, 2, steps=steps, global_batch_size=31)
    second, _ = read(packed, 1, state=state)
    assert first + second == expected(documents)


def test_windows_may_be_asked_for_in_any_order(documents):
    reading = pack(documents, separator=SEPARATOR).arranged(OrderOptions("full", 5))
    places = next(iter(reading.cut(0, 0, 30, "keep", 1).steps())).places
    mixed = np.random.default_rng(0).permutation(30)
    samples = reading.epoch(0, 1)
    found, again = samples.read(places, None), samples.read(places[mixed], None)
    assert all(np.array_equal(found[name][mixed], again[name]) for name in found)
    assert np.array_equal(samples.ids(places)["_ids"][mixed], samples.ids(places[mixed])["_ids"])


def test_steps_are_counted_alike_on_all_ranks(documents):
    packed = pack(documents)
    num_windows = len(expected(documents))
    for last_batch, steps in (("keep", -(-num_windows // 8)), ("drop", num_windows // 8)):
        for rank in range(3):
            with make(packed, last_batch=last_batch, rank=rank, world_size=3) as loader:
                assert len(loader) == steps == len([1 for _ in loader])


def test_each_epoch_has_all_documents_in_another_order(documents):
    with make(pack(documents), num_threads=3, prefetch_batches=5) as loader:
        epochs = [[w for batch in epoch for w in windows_of(batch)] for epoch in loader.epochs(2)]
    assert epochs == [expected(documents, epoch=epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]


def test_whole_documents_are_cut_only_if_they_do_not_fit(documents):
    packed = pack(documents, fit="whole", length=64)
    first, state = read(packed, 2, steps=3)
    second, _ = read(packed, 1, state=state, global_batch_size=5)
    tokens = [token for window in first + second for _, token in window]
    assert sorted(tokens) == sorted(t for n in range(NUM_DOCUMENTS) for t in tokens_of(n))
    for window in first + second:
        for row in {row for row, _ in window}:
            own = [token for one, token in window if one == row]
            assert len(own) == min(length_of(row), 64) or length_of(row) > 64


def test_another_length_goes_on_at_the_very_token(documents):
    first, state = read(pack(documents), 1, steps=3)
    second, _ = read(pack(documents, length=50), 1, state=state)
    whole = [one for group in stream_of(documents) for one in group]
    assert [one for window in first + second for one in window] == whole


def test_the_tail_of_a_group_may_be_dropped(documents):
    found, _ = read(pack(documents, tail="drop"), 2)
    assert found == [window for window in expected(documents) if len(window) == WIDTH]


def test_the_streaming_dataset_reads_the_same_beside_workers(documents):
    packed = pack(documents, separator=SEPARATOR)
    stream = forebay.StreamingDataset(
        packed, global_batch_size=8, shuffle="full", seed=5, include_ids=True
    )
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    windows, states = [], []
    for batch in loader:
        windows += windows_of(batch)
        states.append(stream.state_dict(after=batch))
    assert windows == expected(documents, separator=SEPARATOR)
    rest, _ = read(packed, 2, state=states[9])
    assert rest == windows[80:]


def test_a_mixture_is_packed_like_a_dataset(client, documents):
    mixture = forebay.Mixture(
        {"a": documents, "b": client.dataset("others")}, {"a": 2, "b": 1}, stop="first"
    )
    packed = pack(mixture, separator=SEPARATOR)
    with make(packed, shuffle="block", block_rows=10) as loader:
        batches = list(loader)
    tokens = torch.cat([batch["tokens"][batch["_mask"]] for batch in batches])
    numbers = torch.cat([batch["_dataset"][batch["_mask"]] for batch in batches])
    ids = torch.cat([batch["_ids"][batch["_mask"]] for batch in batches])
    real = tokens != SEPARATOR
    assert torch.equal(tokens[real] // 10**6, numbers[real].to(torch.int32))
    assert torch.equal(tokens[real] % 10**6 // 1000, ids[real].to(torch.int32))
    with make(mixture, shuffle="block", block_rows=10) as loader:
        lists = [one for batch in loader for one in batch["tokens"] if len(one)]
    assert tokens.tolist() == [t for one in lists for t in [*one.tolist(), SEPARATOR]]


def test_torchdata_s_loader_goes_on_by_its_own_state(documents):
    def loader():
        stream = forebay.StreamingDataset(
            pack(documents), global_batch_size=8, shuffle="full", seed=5, include_ids=True
        )
        made = StatefulDataLoader(
            stream, batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        return stream, made

    _, first = loader()
    batches = iter(first)
    windows = [window for _ in range(5) for window in windows_of(next(batches))]
    state = first.state_dict()
    _, second = loader()
    second.load_state_dict(state)
    assert windows + [w for batch in second for w in windows_of(batch)] == expected(documents)
    stream, _ = loader()
    stream.load_state_dict(state)
    assert windows + [w for batch in stream for w in windows_of(batch)] == expected(documents)


def test_missing_lists_are_empty_documents(client, name):
    lists = [[1, 2, 3], None, [], [4], None, [5, 6]]
    schema = pa.schema({"tokens": pa.list_(pa.uint16())})
    with client.create_dataset(name, schema=schema) as writer:
        writer.write_table(pa.table({"tokens": lists}, schema=schema))
    dataset = client.dataset(name)
    assert dataset.total_length("tokens") == 6
    packed = forebay.Packed(dataset, length=4, separator=9)
    with make(packed, shuffle="none", include_ids=False) as loader:
        [batch] = loader
    assert batch["tokens"].tolist() == [[1, 2, 3, 9], [4, 9, 5, 6], [9, 0, 0, 0]]
    assert batch["_documents"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, -1, -1, -1]]
    assert batch["_mask"].sum() == 9


def test_a_state_of_other_packing_is_refused(documents, client):
    packed = pack(documents)
    _, state = read(packed, 1, steps=2)
    for other in (
        pack(documents, group_samples=10),
        pack(documents, separator=1),
        pack(client.dataset("others")),
    ):
        with make(other) as loader, pytest.raises(forebay.InvalidRequest, match="was taken"):
            loader.load_state_dict(state)
    with make(packed) as loader:
        with pytest.raises(forebay.InvalidRequest, match="elsewhere"):
            loader.load_state_dict({**state, "group": state["group"] + 1})
        with pytest.raises(forebay.InvalidRequest, match="numbers"):
            loader.load_state_dict({**state, "offset": -1})
        loader.load_state_dict(state)
    with make(documents) as loader, pytest.raises(forebay.InvalidRequest):
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("packing", "options", "error", "words"),
    [
        ({}, {"columns": ["number"]}, forebay.InvalidRequest, "alone"),
        (
            {},
            {"on_error": "mask"},
            forebay.InvalidRequest,
            "not for packed.*nothing would be exact",
        ),
        ({"separator": 1 << 40}, {}, forebay.InvalidRequest, "no int32"),
        ({"length": 0}, {}, forebay.InvalidRequest, "windows of 0"),
        ({"group_samples": 0}, {}, forebay.InvalidRequest, "group_samples"),
    ],
)
def test_what_cannot_be_packed_is_refused(documents, packing, options, error, words):
    with pytest.raises(error, match=words):
        make(pack(documents, **packing), **options)


def test_only_lists_of_numbers_are_packed(documents):
    with pytest.raises(forebay.SchemaMismatch, match="lists of numbers"):
        make(forebay.Packed(documents, "number"))
    with pytest.raises(forebay.InvalidRequest, match="packing takes"):
        forebay.Packed([1, 2])


def test_by_http_the_windows_are_the_same(daemon, documents, monkeypatch):
    monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    with forebay.connect(daemon.data) as client:
        assert read(pack(client.dataset("documents")), 2)[0] == expected(documents)


def test_the_daemon_has_a_plan_of_the_documents(daemon, documents):
    with make(pack(documents), include_ids=False) as loader, rpc_client(daemon) as rpc:
        batches = iter(loader)
        deadline = time.monotonic() + 20
        position = 0
        while not position and time.monotonic() < deadline:
            next(batches)  # there are more of them than it takes to leave the first group
            time.sleep(0.1)
            told = rpc.call(rpc.plans.ListPlans, messages.ListPlansRequest()).plans
            own = [plan for plan in told if "packed by 32" in plan.loader]
            position = max((plan.position for plan in own), default=0)
        assert position
        assert position % GROUP == 0
        assert loader.report().plan_problem == ""


def test_a_pickle_packs_the_same(documents):
    again = pickle.loads(pickle.dumps(pack(documents)))  # noqa: S301 - our own
    assert read(again, 1)[0] == expected(documents)


def test_a_loader_of_nothing_but_empty_documents_has_no_steps(client, name):
    with client.create_dataset(name, schema={"tokens": "list[int32]"}) as writer:
        for _ in range(5):
            writer.write(tokens=[])
    with make(pack(client.dataset(name))) as loader:
        assert (len(loader), [len(epoch) for epoch in loader.epochs(1)]) == (0, [0])
        assert np.array(list(loader)).size == 0


# --------------------------------------------------------------------------- columns side by side


@pytest.mark.parametrize("separator", [None, SEPARATOR])
@pytest.mark.parametrize("fit", ["cut", "best"])
def test_columns_are_packed_side_by_side(documents, separator, fit):
    beside = {"labels": -100, "weights": 0.25}
    packed = pack(documents, separator=separator, fit=fit, beside=beside)
    count = 0
    with make(packed) as loader, make(pack(documents, separator=separator, fit=fit)) as plain:
        for batch, alone in zip(loader, plain, strict=True):
            assert torch.equal(batch["tokens"], alone["tokens"])
            assert (batch["labels"].dtype, batch["weights"].dtype) == (torch.int64, torch.float32)
            real = batch["_mask"] & (batch["tokens"] != SEPARATOR)
            assert torch.equal(batch["labels"][real], -batch["tokens"][real].long())
            assert torch.equal(batch["weights"][real], batch["tokens"][real] / 2)
            assert (batch["labels"][~real] == -100).all()
            assert (batch["weights"][~real] == 0.25).all()
            count += int(real.sum())
    assert count == sum(map(length_of, range(NUM_DOCUMENTS)))


def test_a_mixture_packs_columns_side_by_side(client, documents):
    mixture = forebay.Mixture(
        {"a": documents, "b": client.dataset("others")}, sizes={"a": 9, "b": 9}
    )
    with make(pack(mixture, beside={"labels": 1}), columns=["tokens", "labels"]) as loader:
        for batch in loader:
            real = batch["_mask"]
            assert torch.equal(batch["labels"][real], -batch["tokens"][real].long())


def test_lists_of_other_lengths_are_named_by_their_row(client, name):
    with client.create_dataset(name, {"tokens": "list[int32]", "labels": "list[int32]"}) as writer:
        for row in range(10):
            writer.write(tokens=[1] * 3, labels=[1] * (3 if row != 6 else 4))
    packed = forebay.Packed(client.dataset(name), length=4, beside={"labels": 0})
    expected = r"'labels' .* beside 'tokens', and in row \(ids 6\) it has 4 elements for 3 tokens"
    with (
        make(packed, num_threads=0) as loader,
        pytest.raises(forebay.SchemaMismatch, match=expected),
    ):
        next(iter(loader))


# --------------------------------------------------------------------------------------- best fit


@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_best_fit_reads_every_token_once_from_any_topology(documents, separator):
    packed = pack(documents, fit="best", length=64, separator=separator)
    first, state = read(packed, 1, steps=3)
    second, state = read(packed, 3, steps=4, state=state, global_batch_size=5)
    third, _ = read(packed, 2, state=state, global_batch_size=13, last_batch="pad")
    whole, _ = read(packed, 1)
    assert first + second + third == whole
    expected = sorted(one for group in stream_of(documents, separator=separator) for one in group)
    assert sorted(token for window in whole for token in window) == expected
    for window in whole:
        for row in {row for row, _ in window}:
            own = [token for one, token in window if one == row]
            size = length_of(row) + (separator is not None)
            assert len(own) == size or size > 64


def test_best_fit_pads_less(documents):
    windows = {
        fit: len(read(pack(documents, fit=fit, length=128, group_samples=NUM_DOCUMENTS), 1)[0])
        for fit in ("cut", "best", "whole")
    }
    assert windows["cut"] <= windows["best"] <= windows["cut"] + 1
    assert windows["best"] < 0.85 * windows["whole"]


def test_a_state_of_best_fit_is_one_of_its_layout(documents):
    best = pack(documents, fit="best", length=64)
    _, state = read(best, 1, steps=2)
    assert (state["fit"], state["length"]) == ("best", 64)
    _, of_cut = read(pack(documents, length=64), 1, steps=2)
    for packed, given, words in (
        (pack(documents, fit="best", length=32), state, "length=64, this loader has 32"),
        (pack(documents, fit="best", length=64, tail="drop"), state, "tail="),
        (pack(documents, length=64), state, "format 2"),
        (best, of_cut, "format 1"),
    ):
        with make(packed) as loader, pytest.raises(forebay.InvalidRequest, match=words):
            loader.load_state_dict(given)


@pytest.mark.parametrize(
    ("beside", "error", "words"),
    [
        ({"labels": 0.5}, forebay.InvalidRequest, "no int64"),
        ({"number": 0}, forebay.SchemaMismatch, "lists of numbers"),
        ({"tokens": 0}, forebay.InvalidRequest, "beside itself"),
        ({"other": 0}, forebay.InvalidRequest, "no column 'other'"),
    ],
)
def test_what_cannot_be_packed_beside_is_refused(documents, beside, error, words):
    with pytest.raises(error, match=words):
        make(pack(documents, beside=beside))


def test_windows_that_pad_a_batch_are_empty(client, name):
    """A loss that leaves out what `beside` fills in counts nothing twice."""
    lists = pa.array([[1, 2, 3, 4, 5], [6, 7, 8]], pa.list_(pa.int32()))
    with client.create_dataset(name) as writer:
        writer.write_table(pa.table({"tokens": lists, "labels": lists}))
    packed = forebay.Packed(client.dataset(name), "tokens", 4, beside={"labels": -100}, pad=9)

    def shift(sample, rng):
        return {**sample, "moved": sample["labels"] + int(rng.integers(1, 2))}

    options = {"global_batch_size": 3, "last_batch": "pad", "include_ids": True}
    with forebay.DataLoader(packed, **options, transform=forebay.per_sample(shift)) as loader:
        (batch,) = loader
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [-100] * 4]
    assert batch["tokens"][2].tolist() == [9] * 4
    assert batch["_documents"].tolist() == [[0] * 4, [0, 1, 1, 1], [-1] * 4]
    assert batch["_positions"][2].tolist() == [0] * 4
    assert not batch["_mask"][2].any()
    assert batch["_mask"][:2].all()
