"""`forebay_trainer prepare`: the same rows whatever the processes, learnt from training alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_trainer.__main__ import main
from forebay_trainer.modules import imported
from forebay_trainer.preparation.splitting import Duplicates, Splitter
from forebay_wire.errors import InvalidRequest, NotFound

RECIPE = Path(__file__).parent / "preparing"
SHARES = {"train": 0.8, "test": 0.2}


@pytest.fixture
def prepare(daemon, capsys, tmp_path):
    name = tmp_path.name

    def run(*words, status=0, dataset=name):
        found = main(
            ["prepare", str(RECIPE), f"address={daemon.data}", f"data.dataset={dataset}", *words]
        )
        said = capsys.readouterr()
        assert found == status, said.err
        return json.loads(said.out) if "--json" in words else said.out + said.err

    run.name = name
    return run


def rows_of(client, name):
    return client.dataset(name).table()


def test_a_dataset_is_the_same_for_every_number_of_processes(prepare, client):
    prepare("--num-processes", "1", "--json")
    one = prepare.name
    prepare("--num-processes", "2", "--json", dataset=f"{one}-2")
    assert rows_of(client, one).equals(rows_of(client, f"{one}-2"))


def test_every_step_does_its_part(prepare, client):
    done = prepare("--num-processes", "1", "--json")
    words = [imported(RECIPE / "prepare.py").word(number) for number in range(500)]
    unique = {word.lower() for word in words} - {""}
    stages = done["stages"]
    assert list(stages)[:3] == ["read", "clean", "normalise"]
    assert stages["clean"] == {**stages["clean"], "rows_in": 500, "rows_out": 450}
    assert stages["duplicates out"]["rows_out"] == len(unique)
    table = rows_of(client, prepare.name)
    assert set(table["word"].to_pylist()) == unique
    # Training rows twice, by `augment`; the others once, and never changed.
    about = client.dataset(prepare.name).manifest.metadata
    assert about["splits"] == ["train", "dev", "test"]
    for number, split in enumerate(about["splits"]):
        rows = client.dataset(prepare.name, split=split).table()
        assert len(rows) == done["splits"][split] > 0
        assert set(rows["split"].to_pylist()) == {number}
        num_each = 2 if split == "train" else 1
        found = rows["word"].to_pylist()
        assert len(found) == num_each * len(set(found))
        changed = sum(each >= 1_000_000 for each in rows["number"].to_pylist())
        assert changed == (len(rows) // 2 if split == "train" else 0)
    assert sum(done["splits"].values()) == done["num_rows"] == len(table)


def test_what_is_learnt_comes_from_training_rows_alone(prepare, client):
    prepare("--num-processes", "1", "--json", "prepare.num_copies=0")
    about = client.dataset(prepare.name).manifest.metadata
    train = client.dataset(prepare.name, split="train").table()
    assert about["num_train"] == sum(len(word) for word in train["word"].to_pylist())
    assert about["letters"] == sorted(set("".join(train["word"].to_pylist())))
    assert about["preparation"]["num_rows"] == 500


def test_a_dataset_that_is_there_is_left_as_it_is(prepare, client):
    prepare("--num-processes", "1")
    assert "nothing was done" in prepare("--num-processes", "1")
    said = prepare("--num-processes", "1", "prepare.num_rows=400", status=1)
    assert "num_rows was 500, not 400" in said
    assert "data.dataset" in said
    assert client.dataset(prepare.name).version == 1
    said = prepare("data.dataset=numbers", status=1)
    assert "was not made by a recipe's preparation" in said


def test_splits_that_a_crash_left_out_are_defined_again(prepare, client):
    done = prepare("--num-processes", "1", "--json")
    before = client.dataset(prepare.name, split="dev").table()
    # As after a kill between the commit and the splits: the rows know where they belong.
    name = f"{prepare.name}-b"
    whole = client.dataset(prepare.name)
    with client.create_dataset(
        name, schema=whole.schema.arrow, metadata=whole.manifest.metadata
    ) as writer:
        writer.write_table(whole.table())
    again = prepare("--num-processes", "1", "--json", dataset=name)
    assert again["stages"] == {}
    assert again["splits"] == done["splits"]
    assert client.dataset(name, split="dev").table().equals(before)


def test_rows_are_appended_by_what_was_learnt_first(prepare, client):
    first = prepare("--num-processes", "1", "--json", "prepare.num_rows=60")
    about = client.dataset(prepare.name).manifest.metadata
    second = prepare("--num-processes", "1", "--json", "--append")
    assert (first["version"], second["version"]) == (1, 2)
    assert "learn" not in second["stages"]
    now = client.dataset(prepare.name).manifest.metadata
    assert {name: now[name] for name in about} == about
    added = second["stages"]["augment"]["rows_out"]
    assert second["num_rows"] == first["num_rows"] + added == sum(second["splits"].values())
    splits = [client.dataset(prepare.name, split=name).table() for name in ("train", "dev", "test")]
    words = [set(rows["word"].to_pylist()) for rows in splits]
    assert len(set.union(*words)) == sum(map(len, words)), "a word lies in two splits"
    every = client.dataset(prepare.name).table()["word"].to_pylist()
    assert max(Counter(every).values()) <= 2, "once, and one copy of a training row"
    assert prepare("--num-processes", "1", "--json", "--append")["stages"] == {}, "it was appended"
    assert client.dataset(prepare.name).version == 2
    assert "prepare it first" in prepare("--append", status=1, dataset="nowhere")
    assert "already" in prepare("--append", "prepare.num_rows=60", status=1)
    said = prepare("--append", "prepare.num_copies=3", "seed=5", status=1)
    assert "num_copies was 1, not 3" in said
    assert "seed was 0, not 5" in said


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("read", "read() of"),
        ("clean", "clean() of"),
        ("learn", "learn() of"),
        ("tokenise", "tokenise() of"),
        ("killed in tokenise", "a worker process was killed during tokenise"),
    ],
)
def test_a_step_that_fails_is_named_and_nothing_is_written(prepare, client, fault, said):
    num_processes = "2" if "killed" in fault else "1"
    found = prepare(f"prepare.fault={fault}", "--num-processes", num_processes, status=1)
    assert said in found
    assert "killed" in fault or "ValueError: the fault that was asked for" in found
    assert prepare.name not in client.datasets()


def test_a_split_without_rows_is_refused_before_anything_is_written(prepare, client):
    assert "no rows fall to the split" in prepare("prepare.num_rows=3", status=1)
    assert prepare.name not in client.datasets()


def test_training_without_the_dataset_says_how_to_make_it(daemon, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"address={daemon.data}", "data.dataset=nowhere", "--dry-run"]
    assert main([str(RECIPE), *words]) == 1
    assert "`forebay_trainer prepare preparing` makes it" in capsys.readouterr().err


def test_mistakes_are_named_before_anything_starts(prepare):
    assert "did you mean 'prepare.num_rows'?" in prepare("prepare.num_row=3", status=2)
    assert "must be int" in prepare("prepare.num_rows=many", status=2)
    assert "no rows" in prepare("prepare.num_rows=0", status=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_and_files_end_with_the_command(daemon, tmp_path, number):
    words = [sys.executable, "-m", "forebay_trainer", "prepare", str(RECIPE)]
    words += [f"address={daemon.data}", "data.dataset=killed", "--num-processes", "2"]
    process = subprocess.Popen(
        [*words, "prepare.num_rows=100000000"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while len(workers := working(process.pid)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(number)
        _, said = process.communicate()
    assert number == signal.SIGKILL or b"nothing is written" in said
    assert list(tmp_path.iterdir()) == []
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


def working(pid):
    """Worker processes that have begun: those of them that have asked to end with their parent."""
    found = psutil.Process(pid).children(recursive=True)
    return [each for each in found if "spawn_main" in " ".join(each.cmdline())]


@given(st.lists(st.integers(0, 40), min_size=1), st.integers(0, 1000))
def test_a_group_lies_in_one_split_however_it_is_cut(groups, seed):
    whole = Splitter(SHARES, seed).split(pa.table({"group": groups}))["split"].to_pylist()
    splitter = Splitter(SHARES, seed)
    parts = [
        splitter.split(pa.table({"group": groups[at : at + 3]})) for at in range(0, len(groups), 3)
    ]
    assert [each for part in parts for each in part["split"].to_pylist()] == whole
    found = {}
    for group, split in zip(groups, whole, strict=True):
        assert found.setdefault(group, split) == split


def test_shares_are_met_and_seeds_differ():
    rows = pa.table({"x": np.arange(10_000)})
    first, second = (Splitter(SHARES, seed).split(rows)["split"].to_pylist() for seed in (0, 1))
    assert abs(first.count("test") / 10_000 - 0.2) < 0.02
    assert first != second
    with pytest.raises(InvalidRequest, match="add up to 1"):
        Splitter({"train": 0.8}, 0)


def test_only_the_first_of_equal_rows_stays():
    duplicates = Duplicates("x")
    kept = [
        duplicates.drop(pa.table({"x": values}))["x"].to_pylist() for values in ([1, 1, 2], [2, 3])
    ]
    assert kept == [[1, 2], [3]]
    assert duplicates.num_dropped == 2
    with pytest.raises(InvalidRequest, match="no column 'y'"):
        Duplicates("y").drop(pa.table({"x": [1]}))


def test_a_source_that_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    from forebay_trainer.preparation.sources import VADER

    monkeypatch.setenv("FOREBAY_SOURCES", str(tmp_path))
    with pytest.raises(NotFound, match="--fetch"):
        VADER.find()
    (tmp_path / VADER.name).touch()
    assert VADER.find() == tmp_path / VADER.name
    with pytest.raises(NotFound, match=r"prepare\.source"):
        VADER.find(str(tmp_path / "other"))


def test_mnist_as_it_is_given_out(daemon, client, tmp_path, capsys):
    images = np.random.default_rng(0).integers(1, 255, (30, 28, 28), dtype=np.uint8)
    images[3] = 0
    for prefix, number in (("train", 20), ("t10k", 10)):
        part = images[:number]
        sizes = np.array([number, 28, 28], ">u4").tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + sizes + part.tobytes()
        )
        labels = bytes(each % 10 for each in range(number))
        sizes = np.array([number], ">u4").tobytes()
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes + labels)
    words = ["prepare", "mnist_cnn", f"address={daemon.data}", "data.dataset=digits", "--json"]
    words += [f"prepare.source={tmp_path}", "--num-processes", "1", "prepare.num_copies=2"]
    assert main(words) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["splits"] == {"train": 19 * 3, "test": 9}  # the empty picture is left out
    found = client.dataset("digits", split="test")[0]
    assert np.array_equal(found["image"], images[0])
    assert found["label"] == 0
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes + labels[:-1])
    assert main([*words, "data.dataset=digits2"]) == 1
    assert "it is cut off" in capsys.readouterr().err
