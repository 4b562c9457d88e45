"""The block shuffle through both loaders: exact on any ranks, its lanes kept by the state."""

import itertools
import json

import numpy as np
import pytest
import torch.utils.data

import forebay
from forebay.testing.numbered import NUM_SAMPLES
from forebay_wire.blocks import BlockParameters, starts_of
from forebay_wire.order import Order

GLOBAL = 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_node(monkeypatch):
    for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def options_of(**changes):
    options = {"shuffle": "block", "window_blocks": 2, "seed": 5, "columns": ["number"]}
    size = {} if "batch_size" in changes else {"global_batch_size": GLOBAL}
    return {**options, **size, **changes}


def make(dataset, **options):
    return forebay.DataLoader(dataset, **options_of(**options))


def real_numbers(batch) -> list[int]:
    mask = batch.get("_mask")
    numbers = batch["number"] if mask is None else batch["number"][mask]
    return numbers.tolist()


def expected_batches(dataset, size=GLOBAL, *, lanes=1, rows=None, position=0, epoch=0):
    """The samples of each global batch, by definition, sorted: no loader runs."""
    counts = None if dataset.split else starts_of([one.num_rows for one in dataset.manifest.shards])
    layout = BlockParameters(2, rows or 0, lanes).layout(len(dataset), counts)
    order = Order(len(dataset), "block", 5, epoch, dataset.identity, layout)
    found = dataset.rows_at(order.between(position, len(dataset))).tolist()
    return [sorted(found[start : start + size]) for start in range(0, len(found), size)]


