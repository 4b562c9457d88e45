"""A dataset in torch's loaders that follows: workers, their states, and the parent agree."""

import itertools
import json

import pytest
import torch
import torch.utils.data
from torchdata.stateful_dataloader import StatefulDataLoader

import forebay
from forebay.testing import numbered

GLOBAL = 8
START = 21

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's
]


@pytest.fixture
def way() -> str:
    """One way of bytes."""
    return "local"


def append(client, name: str, count: int = 6) -> None:
    """The next numbers, as a new version; the first one if there is none."""
    exists = name in client.datasets()
    start = len(client.dataset(name)) if exists else 0
    schema = {"number": "int64", "text": "string"}
    with client.append_dataset(name) if exists else client.create_dataset(name, schema) as writer:
        for number in range(start, start + count):
            writer.write(number=number, text=f"sample {number}")


@pytest.fixture
def dataset(client, name):
    append(client, name, START)
    return client.dataset(name)


def stream(dataset, **options):
    options = {"global_batch_size": GLOBAL, "shuffle": "full", "seed": 5, **options}
    return forebay.StreamingDataset(dataset, follow="latest", **options)


def numbers(batches) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def joined(parts) -> list[list[int]]:
    """Global batches of what each rank read."""
    return [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]


def expected(client, name, version, epoch, **options) -> list[list[int]]:
    dataset = client.dataset(name, version)
    return numbered.expected_batches(dataset, GLOBAL, seed=5, epoch=epoch, **options)


def torch_loader(streaming, num_workers: int, method: str = "fork", **options):
    return torch.utils.data.DataLoader(
        streaming,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=method if num_workers else None,
        **options,
    )


@pytest.mark.parametrize(
    ("num_workers", "method", "persistent"),
    [
        (0, "fork", False),
        (2, "fork", True),
        pytest.param(2, "fork", False, marks=pytest.mark.slow),
        pytest.param(2, "spawn", False, marks=pytest.mark.slow),
        pytest.param(1, "spawn", True, marks=pytest.mark.slow),
        pytest.param(2, "spawn", True, marks=pytest.mark.slow),
        pytest.param(3, "forkserver", True, marks=pytest.mark.slow),
        pytest.param(2, "forkserver", False, marks=pytest.mark.slow),
    ],
)
def test_workers_move_on_together(client, name, dataset, num_workers, method, persistent):
    streaming = stream(dataset)
    loader = torch_loader(streaming, num_workers, method, persistent_workers=persistent)
    saved = None
    for epoch in range(3):
        version = epoch + 1
        wanted, found = expected(client, name, version, epoch), []
        for batch in loader:
            found.append(batch["number"].tolist())
            state = streaming.state_dict(after=batch)
            assert state["version"] == version
            if len(found) == 1:
                append(client, name)
            if (epoch, len(found)) == (1, 2):
                saved = state
        assert found == wanted
        assert streaming.report().reads == f"{name} v{version}"
    # Restored in the same loader: workers that live already have to go back to version 2.
    streaming.load_state_dict(saved)
    assert numbers(loader) == expected(client, name, 2, 1, position=2 * GLOBAL)
    # Epoch 2 of this loader has been read before, on version 3: it stays what it was.
    assert numbers(loader) == expected(client, name, 3, 2)
    assert numbers(loader) == expected(client, name, 4, 3)


def test_a_restored_epoch_is_known_however_many_came_since(client, name, dataset):
    first = stream(dataset)
    state = first.state_dict(after=next(iter(first)))
    append(client, name)
    streaming = stream(client.dataset(name))
    streaming.load_state_dict(state)
    batches = {}
    for epoch in range(5):
        for batch in streaming:
            batches[epoch] = batch
        append(client, name)
    versions = [streaming.state_dict(after=batches[epoch])["version"] for epoch in range(5)]
    assert versions == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(("num_workers", "steps"), [(0, 2), (2, 1), (2, 2)])
