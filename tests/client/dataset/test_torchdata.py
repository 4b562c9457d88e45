"""Our dataset in torchdata's StatefulDataLoader: its own state is exact, and elastic with us."""

import itertools
import json

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

import forebay
from forebay.testing import numbered

GLOBAL = 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's
]


@pytest.fixture
def way() -> str:
    """One way of bytes is enough for what is about states."""
    return "local"


def stream(dataset, size: int = GLOBAL) -> forebay.StreamingDataset:
    return forebay.StreamingDataset(
        dataset, columns=["number"], global_batch_size=size, shuffle="full", seed=5
    )


def loader(dataset, num_workers: int, **options):
    return StatefulDataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        **options,
    )


def numbers(batches) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def expected_batches(dataset, size=GLOBAL, **options):
    return numbered.expected_batches(dataset, size, seed=5, **options)


def interrupted(dataset, num_workers: int, steps: int, **options):
    """The first *steps* batches, and the loader's state after them."""
    made = loader(stream(dataset), num_workers, **options)
    batches = iter(made)
    found = numbers(itertools.islice(batches, steps))
    return found, made.state_dict()


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_the_loaders_own_state_goes_on_at_every_step(train, num_workers, persistent):
    expected = expected_batches(train)
    steps_of_all = range(len(expected)) if not num_workers else [0, 1, 4, 7]
    for steps in steps_of_all:
        first, state = interrupted(train, num_workers, steps, persistent_workers=persistent)
        later = loader(stream(train), num_workers, persistent_workers=persistent)
        later.load_state_dict(state)
        assert first + numbers(later) == expected
        assert numbers(later) == expected_batches(train, epoch=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_at_the_end_of_an_epoch_begins_the_next(train, num_workers):
    made = loader(stream(train), num_workers)
    assert numbers(made) == expected_batches(train)
    later = loader(stream(train), num_workers)
    later.load_state_dict(made.state_dict())
    assert numbers(later) == expected_batches(train, epoch=1)
    assert numbers(later) == expected_batches(train, epoch=2)


@pytest.mark.parametrize(
    ("before", "options"), [(0, {}), (2, {}), (2, {"snapshot_every_n_steps": 3})]
)
def test_its_state_is_taken_by_the_dataset_on_other_workers_and_batches(train, before, options):
    for steps in (1, 4, 5) if before else (0, 3):
        first, state = interrupted(train, before, steps, **options)
        assert first == expected_batches(train)[:steps]
        streaming = stream(train, size=10)
        streaming.load_state_dict(json.loads(json.dumps(state)))
        position = steps * GLOBAL
        found = numbers(loader(streaming, 1))
        assert found == expected_batches(train, 10, position=position)


def test_its_state_on_another_batch_size_is_refused_with_the_way_out(train):
    _, state = interrupted(train, 0, 3)
    later = loader(stream(train, size=10), 0)
    later.load_state_dict(state)
    with pytest.raises(forebay.InvalidRequest, match=r"StreamingDataset\.load_state_dict"):
        iter(later)


def test_the_state_of_a_loader_over_something_else_is_refused(train):
    other = StatefulDataLoader(list(range(4)), batch_size=None)
    next(iter(other))
    with pytest.raises(forebay.InvalidRequest, match="not of one around a StreamingDataset"):
        stream(train).load_state_dict(other.state_dict())


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_the_lanes_of_its_state_are_those_of_the_batches_after_it(train, num_workers, persistent):
    """Also where the parent's part of the dataset would have chosen others by itself."""
    blocks = {"shuffle": "block", "block_rows": 10, "window_blocks": 3, "seed": 5}

    def made(**more):
        return forebay.StreamingDataset(
            train, columns=["number"], global_batch_size=GLOBAL, **blocks, **more
        )

    wanted = numbers(loader(made(lanes=4), num_workers))
    first = loader(made(lanes=4), num_workers)
    list(itertools.islice(first, 2))
    state = first.state_dict()
    dataset = made()  # one node: one lane
    assert dataset.state_dict()["lanes"] == 1
    second = loader(dataset, num_workers, persistent_workers=persistent)
    second.load_state_dict(state)
    batches = list(itertools.islice(second, 2))
    assert numbers(batches) == wanted[2:4]
    after = json.loads(json.dumps(dataset.state_dict(after=batches[-1])))
    assert after["lanes"] == 4
    third = made()
    third.load_state_dict(after)
    assert numbers(loader(third, num_workers)) == wanted[4:]
