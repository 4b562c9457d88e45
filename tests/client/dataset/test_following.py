"""A loader that follows its dataset: an epoch stays on its version, the next one moves on."""

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import forebay
from forebay.testing import numbered
from forebay.transfer.local import LocalTransfer

GLOBAL = 8
START = 21

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's
]


@pytest.fixture
def way() -> str:
    """One way of bytes, unless a test says otherwise."""
    return "local"


def append(client, name: str, count: int = 6) -> None:
    """The next numbers, as a new version; the first one if there is none."""
    exists = name in client.datasets()
    start = len(client.dataset(name)) if exists else 0
    writer = (
        client.append_dataset(name)
        if exists
        else client.create_dataset(name, {"number": "int64", "text": "string"})
    )
    with writer:
        for number in range(start, start + count):
            writer.write(number=number, text=f"sample {number}")


@pytest.fixture
def dataset(client, name):
    append(client, name, START)
    return client.dataset(name)


def make(dataset, **options):
    options = {"global_batch_size": GLOBAL, "shuffle": "full", "seed": 5, **options}
    return forebay.DataLoader(dataset, follow="latest", **options)


def stream(dataset, **options):
    options = {"global_batch_size": GLOBAL, "shuffle": "full", "seed": 5, **options}
    return forebay.StreamingDataset(dataset, follow="latest", **options)


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def joined(parts) -> list[list[int]]:
    """Global batches of what each rank read."""
    return [flat(batch) for batch in zip(*parts, strict=True)]


def numbers(batches) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def expected(client, name, version, epoch, **options) -> list[list[int]]:
    dataset = client.dataset(name, version, options.pop("split", None))
    return numbered.expected_batches(dataset, GLOBAL, seed=5, epoch=epoch, **options)


# One rank.


@pytest.mark.parametrize("network", ["local", "remote"])
def test_each_epoch_reads_the_newest_version_and_stays_on_it(
    daemon, name, network, monkeypatch, dataset
):
    if network == "remote":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    with forebay.connect(daemon.data) as client, make(client.dataset(name)) as loader:
        for epoch in loader.epochs(3):
            version = epoch.number + 1
            wanted = expected(client, name, version, epoch.number)
            assert len(epoch) == loader.remaining_steps() == len(wanted)
            found = []
            for batch in epoch:
                if not found:
                    append(client, name)  # under way
                found.append(batch["number"].tolist())
                assert loader.state_dict()["version"] == version
                assert loader.dataset.version == version
                assert loader.report().reads == f"{name} v{version}"
            assert found == wanted
        assert f"MB read of {name} v3" in str(loader.report())


def test_without_follow_it_stays_on_its_version(client, name, dataset):
    with forebay.DataLoader(dataset, global_batch_size=GLOBAL) as loader:
        for epoch in loader.epochs(2):
            assert flat(numbers(epoch)) == list(range(START))
            append(client, name)


def test_a_state_goes_on_inside_its_version_then_moves_on(client, name, dataset):
    with make(dataset) as loader:
        list(loader)
        append(client, name)  # version 2
        batches = iter(loader)
        head = numbers(itertools.islice(batches, 2))
        state = json.loads(json.dumps(loader.state_dict()))
    append(client, name)  # version 3
    ranks = [
        make(client.dataset(name), global_batch_size=5, rank=rank, world_size=3, run=name)
        for rank in range(3)
    ]
    for one in ranks:
        one.load_state_dict(state)
        assert one.dataset.version == 2
    parts = [numbers(one) for one in ranks]
    assert flat(head) + flat(joined(parts)) == flat(expected(client, name, 2, 1))
    after = [numbers(one) for one in ranks]
    for one in ranks:
        assert one.dataset.version == 3
        one.close()
    assert flat(joined(after)) == flat(expected(client, name, 3, 2))