def test_the_state_of_a_stateful_loader_stays_on_the_version(
    client, name, dataset, num_workers, steps
):
    def loader(dataset):
        return StatefulDataLoader(
            stream(dataset),
            batch_size=None,
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
        )

    made = loader(dataset)
    assert numbers(made) == expected(client, name, 1, 0)
    append(client, name)
    batches = iter(made)
    head = numbers(itertools.islice(batches, steps))
    state = made.state_dict()
    append(client, name)
    again = loader(client.dataset(name))
    again.load_state_dict(state)
    assert head + numbers(again) == expected(client, name, 2, 1)
    assert numbers(again) == expected(client, name, 3, 2)
    other = stream(client.dataset(name))
    other.load_state_dict(state)
    assert numbers(other) == expected(client, name, 2, 1, position=steps * GLOBAL)
    assert numbers(other) == expected(client, name, 3, 2)


def test_workers_of_several_ranks_agree_by_the_name_of_their_run(client, name, dataset):
    ranks = [stream(dataset, rank=rank, world_size=2, run=name) for rank in range(2)]
    for epoch in range(2):
        parts = []
        for one in ranks:
            parts.append(numbers(torch_loader(one, 1)))
            append(client, name)
        assert joined(parts) == expected(client, name, 1 + 2 * epoch, epoch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_parent_knows_the_version_that_workers_restored(client, name, dataset, num_workers):
    def loader(dataset):
        streaming = stream(dataset)
        method = "fork" if num_workers else None
        return streaming, StatefulDataLoader(
            streaming, batch_size=None, num_workers=num_workers, multiprocessing_context=method
        )

    _, first = loader(dataset)
    batches = iter(first)
    next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    append(client, name)
    streaming, again = loader(client.dataset(name))
    again.load_state_dict(state)
    batch = next(iter(again))
    assert streaming.report().reads == f"{name} v1"
    place = json.loads(json.dumps(streaming.state_dict(after=batch)))
    assert (place["version"], place["epoch"], place["position"]) == (1, 0, 2 * GLOBAL)
    other = stream(client.dataset(name))
    other.load_state_dict(place)
    assert numbers(other) == expected(client, name, 1, 0, position=2 * GLOBAL)


def test_an_epoch_that_is_begun_anew_is_decided_anew_by_workers_too(client, name, dataset):
    first = stream(dataset)
    start = first.state_dict()
    middle = first.state_dict(after=next(iter(first)))
    streaming = stream(dataset)
    loader = torch_loader(streaming, 2, persistent_workers=True)
    streaming.load_state_dict(middle)
    assert numbers(loader) == expected(client, name, 1, 0, position=GLOBAL)
    append(client, name)
    streaming.load_state_dict(start)
    found = list(loader)
    assert numbers(found) == expected(client, name, 2, 0)
    assert {streaming.state_dict(after=batch)["version"] for batch in found} == {2}
    assert streaming.report().reads == f"{name} v2"


def test_a_batch_of_other_datasets_is_refused(client, name, dataset):
    batch = next(iter(forebay.StreamingDataset(dataset, global_batch_size=GLOBAL)))
    with pytest.raises(forebay.InvalidRequest, match="came from this dataset"):
        stream(dataset).state_dict(after=batch)


def test_an_iteration_never_mixes_versions_though_its_epoch_is_begun_anew(client, name, dataset):
    first = stream(dataset)
    start, middle = first.state_dict(), first.state_dict(after=next(iter(first)))
    streaming = stream(dataset)
    streaming.load_state_dict(middle)
    running, idle = iter(streaming), None
    found = [next(running)]
    append(client, name)
    streaming.load_state_dict(middle)
    idle = iter(streaming)
    streaming.load_state_dict(start)
    assert numbers(streaming) == expected(client, name, 2, 0)
    found += running
    assert numbers(found) == expected(client, name, 1, 0, position=GLOBAL)
    assert {streaming.state_dict(after=batch)["version"] for batch in found} == {1}
    with pytest.raises(forebay.InvalidRequest, match="begun anew, on another version"):
        next(idle)
