"""The same batches through torch's own DataLoader: any workers, any start method, any resume."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.utils.data

import forebay
from forebay.testing import numbered as numbered_data

GLOBAL = 24
START_METHODS = ["fork", "forkserver", "spawn"]

pytestmark = [
    # Workers are forked beside threads on purpose, and more of them than there are cores.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def stream(dataset, **options) -> forebay.StreamingDataset:
    options = {"global_batch_size": GLOBAL, "shuffle": "full", "seed": 5, **options}
    return forebay.StreamingDataset(dataset, columns=["number"], **options)


def torch_loader(streaming, num_workers: int, method: str = "fork", **options):
    return torch.utils.data.DataLoader(
        streaming,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=method if num_workers else None,
        **options,
    )


def real_numbers(batch) -> list[int]:
    mask = batch.get("_mask")
    numbers = batch["number"] if mask is None else batch["number"][mask]
    return numbers.tolist()


def expected_batches(dataset, size=GLOBAL, **options):
    return numbered_data.expected_batches(dataset, size, seed=5, **options)


def read_ranks(dataset, num_ranks, num_workers, *, state=None, steps=None, **options):
    """Global batches through *num_ranks* loaders, and the state after the last one."""
    streams = [
        stream(dataset, rank=rank, world_size=num_ranks, **options) for rank in range(num_ranks)
    ]
    for one in streams:
        if state is not None:
            one.load_state_dict(state)
    joined = []
    loaders = [iter(torch_loader(one, num_workers)) for one in streams]
    for parts in itertools.islice(zip(*loaders, strict=True), steps):
        joined.append([number for part in parts for number in real_numbers(part)])
        states = [one.state_dict(after=part) for one, part in zip(streams, parts, strict=True)]
        assert all(one == states[0] for one in states)
        state = states[0]
    return joined, state


@pytest.mark.parametrize("last_batch", ["keep", "pad", "drop"])
@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 1)])
def test_every_topology_gives_the_same_global_batches(train, num_ranks, num_workers, last_batch):
    found, _ = read_ranks(train, num_ranks, num_workers, last_batch=last_batch)
    expected = expected_batches(train)
    assert found == (expected[:-1] if last_batch == "drop" else expected)


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_more_ranks_and_workers_give_the_same_global_batches_too(train, num_ranks, num_workers):
    assert read_ranks(train, num_ranks, num_workers)[0] == expected_batches(train)


@pytest.mark.parametrize(("before", "after"), [((2, 0), (3, 0)), ((1, 0), (2, 0))])
def test_interrupted_at_every_step_it_goes_on_with_other_ranks(train, before, after):
    expected = expected_batches(train)
    for steps in range(1, len(expected)):
        first, state = read_ranks(train, *before, steps=steps)
        second, _ = read_ranks(train, *after, state=state)
        assert first + second == expected


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [((1, 2), (2, 1), 3), ((2, 1), (1, 0), 5), ((1, 0), (1, 2), 2), ((2, 2), (1, 1), 7)],
)
def test_interrupted_beside_workers_it_goes_on_with_others(train, before, after, steps):
    first, state = read_ranks(train, *before, steps=steps)
    second, _ = read_ranks(train, *after, state=state)
    assert first + second == expected_batches(train)


def test_a_changed_batch_size_goes_on_at_the_very_sample(train):
    _first, state = read_ranks(train, 1, 0, steps=3)
    second, _ = read_ranks(train, 2, 0, state=state, global_batch_size=10)
    assert second == expected_batches(train, 10, position=3 * GLOBAL)


def test_it_exchanges_states_with_the_loader(train):
    _, state = read_ranks(train, 1, 0, steps=3)
    with forebay.DataLoader(
        train, global_batch_size=GLOBAL, shuffle="full", seed=5, columns=["number"]
    ) as loader:
        loader.load_state_dict(state)
        assert [real_numbers(batch) for batch in loader] == expected_batches(train)[3:]


def numbers(batches) -> list[list[int]]:
    return [real_numbers(batch) for batch in batches]


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (1, False), (2, True)])
def test_each_iteration_is_an_epoch_however_early_one_was_left(train, num_workers, persistent):
    streaming = stream(train)
    loader = torch_loader(streaming, num_workers, persistent_workers=persistent)
    assert numbers(loader) == expected_batches(train)
    for batch in loader:
        assert real_numbers(batch) == expected_batches(train, epoch=1)[0]
        break
    assert numbers(loader) == expected_batches(train, epoch=2)
    state = streaming.state_dict(after=batch)
    streaming.load_state_dict(state)
    assert numbers(loader) == expected_batches(train, epoch=1)[1:]
    assert numbers(loader) == expected_batches(train, epoch=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterations_at_once_are_epochs_of_their_own(train, num_workers):
    loader = torch_loader(stream(train), num_workers)
    found = [(real_numbers(a), real_numbers(b)) for a, b in zip(loader, loader, strict=True)]
    assert sorted(map(list, zip(*found, strict=True))) == sorted(
        [expected_batches(train), expected_batches(train, epoch=1)]
    )


def test_after_the_last_batch_the_next_epoch_comes(train):
    streaming = stream(train)
    *_, last = torch_loader(streaming, 0)
    streaming.load_state_dict(streaming.state_dict(after=last))
    assert numbers(torch_loader(streaming, 1)) == expected_batches(train, epoch=1)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_new_epoch_and_a_restored_position_reach_the_workers(train, persistent):
    streaming = stream(train)
    loader = torch_loader(streaming, 2, persistent_workers=persistent)
    assert [real_numbers(batch) for batch in loader] == expected_batches(train)
    streaming.set_epoch(4)
    batches = list(loader)
    assert [real_numbers(batch) for batch in batches] == expected_batches(train, epoch=4)
    streaming.load_state_dict(streaming.state_dict(after=batches[5]))
    assert [real_numbers(batch) for batch in loader] == expected_batches(train, epoch=4)[6:]


def test_the_parents_state_beside_workers_raises_instead_of_guessing(train):
    streaming = stream(train)
    assert streaming.state_dict()["position"] == 0
    batches = iter(torch_loader(streaming, 1))
    batch = next(batches)
    with pytest.raises(forebay.InvalidRequest, match=r"state_dict\(after=batch\)"):
        streaming.state_dict()
    assert streaming.state_dict(after=batch)["position"] == GLOBAL


def test_without_workers_the_state_is_that_of_the_batch_handed_out(train):
    streaming = stream(train)
    for step, batch in enumerate(torch_loader(streaming, 0)):
        assert streaming.state_dict() == streaming.state_dict(after=batch)
        assert streaming.state_dict()["position"] == min((step + 1) * GLOBAL, len(train))


@pytest.mark.parametrize("batch", [{}, {"_position": 3}, {"_position": torch.zeros(3)}])
def test_a_batch_without_its_position_is_refused(train, batch):
    with pytest.raises(forebay.InvalidRequest, match="_position"):
        stream(train).state_dict(after=batch)


def test_the_length_is_that_of_a_whole_epoch(train):
    assert len(stream(train)) == len(torch_loader(stream(train), 0)) == 8


def test_an_error_in_a_worker_reaches_the_training_loop(train):
    def transform(batch):
        raise ZeroDivisionError("in a worker")

    with pytest.raises(ZeroDivisionError, match="in a worker"):
        next(iter(torch_loader(stream(train, transform=transform), 1)))


def test_a_transform_may_return_a_new_batch(train):
    streaming = stream(train, transform=lambda batch: {"double": 2 * batch["number"]})
    batch = next(iter(torch_loader(streaming, 0)))
    assert batch["double"].tolist() == [2 * n for n in expected_batches(train)[0]]
    assert streaming.state_dict(after=batch)["position"] == GLOBAL


# Workers beside a busy client.


def check_workers(client, train, method: str, num_workers: int, rounds: int) -> None:
    """Start *rounds* times *num_workers* workers while gRPC and a loader's threads are at work."""
    stop = threading.Event()
    calls = []

    def keep_calling():
        while not stop.is_set():
            calls.append(client.status().num_datasets)

    def keep_loading():
        with forebay.DataLoader(train, global_batch_size=16, shuffle="full", seed=1) as loader:
            for epoch in itertools.count():
                loader.set_epoch(epoch)
                for _ in loader:
                    if stop.is_set():
                        return

    busy = [threading.Thread(target=work) for work in (keep_calling, keep_loading)]
    for thread in busy:
        thread.start()
    try:
        for _ in range(rounds):
            loader = torch_loader(stream(train), num_workers, method, timeout=60)
            assert [real_numbers(batch) for batch in loader] == expected_batches(train)
    finally:
        stop.set()
        for thread in busy:
            thread.join(60)
    assert not any(thread.is_alive() for thread in busy)
    assert len(calls) > rounds


@pytest.mark.parametrize(
    ("way", "method"),
    [
        ("local", "fork"),
        ("remote", "fork"),
        ("local", "forkserver"),
        ("remote", "spawn"),
        pytest.param("remote", "forkserver", marks=pytest.mark.slow),
        pytest.param("local", "spawn", marks=pytest.mark.slow),
    ],
    indirect=["way"],
)
def test_workers_read_beside_a_busy_client(client, train, method):
    check_workers(client, train, method, num_workers=2, rounds=5 if method == "fork" else 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", START_METHODS)
def test_1000_workers_read_beside_a_busy_client(client, train, method):
    """In waves of four: a thousand live at once do not fit into 24 GiB."""
    check_workers(client, train, method, num_workers=4, rounds=250)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_1000_workers_of_a_forkserver_that_has_torch_loaded(daemon, train):
    """Forty at a time, each a child of fork of a process that has no thread and no connection."""
    many = [str(Path(__file__).with_name("many_workers.py")), str(daemon.data), train.name]
    done = subprocess.run(
        [sys.executable, *many, "40", "25"], capture_output=True, text=True, timeout=1700
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1000"), done.stderr
