"""What is where, how large, since when; and that nothing in there is stale or can be changed."""

import errno
import json
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

import forebay
from forebay.fs import ForebayFileSystem

from .conftest import ROWS, commit_state, weights

VERSION = "datasets/flowers/1"
GENERATION = "checkpoints/cnn/1/1"


def test_the_upper_levels(fs: ForebayFileSystem) -> None:
    assert fs.ls("", detail=False) == ["datasets", "checkpoints"]
    assert fs.ls("forebay://", detail=False) == fs.ls("/", detail=False) == fs.ls("", detail=False)
    assert "datasets/flowers" in fs.ls("datasets", detail=False)
    assert fs.ls("datasets/flowers", detail=False) == ["datasets/flowers/1", "datasets/flowers/2"]
    assert "checkpoints/cnn" in fs.ls("checkpoints", detail=False)
    assert fs.ls("checkpoints/cnn", detail=False) == ["checkpoints/cnn/1", "checkpoints/cnn/2"]
    assert fs.ls("checkpoints/cnn/2", detail=False) == ["checkpoints/cnn/2/2"]
    assert {one["type"] for one in fs.ls("datasets")} == {"directory"}


def test_files_of_a_version(fs: ForebayFileSystem, client: forebay.Client) -> None:
    shards = client.dataset("flowers", 1).manifest.shards
    assert len(shards) > 2
    names = [f"{VERSION}/shard-{number:05d}.arrow" for number in range(len(shards))]
    assert fs.ls(VERSION, detail=False) == [f"{VERSION}/manifest.json", *names]
    assert fs.find(VERSION) == [f"{VERSION}/manifest.json", *names]
    for name, shard in zip(names, shards, strict=True):
        info = fs.info(name)
        assert (info["size"], info["type"], info["ukey"]) == (shard.num_bytes, "file", shard.blob)
        assert info["rows"] == shard.num_rows
    assert fs.du(VERSION) == sum(fs.sizes(fs.find(VERSION)))
    assert next(iter(fs.walk(VERSION)))[1:] == ([], ["manifest.json", *[n[19:] for n in names]])


def test_a_manifest_is_readable_json(fs: ForebayFileSystem, client: forebay.Client) -> None:
    data = fs.cat_file(f"{VERSION}/manifest.json")
    assert len(data) == fs.size(f"{VERSION}/manifest.json")
    assert [one["num_rows"] for one in json.loads(data)["shards"]] == [
        shard.num_rows for shard in client.dataset("flowers", 1).manifest.shards
    ]
    assert json.loads(fs.cat_file(f"{GENERATION}/manifest.json"))["run"] == "cnn"
    assert fs.ukey(f"{VERSION}/manifest.json") == fs.info(VERSION)["manifest"]


def test_files_of_a_generation(fs: ForebayFileSystem) -> None:
    assert [name.removeprefix(f"{GENERATION}/") for name in fs.find(GENERATION)] == [
        "manifest.json",
        "packs/rank-00000.pack",
        "state/model/a%2Fb",
        "state/model/layer/bias",
        "state/model/layer/weight",
        "state/other/note",
        "state/other/rate",
        "state/other/raw",
        "state/other/table",
    ]
    raw = fs.cat_file(f"{GENERATION}/state/model/layer/weight")
    info = fs.info(f"{GENERATION}/state/model/layer/weight")
    assert (info["dtype"], info["shape"], info["size"]) == ("float32", [300, 1000], len(raw))
    assert np.array_equal(np.frombuffer(raw, "f4").reshape(300, 1000), weights(1.0).numpy())
    other = f"{GENERATION}/state/other"
    assert json.loads(fs.cat_file(f"{other}/rate")) == 0.5
    assert json.loads(fs.cat_file(f"{other}/note")) == "rosé"
    assert fs.cat_file(f"{other}/raw") == b"\x00\xff"
    assert np.array_equal(np.frombuffer(fs.cat_file(f"{other}/table")).reshape(2, 2), np.eye(2))
    pack = fs.cat_file(f"{GENERATION}/packs/rank-00000.pack")
    assert raw in pack


