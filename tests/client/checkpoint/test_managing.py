"""A run as people manage it: policies, tags, pins, notes, forks, durability and callbacks."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import GenerationId

Make = Callable[..., forebay.Checkpointer]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forebay.Client]:
    """Of a daemon with an object tier."""
    data = tmp_path_factory.mktemp("daemon") / "data"
    store = tmp_path_factory.mktemp("store")
    with (
        DaemonProcess(data, "--object-url", f"file://{store}"),
        forebay.connect(data) as connected,
    ):
        yield connected


def save(checkpointer: forebay.Checkpointer, *steps: int, **options: Any) -> None:
    for step in steps:
        state = {"x": torch.full((300,), float(step))}
        checkpointer.save(step, state=state, **options).wait("local")


def value(resumed: Any) -> float:
    return float(resumed.state["x"][0])


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(client: forebay.Client, run: str) -> list[int]:
    return [one.step for one in client.run(run).generations() if one.state == "committed"]


def test_a_policy_keeps_what_it_says(client: forebay.Client, make: Make, run: str) -> None:
    keep = forebay.Keep(last=2, best="accuracy", mode="max")
    checkpointer = make(keep=keep)
    for step, accuracy in enumerate([0.1, 0.9, 0.5, 0.3, 0.2]):
        save(checkpointer, step, metrics={"accuracy": accuracy})
    until(lambda: steps(client, run) == [4, 3, 1])
    assert client.run(run).keep == keep
    best = make().restore("best")
    assert best is not None
    assert (best.step, best.metrics) == (1, {"accuracy": 0.9})
    client.run(run).set_keep(None)
    assert client.run(run).keep is None


def test_what_retention_took_quickly_was_saved(
    client: forebay.Client,
    make: Make,
    run: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpointer = make(keep=forebay.Keep(last=1))
    saved = [checkpointer.save(step, state={"x": torch.ones(9)}) for step in range(8)]
    until(lambda: steps(client, run) == [7])
    for one in saved:
        one.wait("local")
    with pytest.raises(forebay.NotFound, match=r"was local, and was deleted .*Keep\(last=1\)"):
        saved[0].wait("remote")
    assert saved[0].durability == "local"
    assert "will not be saved" not in caplog.text
    client.delete_checkpoints(run, attempt=1, step=7)
    saved[7].wait("local")
    with pytest.raises(forebay.AlreadyExists, match="step 7 was already saved"):
        checkpointer.save(7, state={"x": torch.zeros(9)})
    checkpointer.close()
    assert "FAILED" not in capfd.readouterr().err


def test_what_is_no_policy(client: forebay.Client, run: str) -> None:
    wrong: Any
    for wrong in (3, {"last": 3}):
        for call in (client.run(run).prune, client.run(run).set_keep):
            with pytest.raises(forebay.InvalidRequest, match=r"give a forebay\.Keep"):
                call(wrong)
    with pytest.raises(forebay.InvalidRequest, match="0 is none"):
        forebay.Keep(last=0)


def test_tags_select_and_move(client: forebay.Client, make: Make, run: str) -> None:
    checkpointer = make()
    save(checkpointer, 1, tags=["good"], note={"commit": "abc"})
    save(checkpointer, 2, tags=["good", "newer"])
    save(checkpointer, 3)
    found = client.run(run)
    assert found.tags() == {"good": GenerationId(run, 1, 2), "newer": GenerationId(run, 1, 2)}
    assert found.get("1/1").note == {"commit": "abc"}
    found.tag("good", 1)
    found.untag("newer")
    assert found.get(1).tags == ("good",)
    resumed = make().restore("good")
    assert resumed is not None
    assert (resumed.step, value(resumed)) == (1, 1.0)
    found.note("good", {"a": [1, None]})
    assert found.get("good").note == {"a": [1, None]}
    for tag in ("latest", "best", "12", "1/2"):
        with pytest.raises(forebay.InvalidRequest):
            found.tag(tag)
        with pytest.raises(forebay.InvalidRequest):
            checkpointer.save(9, state={}, tags=[tag])
    with pytest.raises(forebay.InvalidRequest, match="JSON can say"):
        found.note("good", {"a": object()})
    with pytest.raises(forebay.NotFound, match="no tag newer"):
        found.untag("newer")


def test_pins_keep_from_pruning(client: forebay.Client, make: Make, run: str) -> None:
    save(make(), 1, 2, 3)
    found = client.run(run)
    assert found.pin(1, "for the paper").pinned == "for the paper"
    said = {one.id.step: one for one in found.prune(forebay.Keep(last=1), dry_run=True)}
    assert [said[step].is_kept for step in (1, 2, 3)] == [True, False, True]
    assert said[1].reasons == ("pinned: for the paper",)
    assert said[2].num_bytes >= 1200
    assert steps(client, run) == [3, 2, 1]
    found.unpin("1/1")
    assert found.get(3).pinned is None


RANK = """
    import sys, forebay, torch.distributed as dist
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
    keep = forebay.Keep(last=1 + rank)
    with forebay.connect(sys.argv[1]) as client:
        with forebay.Checkpointer(client, "disagreed", keep=keep) as checkpointer:
            try:
                checkpointer.start()
            except forebay.InvalidRequest as error:
                assert "different keep or fork_from: rank 0" in str(error), error
                print("refused")
        assert "disagreed" not in [one.run for one in client.runs()]
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_policy_that_the_ranks_disagree_about_is_refused(
    client: forebay.Client, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", textwrap.dedent(RANK), client.status().addresses[0]]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["refused\n", "refused\n"]
    assert [rank.returncode for rank in ranks] == [0, 0]


# ------------------------------------------------------------------------------------------- forks


def test_a_fork_begins_where_it_is_told(client: forebay.Client, make: Make, run: str) -> None:
    base = f"{run}-base"
    save(make(base), 1, 2, 3)
    forked = make(fork_from=f"{base}@1/2")
    resumed = forked.restore()
    assert resumed is not None
    assert (resumed.run, resumed.step, value(resumed)) == (base, 2, 2.0)
    lineage = client.run(run).lineage()
    assert (lineage.forked_from, lineage.path) == (GenerationId(base, 1, 2), [])
    assert client.run(base).lineage().forks == [(run, GenerationId(base, 1, 2))]
    with pytest.raises(forebay.Conflict, match="committed nothing of its own"):
        client.delete_checkpoints(base, attempt=1, step=2)
    # The parent goes on, and the fork dies before its first save: it finds the same again.
    said = client.run(base).prune(forebay.Keep(last=1), dry_run=True)
    assert [one.id.step for one in said if one.is_kept] == [3, 2]
    assert f"run {run} was forked from it" in said[1].reasons
    again = make(fork_from=f"{base}@1/2").restore()
    assert again is not None
    assert (again.run, again.step) == (base, 2)
    last = make(fork_from=base)
    assert value(last.restore()) == 2.0
    save(last, 20)
    assert value(make(fork_from=base).restore()) == 20.0
    assert client.delete_checkpoints(base, attempt=1, step=2) == 1


@pytest.mark.parametrize("how", ["{}", "{}@good", "tuple"])
def test_ways_to_name_what_is_forked(client: forebay.Client, make: Make, run: str, how: str):
    base = f"{run}-base"
    save(make(base), 1)
    save(make(base), 2, tags=["good"])
    checkpointer = make(fork_from=(base, "good") if how == "tuple" else how.format(base))
    save(checkpointer, 5)  # without a restore
    assert client.run(run).lineage().forked_from == GenerationId(base, 2, 2)


def test_forks_that_cannot_be(client: forebay.Client, make: Make, run: str) -> None:
    with pytest.raises(forebay.InvalidRequest, match=r"fork_from=\('a',\): give 'run'"):
        make(fork_from=("a",))
    with pytest.raises(forebay.InvalidRequest, match=f"fork_from={run}-no@latest"):
        make(fork_from=f"{run}-no").restore(missing_ok=True)
    save(make(f"{run}-base"), 1)
    save(make(), 1)
    with pytest.raises(forebay.Conflict, match="exists already"):
        make(fork_from=f"{run}-base").restore()


def test_lineage_shows_attempts_and_rollbacks(client: forebay.Client, make: Make, run: str) -> None:
    save(make(), 1, 2)
    second = make()
    second.restore(1)
    save(second, 2, 3)
    lineage = client.run(run).lineage()
    assert [(one.attempt, one.parent) for one in lineage.attempts] == [
        (1, None),
        (2, GenerationId(run, 1, 1)),
    ]
    assert [[each.step for each in one.generations] for one in lineage.attempts] == [[1, 2], [2, 3]]
    assert lineage.path == [GenerationId(run, *point) for point in [(2, 3), (2, 2), (1, 1)]]


# -------------------------------------------------------------------------------------- durability


def test_durability_is_typed_recorded_and_told(
    client: forebay.Client, make: Make, run: str
) -> None:
    told: list[str] = []
    done = threading.Event()
    saved = make().save(1, state={"x": torch.zeros(100)})
    saved.on("ram", lambda one: told.append("ram"))
    saved.on("local", lambda one: told.append("local"))
    saved.on("remote", lambda one: (told.append(one.durability), done.set()))
    saved.on("local", lambda one: 1 / 0)
    assert done.wait(60)
    assert told == ["ram", "local", "remote"]
    assert saved.durability is forebay.Durability.REMOTE
    latest = client.run(run).latest(durability="remote")
    assert latest.durability == "remote"
    times = [latest.reached[level] for level in ("ram", "local", "remote")]
    assert 0 < times[0] <= times[1] <= times[2] <= time.time() + 60
    for ask in (saved.wait, saved.reached, client.run(run).latest):
        with pytest.raises(forebay.InvalidRequest, match="needs a second node"):
            ask("replicated")
    with pytest.raises(forebay.InvalidRequest, match="needs a second node"):
        make().restore(durability="replicated")


# ---------------------------------------------------------------------------------------- datasets


def a_dataset(client: forebay.Client, name: str, num_rows: int = 10) -> forebay.Dataset:
    with client.create_dataset(name) as writer:
        for number in range(num_rows):
            writer.write(x=number)
    return client.dataset(name)


def test_a_dataset_stays_while_a_generation_stands_on_it(
    client: forebay.Client, make: Make, run: str
) -> None:
    name, other = f"{run}-data", f"{run}-other"
    mixture = forebay.Mixture(
        {"a": a_dataset(client, name), "b": a_dataset(client, other)},
        {"a": 1, "b": 1},
        num_samples=10,
    )
    with forebay.DataLoader(client.dataset(name), global_batch_size=2) as loader:
        make(loader=loader).save(1).wait("local")
    with forebay.DataLoader(mixture, global_batch_size=2) as loader:
        mixed = make(f"{run}-mixed", loader=loader)
        mixed.save(1).wait("local")
        mixed.close()
    assert client.run(run).get(1).dataset["dataset"] == name
    for now in (True, False):
        with pytest.raises(forebay.Conflict, match=rf"2 committed.*{run}@1/1.*{run}-mixed@1/1"):
            client.delete_dataset(name, now=now)
        with pytest.raises(forebay.Conflict, match=rf"1 committed.*{run}-mixed@1/1"):
            client.delete_dataset(other, now=now)
    kept = client.why(f"dataset {name}").kept_by
    assert kept == [f"generation {run}@1/1 (version 1)", f"generation {run}-mixed@1/1 (version 1)"]
    client.delete_checkpoints(f"{run}-mixed")
    assert client.delete_dataset(other, now=True)
    assert list(client.remove_dataset(name, force=True).stranded) == [f"{run}@1/1"]
    a_dataset(client, name, 11)  # another one of that name: nothing stands on it
    assert client.delete_dataset(name, now=True)


# ----------------------------------------------------------------------------------------- readers

READER = """
    import sys, forebay
    client = forebay.connect(sys.argv[1])
    import torch
    from forebay.checkpoint.manifest import SavedState
    from forebay.checkpoint.read import PackReader
    from forebay.checkpoint.service import CheckpointService
    from forebay_wire.ids import GenerationId
    service = CheckpointService(client, sys.argv[2])
    manifest = service.resolve("1", "local", (), 0).manifest
    print("found", flush=True)
    sys.stdin.readline()
    saved = SavedState.of(service.manifest(manifest, GenerationId(sys.argv[2], 1, 1)))
    with PackReader(client.transfer, saved) as reader:
        pack = saved.manifest.packs[0]
        assert reader.read_bytes(pack, 0, 1200) == torch.full((300,), 1.0).numpy().tobytes()
        print("open", flush=True)
        sys.stdin.readline()
        assert reader.read_bytes(pack, 0, 1200) == torch.full((300,), 1.0).numpy().tobytes()
    print("read", flush=True)
"""


def test_a_reader_finishes_while_its_generation_would_be_pruned(
    client: forebay.Client, make: Make, run: str
) -> None:
    save(make(), 1, 2, 3)
    address = client.status().addresses[0]
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(READER), address, run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    with reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "found\n"
        client.run(run).set_keep(forebay.Keep(last=1))
        until(lambda: steps(client, run) == [3, 1])
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "open\n"
        said = client.run(run).prune()
        assert [(one.id.step, one.is_kept) for one in said] == [(3, True), (1, True)]
        assert said[1].reasons == ("somebody reads it",)
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "read\n"
    assert reader.returncode == 0