def test_a_state_between_two_epochs_begins_the_next_one_on_the_newest_version(
    client, name, dataset
):
    with make(dataset) as loader:
        list(loader)
        state = loader.state_dict()
    assert (state["epoch"], state["position"], state["version"]) == (1, 0, 1)
    append(client, name)
    with make(client.dataset(name, 1)) as loader:
        loader.load_state_dict(state)
        assert numbers(loader) == expected(client, name, 2, 1)
    with forebay.DataLoader(
        client.dataset(name, 1), global_batch_size=GLOBAL, shuffle="full", seed=5
    ) as loader:  # one that does not follow goes on with it, too
        loader.load_state_dict(state)
        assert numbers(loader) == expected(client, name, 1, 1)


def test_between_two_epochs_all_ranks_have_the_same_state_whoever_began_first(
    client, name, dataset
):
    ranks = [make(dataset, rank=rank, world_size=2, run=name) for rank in range(2)]
    for one in ranks:
        list(one)
    append(client, name)
    assert ranks[0].remaining_steps() == len(expected(client, name, 2, 1))  # decides the epoch
    assert ranks[0].state_dict() == ranks[1].state_dict()
    assert ranks[0].state_dict()["version"] == 1
    for one in ranks:
        one.close()


def test_iterations_at_once_have_a_version_each(client, name, dataset):
    with make(dataset) as loader:
        first = iter(loader)
        found = [next(first)["number"].tolist()]
        append(client, name)
        loader_epoch_1 = make(dataset)
        loader_epoch_1.set_epoch(1)
        found_1 = numbers(loader_epoch_1)
        found += numbers(first)
        loader_epoch_1.close()
    assert found == expected(client, name, 1, 0)
    assert found_1 == expected(client, name, 2, 1)


def test_the_daemons_plan_moves_on_too(client, name, dataset):
    def planned() -> set[str]:
        status = client.status()
        return {plan.dataset for plan in status.plans if plan.dataset.startswith(f"{name}@")}

    def wait_for(wanted: set[str]) -> None:
        deadline = time.monotonic() + 30
        while planned() != wanted:
            assert time.monotonic() < deadline, planned()
            time.sleep(0.02)

    with make(dataset) as loader:
        for epoch in loader.epochs(2):
            for number, _ in enumerate(epoch):
                if number == 1:
                    wait_for({f"{name}@{epoch.number + 1}"})
            append(client, name)
            # Which version the next epoch has is not known: nothing is planned of the old one.
            assert {
                plan.epoch for plan in client.status().plans if plan.dataset.startswith(name)
            } == {epoch.number}
    wait_for(set())
    streaming = stream(dataset)
    for epoch in range(2):
        for number, _ in enumerate(streaming):
            if number == 1:
                wait_for({f"{name}@{epoch + 3}"})
        append(client, name)


# Several ranks.