def test_latest_is_a_name_that_is_not_listed(fs: ForebayFileSystem) -> None:
    assert fs.info("datasets/flowers/latest")["version"] == 2
    newest = fs.info("checkpoints/cnn/latest")
    assert (newest["attempt"], newest["step"], newest["name"]) == (2, 2, "checkpoints/cnn/latest")
    raw = fs.cat("forebay://checkpoints/cnn/latest/state/model/layer/weight")
    assert np.array_equal(np.frombuffer(raw, "f4"), weights(2.0).numpy().ravel())
    assert (
        fs.ls("checkpoints/cnn/latest", detail=False)[0] == "checkpoints/cnn/latest/manifest.json"
    )
    pattern = "datasets/flowers/latest/*.arrow"
    assert fs.glob(pattern) == fs.glob("datasets/flowers/2/*.arrow") != []
    assert not any("latest" in name for name in fs.find("datasets/flowers"))


def test_one_call_sees_one_version(
    fs: ForebayFileSystem, client: forebay.Client, tmp_path: Path, way: str
) -> None:
    name = f"grows-{way}"
    with client.create_dataset(name) as writer:
        writer.write(x=1)
    appended = []

    class Append(fsspec.Callback):  # called between two files of one get
        def branched(self, path_1: str, path_2: str, **kwargs: object) -> fsspec.Callback:
            if not appended:
                with client.append_dataset(name) as writer:
                    writer.write(x=2)
                appended.append(True)
            return fsspec.callbacks.DEFAULT_CALLBACK

    fs.get(f"datasets/{name}/latest", str(tmp_path), recursive=True, callback=Append())
    assert json.loads((tmp_path / "latest" / "manifest.json").read_bytes())["version"] == 1
    assert fs.info(f"datasets/{name}/latest")["version"] == 2


def test_listings_are_never_stale(fs: ForebayFileSystem, client: forebay.Client, way: str) -> None:
    name = f"comes-and-goes-{way}"
    assert not fs.exists(f"datasets/{name}")
    for value in (1, 2):  # the second one is another dataset of the same name
        with client.create_dataset(name) as writer:
            writer.write(x=value)
        assert fs.exists(f"datasets/{name}/1/shard-00000.arrow")
        table = fs.cat_file(f"datasets/{name}/1/shard-00000.arrow")
        assert value.to_bytes(8, "little") in table
        client.delete_dataset(name)
        assert f"datasets/{name}" not in fs.ls("datasets", detail=False)
        assert not fs.exists(f"datasets/{name}/1/shard-00000.arrow")


@pytest.mark.parametrize(
    "path",
    [
        "datasets/roses",
        "datasets/flowers/3",
        "datasets/flowers/01",
        "datasets/flowers/1/shard-99999.arrow",
        "datasets/flowers/1/manifest.json/x",
        "datasets/no name/1",
        "checkpoints/rnn",
        "checkpoints/rnn/latest",
        "checkpoints/cnn/3",
        "checkpoints/cnn/1/2",
        "checkpoints/cnn/1/x",
        "checkpoints/cnn/99999999999/1",
        "checkpoints/cnn/1/1/state/model/none",
        "elsewhere",
    ],
)
def test_what_is_missing_is_file_not_found(fs: ForebayFileSystem, path: str) -> None:
    assert not fs.exists(path)
    assert not fs.isdir(path)
    assert not fs.isfile(path)
    assert fs.find(path) == []
    for look in (fs.info, fs.ls, fs.open, fs.cat_file, fs.ukey):
        with pytest.raises(FileNotFoundError) as error:
            look(path)
        assert error.value.errno == errno.ENOENT
        assert error.value.filename == path


def test_times_are_those_of_the_commit(fs: ForebayFileSystem, client: forebay.Client) -> None:
    first, second = client.describe_dataset("flowers").versions
    shard = "shard-00000.arrow"
    assert fs.created(f"{VERSION}/{shard}") == datetime.fromtimestamp(first.created_unix, UTC)
    assert fs.modified(f"datasets/flowers/2/{shard}") == datetime.fromtimestamp(
        second.created_unix, UTC
    )
    assert fs.info(VERSION)["mtime"] == first.created_unix
    assert fs.created("datasets/flowers") == fs.created(VERSION)
    assert fs.created(GENERATION) <= fs.created("checkpoints/cnn/latest")
    with pytest.raises(NotImplementedError, match="no time"):
        fs.created("datasets")