def global_batches(dataset, num_ranks, *, state=None, steps=None, **options):
    """Batches of all ranks joined and sorted, and the state after the last one."""
    loaders = [
        make(dataset, rank=rank, world_size=num_ranks, **options) for rank in range(num_ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    parts_of_all = zip(*(iter(loader) for loader in loaders), strict=True)
    joined = [
        sorted(number for part in parts for number in real_numbers(part))
        for parts in itertools.islice(parts_of_all, steps)
    ]
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(one == states[0] for one in states)
    for loader in loaders:
        loader.close()
    return joined, states[0]


@pytest.mark.parametrize("last_batch", ["keep", "pad", "drop"])
@pytest.mark.parametrize(("num_ranks", "lanes"), [(1, 1), (2, 4), (3, 2), (5, 3)])
def test_every_number_of_ranks_sees_the_same_global_batches(numbered, num_ranks, lanes, last_batch):
    found, _ = global_batches(numbered, num_ranks, lanes=lanes, last_batch=last_batch)
    expected = expected_batches(numbered, lanes=lanes)
    assert found == (expected[:-1] if last_batch == "drop" else expected)


def test_each_epoch_holds_every_sample_once_in_another_order(numbered):
    with make(numbered) as loader:
        epochs = [[n for batch in epoch for n in real_numbers(batch)] for epoch in loader.epochs(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(NUM_SAMPLES)) for epoch in epochs)


def test_over_changes_of_ranks_nodes_and_batch_sizes_nothing_repeats_or_is_missing(
    numbered, monkeypatch
):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # as many lanes as nodes, from now on
    first, state = global_batches(numbered, 6, steps=2)
    assert state["lanes"] == 3
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    second, state = global_batches(numbered, 2, steps=4, state=state, global_batch_size=7)
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    third, state = global_batches(numbered, 1, state=state, global_batch_size=50)
    assert (state["lanes"], state["epoch"], state["position"]) == (3, 1, 0)
    assert first == expected_batches(numbered, lanes=3)[:2]
    assert second == expected_batches(numbered, 7, lanes=3, position=2 * GLOBAL)[:4]
    assert third == expected_batches(numbered, 50, lanes=3, position=2 * GLOBAL + 4 * 7)


def test_lanes_are_the_nodes_that_torchrun_says(numbered, monkeypatch):
    def lanes_of(**options) -> int:
        return make(numbered, rank=0, world_size=8, **options).state_dict()["lanes"]

    assert lanes_of() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert lanes_of() == 2
    monkeypatch.setenv("GROUP_WORLD_SIZE", "16")
    assert lanes_of() == 8  # no more nodes than ranks
    assert lanes_of(lanes=5) == 5
    full = forebay.DataLoader(numbered, global_batch_size=8, shuffle="full", rank=0, world_size=8)
    assert full.state_dict()["lanes"] == 1
    monkeypatch.setenv("GROUP_WORLD_SIZE", "many")
    with pytest.raises(forebay.InvalidRequest, match="GROUP_WORLD_SIZE='many'"):
        lanes_of()


def test_ranks_of_different_lanes_read_different_shards(numbered):
    starts = [0, *itertools.accumulate(shard.num_rows for shard in numbered.manifest.shards)]
    shards = []
    for rank in range(2):
        with make(numbered, lanes=2, rank=rank, world_size=2, last_batch="drop") as loader:
            rows = [n for batch in loader for n in real_numbers(batch)]
        shards.append({sum(start <= row for start in starts) for row in rows})
    assert len(shards[0] & shards[1]) <= 1


def test_a_split_has_blocks_of_equal_size_or_none(train):
    with pytest.raises(forebay.InvalidRequest, match="block_rows"):
        make(train)
    found, state = global_batches(train, 2, block_rows=10, lanes=2)
    assert found == expected_batches(train, rows=10, lanes=2)
    assert (state["block_rows"], state["window_blocks"]) == (10, 2)


def test_a_stored_selection_has_what_it_chooses_of_each_shard_as_blocks(client, numbered):
    rows = [row for row in range(NUM_SAMPLES) if row % 5 != 2 and not 60 <= row < 110]
    numbered.define_selection("some", rows=rows)
    some = client.dataset("numbered", split="some")
    starts = starts_of([shard.num_rows for shard in numbered.manifest.shards])
    found, state = global_batches(some, 2, window_blocks=1)
    assert state["block_rows"] == 0
    assert sorted(number for batch in found for number in batch) == rows
    with make(some, window_blocks=1) as loader:
        read = [number for batch in loader for number in real_numbers(batch)]
    shards = (np.searchsorted(starts, read, side="right") - 1).tolist()
    visits = [shard for shard, _ in itertools.groupby(shards)]
    assert len(visits) == len(set(visits)) > 1  # one after the other, each whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_blocks": 0}, "window_blocks=0"),
        ({"block_rows": 0}, "block_rows=0"),
        ({"lanes": 0}, "lanes=0"),
        ({"shuffle": "full"}, 'belong to shuffle="block"'),
        ({"shuffle": "none", "window_blocks": None, "lanes": 2}, 'belong to shuffle="block"'),
    ],
)
def test_what_makes_no_blocks_is_refused(numbered, change, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        make(numbered, **change)


def test_states_of_other_blocks_are_refused_by_name(numbered):
    state = make(numbered, lanes=3).state_dict()
    for options, message in [
        ({"lanes": 2}, "lanes=3"),
        ({"window_blocks": 3}, "window_blocks=2"),
        ({"block_rows": 9}, "block_rows=None"),
        ({"shuffle": "full", "window_blocks": None}, "shuffle='block'"),
    ]:
        with pytest.raises(forebay.InvalidRequest, match=message):
            make(numbered, **options).load_state_dict(state)
    with make(numbered) as loader:
        loader.load_state_dict(state)
        assert loader.state_dict() == state


def test_a_state_from_before_there_were_blocks_is_still_read(numbered):
    options = {"shuffle": "full", "window_blocks": None}
    with make(numbered, **options) as loader:
        batches = [real_numbers(batch) for batch in loader]
        state = {**loader.state_dict(), "epoch": 0, "position": 3 * GLOBAL, "format": 1}
    for name in ("window_blocks", "block_rows", "lanes"):
        del state[name]
    with make(numbered, **options) as loader:
        loader.load_state_dict(state)
        assert [real_numbers(batch) for batch in loader] == batches[3:]


# Inside torch's own loader.


def torch_loader(streaming, num_workers, **options):
    method = "fork" if num_workers else None
    return torch.utils.data.DataLoader(
        streaming,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=method,
        **options,
    )


def test_restored_lanes_reach_workers_that_run_already(numbered):
    three = forebay.StreamingDataset(numbered, **options_of(lanes=3))
    batches = list(torch_loader(three, 0))
    state = three.state_dict(after=batches[3])
    streaming = forebay.StreamingDataset(numbered, **options_of())
    loader = torch_loader(streaming, 2, persistent_workers=True)
    assert [sorted(real_numbers(one)) for one in loader] == expected_batches(numbered)
    streaming.load_state_dict(state)
    rest = [real_numbers(batch) for batch in loader]
    assert rest == [real_numbers(batch) for batch in batches[4:]]
    assert [sorted(one) for one in rest] == expected_batches(numbered, lanes=3)[4:]
    assert streaming.state_dict(after=batches[5])["lanes"] == 3