@pytest.mark.parametrize("num_ranks", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_ranks_agree_whenever_each_of_them_begins_an_epoch(client, name, dataset, num_ranks):
    ranks = [
        make(client.dataset(name), rank=rank, world_size=num_ranks, run=name)
        for rank in range(num_ranks)
    ]
    for epoch in range(3):
        version = len(client.describe_dataset(name).versions)
        parts = []
        for one in ranks if epoch % 2 else reversed(ranks):
            parts.append(numbers(one))  # the whole epoch, before the others begin
            append(client, name, 3)
        parts = parts if epoch % 2 else parts[::-1]
        assert joined(parts) == expected(client, name, version, epoch)
    for one in ranks:
        one.close()


def test_ranks_agree_though_they_opened_different_versions(client, name, dataset):
    append(client, name)
    ranks = [
        make(client.dataset(name, 2 - rank), rank=rank, world_size=2, run=name) for rank in range(2)
    ]
    parts = [numbers(one) for one in reversed(ranks)][::-1]
    assert joined(parts) == expected(client, name, 2, 0)
    for one in ranks:
        one.close()


def test_threads_that_begin_an_epoch_while_versions_come_agree(client, name, dataset):
    ranks = [make(dataset, rank=rank, world_size=3, run=name, num_threads=0) for rank in range(3)]
    found: list[dict[int, list]] = [{} for _ in ranks]

    def read(rank: int) -> None:
        for epoch in ranks[rank].epochs(4):
            found[rank][epoch.number] = numbers(epoch)

    run_beside(lambda: append(client, name, 1), [partial(read, rank) for rank in range(3)])
    sizes = {
        version.num_rows: version.version for version in client.describe_dataset(name).versions
    }
    for epoch in range(4):
        parts = [one[epoch] for one in found]
        version = sizes[len(flat(joined(parts)))]
        assert joined(parts) == expected(client, name, version, epoch)
    for one in ranks:
        one.close()


def run_beside(grow, jobs) -> None:
    """All *jobs* at once, while something calls *grow* again and again."""
    over = threading.Event()

    def grow_on() -> None:
        while not over.is_set():
            grow()

    growing = threading.Thread(target=grow_on)
    readers = [threading.Thread(target=job) for job in jobs]
    growing.start()
    try:
        for one in readers:
            one.start()
        for one in readers:
            one.join(60)
    finally:
        over.set()
        growing.join(60)


def run_ranks(daemon, client, name, folder: Path, workers: list[int], num_epochs: int) -> list:
    """What a job of one process a rank read, while something is appended after rank 0 began each
    epoch and before the others did."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = str(Path(__file__).parent / "following_rank.py")
    ranks = []
    for rank, num_workers in enumerate(workers):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(workers)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        arguments = [str(daemon.data), name, str(folder), str(num_workers), str(num_epochs)]
        with (folder / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, program, *arguments]
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)
            )
    try:
        for epoch in range(num_epochs):
            while not (folder / f"begun {epoch}").exists():
                assert all(process.poll() in (None, 0) for process in ranks), logs(folder)
                time.sleep(0.01)
            append(client, name)
            (folder / f"appended {epoch}").touch()
        printed = [process.communicate(timeout=120)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * len(ranks), logs(folder)
    return [json.loads(text.splitlines()[-1]) for text in printed]


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in folder.glob("rank*.log"))


@pytest.mark.timeout(150)
def test_processes_with_threads_and_workers_agree_by_their_process_group(
    daemon, client, name, dataset, tmp_path
):
    found = run_ranks(daemon, client, name, tmp_path, [-1, 2], 3)
    for epoch, parts in enumerate(zip(*found, strict=True)):
        assert {part["version"] for part in parts} == {epoch + 1}
        assert {part["reads"] for part in parts} == {f"{name} v{epoch + 1}"}
        assert len({part["steps"] for part in parts}) == 1
        read = flat(part["samples"] for part in parts)
        assert sorted(read) == list(range(len(client.dataset(name, epoch + 1))))
    state = json.loads((tmp_path / "state 1.json").read_text())
    with make(client.dataset(name), run=name) as loader:  # elsewhere, and after other versions came
        loader.load_state_dict(state)
        assert numbers(loader) == expected(client, name, 2, 1, position=3 * GLOBAL)
        assert numbers(loader) == expected(client, name, 4, 2)


# Mixtures and packed windows.


def test_a_mixture_moves_on_with_all_its_datasets(client, name):
    names = [f"{name}-b", f"{name}-a"]
    for one in names:
        append(client, one, 20)

    def mixture(versions=("latest", "latest"), **options):
        datasets = {
            one: client.dataset(one, version) for one, version in zip(names, versions, strict=True)
        }
        return forebay.Mixture(datasets, dict.fromkeys(names, 0.5), stop="all", **options)

    def by_hand(versions, epoch, state=None):
        options = {"global_batch_size": GLOBAL, "shuffle": "full", "seed": 5}
        with forebay.DataLoader(mixture(versions), **options) as loader:
            loader.set_epoch(epoch)
            return numbers(loader)

    with make(mixture()) as loader:
        assert numbers(loader) == by_hand((1, 1), 0)
        append(client, names[1])
        batches = iter(loader)
        head = numbers(itertools.islice(batches, 2))
        state = loader.state_dict()
        append(client, names[0])
        assert head + numbers(batches) == by_hand((1, 2), 1)
        assert numbers(loader) == by_hand((2, 2), 2)
        assert loader.report().reads == f"{names[0]} v2 + {names[1]} v2"
    with make(mixture()) as loader:
        assert list(state["datasets"]) != sorted(names)
        loader.load_state_dict(json.loads(json.dumps(state, sort_keys=True)))
        assert head + numbers(loader) == by_hand((1, 2), 1)
        assert numbers(loader) == by_hand((2, 2), 2)
    going_on = forebay.Mixture(
        {one: client.dataset(one) for one in names}, dict.fromkeys(names, 0.5), num_samples=100
    )
    with pytest.raises(forebay.InvalidRequest, match=r"a mixture with num_samples=.*stop="):
        make(going_on)


def test_the_datasets_of_a_mixture_are_decided_together(client, name, monkeypatch):
    names = [f"{name}-a", f"{name}-b"]
    for one in names:
        append(client, one, 12)

    def rank(number):
        datasets = {one: client.dataset(one, 1) for one in names}
        mixture = forebay.Mixture(datasets, dict.fromkeys(names, 0.5), stop="first")
        return make(mixture, rank=number, world_size=2, run=name, num_threads=0)

    first, second = rank(0), rank(1)
    ask, late, answers, parts = LocalTransfer.decide_version, [], [], []

    def ask_in_turns(self, question):
        if question.get("proposed") and not late:  # rank 0 looked. Before it says what it found ...
            late.append(question)
            for one in names:  # ... versions come, one of which does not go with the other's old
                with client.write_columns(one, {"more": "int64"}) as writer:
                    for number in range(12):
                        writer.write(more=number)
            parts.append(numbers(second))
            return answers[0]
        if question.get("proposed") and not answers:  # ... and rank 1 looked, but is overtaken
            answers.append(ask(self, late[0]))
        return ask(self, question)

    monkeypatch.setattr(LocalTransfer, "decide_version", ask_in_turns)
    parts.append(numbers(first))
    assert first.report().reads == second.report().reads == f"{names[0]} v1 + {names[1]} v1"
    assert len(parts[0]) == len(parts[1])
    monkeypatch.undo()
    assert len(numbers(second)) == len(numbers(first))
    assert first.report().reads == second.report().reads == f"{names[0]} v2 + {names[1]} v2"
    first.close()
    second.close()


def test_packed_windows_move_on(client, name):
    def write(writer, count):
        with writer:
            for number in range(count):
                writer.write(tokens=list(range(number, number + 5)))

    write(client.create_dataset(name, {"tokens": "list[int32]"}), 20)

    def packed(version="latest"):
        return forebay.Packed(client.dataset(name, version), length=16, group_samples=8)

    def tokens(batches):
        return [batch["tokens"].tolist() for batch in batches]

    def by_hand(version, epoch):
        options = {"global_batch_size": 2, "shuffle": "full", "seed": 5}
        with forebay.DataLoader(packed(version), **options) as loader:
            loader.set_epoch(epoch)
            return tokens(loader)

    with make(packed(), global_batch_size=2) as loader:
        batches = iter(loader)
        head = tokens(itertools.islice(batches, 2))
        state = loader.state_dict()
        write(client.append_dataset(name), 7)
        assert head + tokens(batches) == by_hand(1, 0)
        assert tokens(loader) == by_hand(2, 1)
    with make(packed(), global_batch_size=2) as loader:
        loader.load_state_dict(state)
        assert head + tokens(loader) == by_hand(1, 0)
        assert tokens(loader) == by_hand(2, 1)


# What does not fit.


def test_a_split_is_followed_from_version_to_version_that_has_it(client, name, dataset, caplog):
    dataset.define_splits({"train": 0.7, "test": 0.3}, seed=1)
    train = client.dataset(name, split="train")
    with caplog.at_level(logging.WARNING), make(train) as loader:
        assert numbers(loader) == expected(client, name, 1, 0, split="train")
        append(client, name)
        for epoch in (1, 2):
            assert numbers(loader) == expected(client, name, 1, epoch, split="train")
        [warning] = caplog.messages
        assert f"dataset '{name}' has version 2, its split 'train' is of version 1" in warning
        client.dataset(name).define_splits({"train": 0.7, "test": 0.3}, seed=1)
        assert numbers(loader) == expected(client, name, 2, 3, split="train")
        state = loader.state_dict()
        other = make(client.dataset(name, split="test"))
        with other, pytest.raises(forebay.InvalidRequest, match=r"split train.*follows .*test"):
            other.load_state_dict({**state, "epoch": 3, "position": 5})


def test_a_version_without_a_column_that_is_read_is_not_moved_on_to(client, name, dataset, caplog):
    with make(dataset) as loader, make(dataset, columns=["number"]) as narrow:
        list(loader)
        list(narrow)
        client.drop_columns(name, ["text"])
        with caplog.at_level(logging.WARNING):
            for epoch in (1, 2):
                assert numbers(loader) == expected(client, name, 1, epoch)
        [warning] = caplog.messages
        assert f"{name} version 1 is read as before" in warning
        assert f"version 2 of dataset '{name}' has no column 'text'" in warning
        assert numbers(narrow) == expected(client, name, 2, 1)  # which does not read it


def test_batches_have_the_columns_of_their_version(client, name, dataset):
    with make(dataset, ragged="pad") as loader:
        list(loader)
        dataset.add_columns(
            lambda batch: {"twice": [[n, n] for n in batch["number"].tolist()]},
        )
        batches = list(loader)
        assert numbers(batches) == expected(client, name, 2, 1)
        for batch in batches:
            assert batch["twice"].tolist() == [[n, n] for n in batch["number"].tolist()]


def test_a_version_that_does_not_fit_the_batches_is_not_moved_on_to(client, name, caplog):
    writer = client.create_dataset(name, {"number": "int64", "tokens": "list[int32]"})
    with writer:
        for number in range(START):
            writer.write(number=number, tokens=[number] * (number % 3))
    client.dataset(name).define_splits({"train": 0.9, "test": 0.1}, seed=1)
    whole, train = client.dataset(name), client.dataset(name, split="train")
    with make(whole, ragged="pad") as padded, make(train, last_batch="drop") as dropping:
        list(padded)
        list(dropping)
        with client.append_dataset(name) as writer:
            writer.write(number=START, tokens=[])
        client.dataset(name).define_splits({"train": 0.1, "test": 0.9}, seed=1)
        with client.write_columns(name, {"tokens_lengths": "int64"}) as writer:
            for _ in range(START + 1):
                writer.write(tokens_lengths=-1)
        with caplog.at_level(logging.WARNING):
            for epoch in (1, 2):
                for batch in (batches := list(padded)):
                    assert (batch["tokens_lengths"] == batch["number"] % 3).all()
                assert numbers(batches) == expected(client, name, 1, epoch)
                assert dropping.remaining_steps() == len(numbers(dropping)) == 2
                assert dropping.dataset.version == 1
        in_the_way, too_small = caplog.messages
        assert "'tokens_lengths' is in the way of the lengths of 'tokens'" in in_the_way
        assert 'last_batch="drop" with a global batch of 8 would drop all 2 samples' in too_small


def test_a_deleted_dataset_and_one_made_anew_are_refused(client, name, dataset):
    with make(dataset) as loader:
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
        list(batches)
        client.delete_dataset(name)
        with pytest.raises(forebay.NotFound, match=r"no dataset .* any more"):
            next(iter(loader))
        append(client, name, 9)
        with pytest.raises(forebay.Conflict, match="another one than that which was read"):
            next(iter(loader))
    anew = make(client.dataset(name))
    with anew, pytest.raises(forebay.NotFound, match=r"the state goes on in a version .* deleted"):
        anew.load_state_dict(state)


def test_what_cannot_be_followed_is_refused_by_name(client, name, dataset):
    with pytest.raises(forebay.InvalidRequest, match="follow='newest'"):
        forebay.DataLoader(dataset, batch_size=1, follow="newest")
    with pytest.raises(forebay.InvalidRequest, match="run= belongs to follow"):
        forebay.DataLoader(dataset, batch_size=1, run="x")
    for run in (5, "", "x" * 129):
        with pytest.raises(forebay.InvalidRequest, match="name of 1 to 128 characters"):
            make(dataset, run=run)
    for following in (make(dataset), stream(dataset)):
        with pytest.raises(TypeError, match='follow="latest" has no len'):
            len(following)
    nameless = make(dataset, rank=0, world_size=2)
    with nameless, pytest.raises(forebay.InvalidRequest, match="give all of them the same run="):
        next(iter(nameless))