def test_equal_bytes_have_equal_checksums(fs: ForebayFileSystem) -> None:
    shard = "shard-00000.arrow"
    assert fs.ukey(f"{VERSION}/{shard}") == fs.ukey(f"datasets/flowers/2/{shard}")
    weight = "state/model/layer/weight"
    assert fs.ukey(f"{GENERATION}/{weight}") != fs.ukey(f"checkpoints/cnn/latest/{weight}")
    assert fs.checksum(f"{VERSION}/{shard}") == int(fs.ukey(f"{VERSION}/{shard}"), 16)
    assert fs.ukey("datasets") == fs.ukey("datasets")


WRITES = {
    "mkdir": ("datasets/x",),
    "makedirs": ("datasets/x",),
    "rmdir": (VERSION,),
    "rm": (VERSION,),
    "rm_file": (f"{VERSION}/manifest.json",),
    "delete": (VERSION,),
    "mv": (VERSION, "datasets/x"),
    "copy": (VERSION, "datasets/x"),
    "cp_file": (VERSION, "datasets/x"),
    "pipe": (f"{VERSION}/x", b"x"),
    "pipe_file": (f"{VERSION}/x", b"x"),
    "put": (__file__, VERSION),
    "put_file": (__file__, VERSION),
    "touch": (f"{VERSION}/x",),
    "write_text": (f"{VERSION}/x", "x"),
    "write_bytes": (f"{VERSION}/x", b"x"),
}


@pytest.mark.parametrize("verb", WRITES)
def test_every_verb_that_writes_says_that_nothing_can_be_written(
    fs: ForebayFileSystem, verb: str
) -> None:
    with pytest.raises(OSError, match=r"read-only.*create_dataset.*Checkpointer") as error:
        getattr(fs, verb)(*WRITES[verb])
    assert error.value.errno == errno.EROFS


@pytest.mark.parametrize("mode", ["wb", "ab", "xb", "r+b", "w", "a", "x"])
def test_opening_for_writing_says_the_same(fs: ForebayFileSystem, mode: str) -> None:
    with pytest.raises(OSError, match="read-only") as error:
        fs.open(f"{VERSION}/x", mode)
    assert error.value.errno == errno.EROFS


def test_a_folder_is_no_file(fs: ForebayFileSystem, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        fs.open(VERSION)
    with (tmp_path / "x").open("wb") as out, pytest.raises(IsADirectoryError):
        fs.get_file(VERSION, out)


def test_names_in_a_state_that_would_not_do_as_names_of_files(
    fs: ForebayFileSystem, client: forebay.Client, way: str
) -> None:
    run = f"names-{way}"
    keys = ["", ".", "..", "a/b", "*?[x]", "ü", "a::b", "50%", "x y"]
    mixed = {1: b"number", "1": b"text"}
    inside = {"inside": [torch.ones(2)]}
    state = {"keys": {key: key.encode() for key in keys}, "mixed": mixed, "list": inside}
    commit_state(client, run, state)
    root = f"checkpoints/{run}/latest/state"
    found = fs.find(f"{root}/keys")
    assert sorted(fs.cat_file(name).decode() for name in found) == sorted(keys)
    assert all(fs.open(f"forebay://{name}").read() == fs.cat_file(name) for name in found)
    assert [fs.cat_file(name) for name in fs.ls(f"{root}/mixed", detail=False)] == [
        b"number",
        b"text",
    ]
    assert np.frombuffer(fs.cat_file(f"{root}/list.inside.0"), "f4").tolist() == [1, 1]


def test_row_numbers_add_up(fs: ForebayFileSystem) -> None:
    shards = [one for one in fs.ls(VERSION) if "rows" in one]
    assert sum(one["rows"] for one in shards) == fs.info(VERSION)["rows"] == ROWS
