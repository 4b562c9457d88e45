"""The loader: the same global batches whatever the ranks, resumable at every batch, and tidy."""

import gc
import json
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch

import forebay
from forebay.testing import numbered as numbered_data
from forebay.testing.numbered import NUM_SAMPLES

GLOBAL = 24


def make(dataset, **options):
    options = {"global_batch_size": GLOBAL, "shuffle": "full", "seed": 5, **options}
    return forebay.DataLoader(dataset, columns=["number"], **options)


def real_numbers(batch) -> list[int]:
    mask = batch.get("_mask")
    numbers = batch["number"] if mask is None else batch["number"][mask]
    return numbers.tolist()


def global_batches(dataset, num_ranks, *, state=None, steps=None, **options):
    """Batches of all ranks joined, and the state after the last one."""
    loaders = [
        make(dataset, rank=rank, world_size=num_ranks, **options) for rank in range(num_ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    joined = []
    states = [loader.state_dict() for loader in loaders]
    for parts in zip(*(iter(loader) for loader in loaders), strict=True):
        if steps is not None and len(joined) == steps:
            break
        joined.append([number for part in parts for number in real_numbers(part)])
        states = [loader.state_dict() for loader in loaders]
    assert all(one == states[0] for one in states)
    for loader in loaders:
        loader.close()
    return joined, json.loads(json.dumps(states[0]))


def expected_batches(dataset, size=GLOBAL, **options):
    return numbered_data.expected_batches(dataset, size, seed=5, **options)


def loader_threads() -> int:
    return sum(thread.name.startswith("forebay-load") for thread in threading.enumerate())


# The order.


@pytest.mark.parametrize("last_batch", ["keep", "pad", "drop"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_number_of_ranks_sees_the_same_global_batches(train, num_ranks, last_batch):
    found, _ = global_batches(train, num_ranks, last_batch=last_batch)
    expected = expected_batches(train)
    assert found == (expected[:-1] if last_batch == "drop" else expected)


def test_each_epoch_holds_every_sample_once_in_another_order(train):
    with make(train) as loader:
        epochs = [[n for batch in epoch for n in real_numbers(batch)] for epoch in loader.epochs(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    assert epochs == [
        [n for batch in expected_batches(train, epoch=epoch) for n in batch] for epoch in range(3)
    ]


def test_no_shuffle_reads_in_order(numbered):
    with make(numbered, shuffle="none") as loader:
        assert [n for batch in loader for n in real_numbers(batch)] == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("num_threads", [0, 1, 4])
@pytest.mark.parametrize("prefetch_batches", [1, 9])
def test_threads_and_prefetching_do_not_change_the_order(train, num_threads, prefetch_batches):
    found, _ = global_batches(train, 2, num_threads=num_threads, prefetch_batches=prefetch_batches)
    assert found == expected_batches(train)


def test_a_batch_size_of_each_rank_makes_the_global_one(train):
    found, _ = global_batches(train, 3, global_batch_size=None, batch_size=8)
    assert found == expected_batches(train)


# Resuming.


@pytest.mark.parametrize("last_batch", ["keep", "pad"])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_interrupted_at_any_step_it_goes_on_with_other_ranks(train, before, after, last_batch):
    expected = expected_batches(train)
    for steps in range(len(expected)):
        first, state = global_batches(
            train, before, steps=steps, last_batch=last_batch, num_threads=0
        )
        second, _ = global_batches(train, after, state=state, last_batch=last_batch, num_threads=0)
        assert first + second == expected


def test_interrupted_twice_with_other_batch_sizes_nothing_repeats_or_is_missing(train):
    first, state = global_batches(train, 2, steps=2)
    second, state = global_batches(train, 3, steps=4, state=state, global_batch_size=7)
    third, _ = global_batches(train, 1, state=state, global_batch_size=50)
    position = 2 * GLOBAL
    assert second == expected_batches(train, 7, position=position)[:4]
    position += 4 * 7
    assert third == expected_batches(train, 50, position=position)
    seen = [n for batch in first + second + third for n in batch]
    assert seen == [n for batch in expected_batches(train) for n in batch]


def test_the_state_is_that_of_the_batch_handed_out_not_of_those_read_ahead(train):
    with make(train, prefetch_batches=8) as loader:
        assert loader.state_dict()["position"] == 0
        for step, _ in enumerate(loader):
            assert loader.state_dict()["position"] == min((step + 1) * GLOBAL, len(train))
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)


def test_epochs_go_on_inside_the_restored_one(train):
    with make(train) as loader:
        batches = iter(loader)
        next(batches)
        next(batches)
        state = loader.state_dict()
    with make(train) as loader:
        loader.load_state_dict(state)
        epochs = [(epoch.number, len(epoch), len(list(epoch))) for epoch in loader.epochs(3)]
        assert epochs == [(0, 6, 6), (1, 8, 8), (2, 8, 8)]
        assert list(loader.epochs(3)) == []


def test_restored_after_the_last_batch_the_epoch_is_empty_and_the_next_whole(train):
    with make(train) as loader:
        for _ in loader:
            state = loader.state_dict()
    with make(train) as loader:
        loader.load_state_dict(state)
        assert [len(list(epoch)) for epoch in loader.epochs(2)] == [0, 8]


def test_a_plain_iteration_after_the_last_batch_is_the_next_epoch(train):
    _, state = global_batches(train, 1)
    assert state["position"] == len(train)
    found, _ = global_batches(train, 2, state=state)
    assert found == expected_batches(train, epoch=1)


def test_an_epoch_left_early_counts_as_done(train):
    with make(train) as loader:
        for epoch in loader.epochs(2):
            for _ in epoch:
                break
            assert loader.state_dict()["position"] == GLOBAL
        assert loader.epoch == 2


def test_states_of_other_data_or_orders_are_refused_by_name(client, train, numbered, name):
    with client.create_dataset(name) as writer:
        for number in range(30):
            writer.write(number=number)
    state = make(train).state_dict()
    for other, options, message in [
        (client.dataset(name), {}, r"taken on dataset 'numbered' version 1"),
        (numbered, {}, r"another split"),
        (train, {"seed": 6}, r"seed=5"),
        (train, {"shuffle": "none"}, r"shuffle='full'"),
    ]:
        with pytest.raises(forebay.InvalidRequest, match=message):
            make(other, **options).load_state_dict(state)
    with pytest.raises(forebay.InvalidRequest, match="format"):
        make(train).load_state_dict({})
    with pytest.raises(forebay.InvalidRequest, match="a loader state is no NoneType"):
        make(train).load_state_dict(None)
    stream = forebay.StreamingDataset(train, global_batch_size=4)
    with pytest.raises(forebay.InvalidRequest, match="a loader state is no NoneType"):
        stream.load_state_dict(None)


# What a batch is.


def test_a_batch_is_a_plain_dict_of_tensors(numbered):
    with forebay.DataLoader(numbered, global_batch_size=10, include_ids=True) as loader:
        batch = next(iter(loader))
    assert type(batch) is dict
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape == (10, 16, 32)
    assert batch["half"].dtype == torch.float16
    assert batch["half"][3].tolist() == [3.0, -3.0]
    assert batch["even"].tolist() == [True, False] * 5
    assert batch["text"] == [f"sample {number}" for number in range(10)]
    assert [row.tolist() for row in batch["ragged"][:4]] == [[], [0], [0, 1], [0, 1, 2]]
    assert batch["_ids"].tolist() == list(range(10))
    assert "_mask" not in batch


def test_ids_are_rows_of_the_version(train):
    with make(train, include_ids=True) as loader:
        for batch in loader:
            assert batch["_ids"].tolist() == batch["number"].tolist()


def test_padding_has_equal_sizes_everywhere_and_is_masked(train):
    for rank in range(5):
        with make(train, rank=rank, world_size=5, last_batch="pad") as loader:
            batches = list(loader)
        assert {len(batch["number"]) for batch in batches} == {5}
        assert all(batch["_mask"].dtype == torch.bool for batch in batches)


def test_a_rank_may_get_an_empty_part_with_the_right_shape(numbered):
    with forebay.DataLoader(
        numbered, global_batch_size=NUM_SAMPLES - 1, rank=2, world_size=3
    ) as loader:
        *_, last = list(loader)
        assert len(loader) == 2
    assert last["image"].shape == (0, 16, 32)
    assert last["text"] == []


def test_transforms_run_in_the_prefetch_threads(train):
    seen = set()

    def transform(batch):
        seen.add(threading.current_thread().name.rpartition("_")[0])
        return {"double": batch["number"] * 2}

    with make(train, transform=transform) as loader:
        found = [n for batch in loader for n in batch["double"].tolist()]
    assert seen == {"forebay-load"}
    assert found == [2 * n for batch in expected_batches(train) for n in batch]


def test_tensors_are_put_on_the_device(numbered):
    with forebay.DataLoader(numbered, batch_size=4, device="meta") as loader:
        batch = next(iter(loader))
    assert batch["image"].device.type == "meta"
    assert batch["text"][0] == "sample 0"


# Errors, threads, reports.


class Broken(Exception):
    pass


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_reaches_the_training_loop_as_it_was_at_its_batch(train, num_threads):
    def transform(batch):
        if batch["number"].tolist() == expected_batches(train)[3]:
            raise Broken("third batch")
        return batch

    with make(train, transform=transform, num_threads=num_threads) as loader:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        with pytest.raises(Broken, match="third batch"):
            next(batches)
        assert loader.state_dict()["position"] == 3 * GLOBAL
        with pytest.raises(StopIteration):
            next(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": None}, "exactly one"),
        ({"batch_size": 4}, "exactly one"),
        ({"global_batch_size": 0}, "at least one"),
        ({"shuffle": "some"}, "shuffle"),
        ({"last_batch": "fill"}, "last_batch"),
        ({"num_threads": -1}, "num_threads"),
        ({"prefetch_batches": 0}, "prefetch_batches"),
    ],
)
def test_impossible_options_are_refused_at_once(train, options, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        make(train, **options)


def test_dropping_everything_is_refused(train):
    with pytest.raises(forebay.InvalidRequest, match="would drop all 169"):
        list(make(train, last_batch="drop", global_batch_size=170))


def test_a_rank_outside_the_world_is_refused(train):
    with pytest.raises(forebay.InvalidRequest, match="rank 2 of 2"):
        list(make(train, rank=2, world_size=2))


def test_something_else_than_a_dataset_is_refused():
    with pytest.raises(forebay.InvalidRequest, match="got list"):
        make([1, 2, 3])


def test_iterations_at_once_do_not_disturb_each_other(train):
    with make(train) as loader:
        pairs = [(real_numbers(a), real_numbers(b)) for a, b in zip(loader, loader, strict=True)]
    assert pairs == [(batch, batch) for batch in expected_batches(train)]


def test_the_loader_stands_where_the_iteration_that_began_last_stands(train):
    expected = expected_batches(train)
    with make(train) as loader:
        first = iter(loader)
        assert real_numbers(next(first)) == expected[0]
        second = iter(loader)
        assert real_numbers(next(first)) == expected[1]
        assert loader.state_dict()["position"] == 2 * GLOBAL
        assert real_numbers(next(second)) == expected[1]
        assert [real_numbers(batch) for batch in first] == expected[2:]
        state = loader.state_dict()
        assert (state["epoch"], state["position"]) == (0, 2 * GLOBAL)
        assert [real_numbers(batch) for batch in second] == expected[2:]
        assert loader.epoch == 1


@pytest.mark.parametrize("stop", ["load_state_dict", "set_epoch"])
def test_who_is_told_where_to_stand_ends_its_iterations(train, stop):
    with make(train) as loader:
        running, waiting = iter(loader), iter(loader)
        next(running)
        loader.set_epoch(2) if stop == "set_epoch" else loader.load_state_dict(loader.state_dict())
        for batches in running, waiting:
            with pytest.raises(forebay.InvalidRequest, match="iteration is over"):
                next(batches)


def test_an_early_break_goes_on_and_whoever_counts_the_batches_gets_the_next_epoch(train):
    """The second is what Lightning does: it never asks for the end of an epoch."""
    expected = expected_batches(train) + expected_batches(train, epoch=1)
    with make(train) as loader:
        found = [real_numbers(batch) for batch, _ in zip(loader, range(3), strict=False)][:3]
        # zip took a fourth batch from the loader before it saw that the numbers were over.
        batches = iter(loader)
        found += [expected[3], *(real_numbers(next(batches)) for _ in range(4))]
        batches = iter(loader)
        found += [real_numbers(next(batches)) for _ in range(8)]
    assert found == expected


def test_closing_ends_the_threads_and_the_iteration(train):
    loader = make(train)
    batches = iter(loader)
    next(batches)
    assert loader_threads() > 0
    loader.close()
    loader.close()
    assert loader_threads() == 0
    with pytest.raises(forebay.InvalidRequest):
        next(batches)
    with pytest.raises(forebay.InvalidRequest, match="closed"):
        next(iter(loader))


def test_a_forgotten_loader_ends_its_threads(train):
    loader = make(train)
    batches = iter(loader)
    next(batches)
    pool = loader._threads[1]
    gone = weakref.ref(loader)
    del loader, batches
    gc.collect()
    assert gone() is None
    pool.shutdown(wait=True)  # waits for what was told to end already
    assert loader_threads() == 0


def test_a_report_counts_samples_without_padding(train):
    with make(train, last_batch="pad") as loader:
        list(loader)
        report = loader.report()
    assert (report.samples, report.batches) == (169, 8)
    assert report.bytes_read == 8 * GLOBAL * 8
    assert 0 < report.wait_p50_seconds <= report.wait_p99_seconds
    assert "169 samples in 8 batches" in str(report)


RANK = """
import pickle, sys, forebay
dataset = pickle.load(sys.stdin.buffer)
with forebay.DataLoader(dataset, global_batch_size=24, shuffle="full", seed=5) as loader:
    for batch in loader:
        print(*batch["number"].tolist())
"""


def test_ranks_are_found_in_the_environment_of_each_process(train, warm_torch):
    parts = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "WORLD_SIZE": "2"}
        done = warm_torch.run(["-c", RANK], environment, given=pickle.dumps(train), check=True)
        parts.append([list(map(int, line.split())) for line in done.stdout.splitlines()])
    assert [a + b for a, b in zip(*parts, strict=True)] == expected_batches(train)


def test_random_rows_equal_what_was_written(numbered):
    with forebay.DataLoader(
        numbered, global_batch_size=64, shuffle="full", num_threads=4, include_ids=True
    ) as loader:
        for epoch in loader.epochs(3):
            for batch in epoch:
                ids = batch["_ids"].numpy()
                assert np.array_equal(batch["number"].numpy(), ids)
                assert np.array_equal(batch["image"][:, 0, 0].numpy(), ids % 256)
                assert batch["text"] == [f"sample {number}" for number in ids]
