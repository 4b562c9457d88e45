"""Zarr stores whose files stay where they are: the same samples as from arrays that were written
through the store, read by the loader and by zarr, refused once a file changes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import forebay
from forebay.dataset import bands
from forebay.zarr import ForebayStore, samples
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.s3 import S3Bucket

NUM = 300
_numbers = itertools.count()

both_ways = pytest.mark.parametrize("way", ["local", "remote"])


def fill(store: Any, format: int = 3) -> None:
    """Arrays with chunks of different lengths, one in shards of zarr, one partly never written."""
    root = zarr.create_group(store, zarr_format=format)  # type: ignore[arg-type]
    shards = (40, 8, 5) if format == 3 else None
    image = root.create_array(
        "image", shape=(NUM, 8, 5), chunks=(20, 4, 5), shards=shards, dtype="f4"
    )
    image[:] = np.arange(NUM * 40).reshape(NUM, 8, 5)
    label = root.create_array("deep/label", shape=(NUM,), chunks=(30,), dtype="i8", fill_value=-7)
    label[:150] = np.arange(150)
    equal = root.create_array("equal", shape=(NUM,), chunks=(50,), dtype="i4", compressors=None)
    equal[:] = 1


ARRAYS = {"image": "image", "label": "deep/label", "equal": "equal"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    fill(made / "three.zarr")
    fill(made / "two.zarr", 2)
    (made / "three.zarr" / "README").write_text("none of its keys")
    return made


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[DaemonProcess]:
    place = tmp_path_factory.mktemp("daemon") / "data"
    with DaemonProcess(place, "--origin-prefixes", str(folder)) as process:
        yield process


@pytest.fixture
def way() -> str:
    """How bytes travel, unless a test tries both."""
    return "local"


@pytest.fixture
def client(
    way: str, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> Iterator[forebay.Client]:
    if way == "remote":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    monkeypatch.setattr(bands, "_bands", bands.Bands())
    with forebay.connect(address(daemon)) as connected:
        yield connected


def address(daemon: DaemonProcess) -> str:
    return str(daemon.address()["rpc"])


@pytest.fixture
def name() -> str:
    return f"d{next(_numbers)}"


def batches(given: Any, **options: Any) -> list[dict[str, Any]]:
    with forebay.DataLoader(given, global_batch_size=32, include_ids=True, **options) as loader:
        return list(loader)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@both_ways
@pytest.mark.parametrize(("what", "format"), [("three.zarr", 3), ("two.zarr", 2)])
def test_batches_are_those_of_what_was_written_through_the_store(
    client: forebay.Client,
    daemon: DaemonProcess,
    folder: Path,
    name: str,
    tmp_path: Path,
    what: str,
    format: int,
) -> None:
    placed = client.register_dataset(name, [folder / what])
    assert all(shard.origin is not None for shard in placed.manifest.shards)
    assert not any("README" in one.url for one in client.origins(name))
    written = ForebayStore(f"{name}-written", address=address(daemon), session=tmp_path / "s")
    fill(written, format)
    written.commit()
    one, other = samples(placed, ARRAYS), samples(written, ARRAYS)
    assert one.schema == other.schema
    read = batches(one)
    assert all(map(same, read, batches(other)))
    assert torch.cat([batch["label"] for batch in read])[149:151].tolist() == [149, -7]
    for shuffled in ("full", "block"):
        for batch in batches(one, shuffle=shuffled, seed=3):
            again = other.read(batch.pop("_ids").numpy())
            assert all(torch.equal(batch[key], torch.from_numpy(again[key])) for key in batch)
    found = zarr.open_group(ForebayStore(name, address=address(daemon), read_only=True), mode="r")
    there = zarr.open_group(folder / what, mode="r")
    for path in ARRAYS.values():
        assert np.array_equal(found[path][:], there[path][:])  # type: ignore[index]
    assert client.dataset(name).verify().damaged == {}


def test_a_file_that_changed_is_refused_and_only_its_samples_are(
    client: forebay.Client, folder: Path, name: str
) -> None:
    root = folder / f"{name}.zarr"
    fill(root)
    found = samples(client.register_dataset(name, [root]), ARRAYS)
    array = zarr.open_array(root, path="image", mode="r+")
    array[80:120] = 0
    with pytest.raises(forebay.OriginChanged, match="image/c/2/0/0 has changed"):
        found.read(np.arange(NUM))
    batch = found.read(np.arange(80), ["image"])["image"]
    assert (batch.reshape(-1) == np.arange(80 * 40)).all()
    with forebay.DataLoader(found, batch_size=10, on_error="mask") as loader:
        masks = torch.cat([batch["_mask"] for batch in loader])
    assert (~masks).nonzero().reshape(-1).tolist() == list(range(80, 120))


def test_a_session_goes_on_from_what_lies_in_place(
    client: forebay.Client, daemon: DaemonProcess, folder: Path, name: str, tmp_path: Path
) -> None:
    first = client.register_dataset(name, [folder / "three.zarr"])
    store = ForebayStore(name, address=address(daemon), session=tmp_path / "session")
    zarr.open_array(store, path="image", mode="r+")[:40] = 0
    assert store.commit() == 2
    second = client.dataset(name)
    assert second.manifest.shards[: len(first.manifest.shards)] == first.manifest.shards
    before, after = samples(first, ARRAYS), samples(second, ARRAYS)
    rows = np.arange(NUM)
    old, new = before.read(rows), after.read(rows)
    assert not new["image"][:40].any()
    assert (new["image"][40:] == old["image"][40:]).all()
    assert (new["label"] == old["label"]).all()
    zarr.open_array(store, path="equal", mode="r+")[7] = 5
    assert store.commit() == 3
    assert samples(store, ["equal"]).read(rows)["equal"].sum() == NUM + 4


@both_ways
def test_pinned_the_files_may_go(client: forebay.Client, folder: Path, name: str) -> None:
    root = folder / f"{name}.zarr"
    fill(root)
    wanted = samples(client.register_dataset(name, [root]), ARRAYS).read(np.arange(NUM))
    pinned = client.pin_origins(name)
    root.rename(folder / f"{name}-gone")
    bands.process_bands().__init__()  # type: ignore[misc]
    assert all(shard.origin is None for shard in pinned.manifest.shards)
    found = samples(pinned, ARRAYS).read(np.arange(NUM))
    assert all((found[key] == wanted[key]).all() for key in ARRAYS)


def test_the_daemon_reads_ahead_what_the_loader_will_want(
    client: forebay.Client, folder: Path, name: str
) -> None:
    root = folder / f"{name}.zarr"  # of which nobody has read anything
    fill(root)
    found = samples(client.register_dataset(name, [root]), ["image", "equal"])
    assert not any(one.blob for one in client.origins(name) if "image/c" in one.url)
    with forebay.DataLoader(
        found, global_batch_size=10, shuffle="block", block_rows=100, window_blocks=1, num_threads=0
    ) as loader:
        assert len(next(iter(loader))["image"]) == 10
        assert loader.report().reading["origin"] > 0, "what it waited for"
        deadline = time.monotonic() + 60
        while not all(one.blob for one in client.origins(name) if "deep" not in one.url):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert loader.report().plan_problem == ""
    unread = [one.url for one in client.origins(name) if not one.blob]
    assert unread, "what the loader does not read is left alone"
    assert all("deep/label/c" in url for url in unread)


def test_what_is_no_store_is_refused(client: forebay.Client, folder: Path, name: str) -> None:
    place = folder / name
    place.mkdir()
    (place / "data").write_bytes(b"secret")
    with pytest.raises(forebay.InvalidRequest, match=r"is no zarr store: there is no zarr\.json"):
        client.register_dataset(name, [place], format="zarr")
    (place / "zarr.json").write_text("{}")
    (place / "numbers").mkdir()
    (place / "numbers" / "9").write_bytes(b"secret")
    with pytest.raises(forebay.InvalidRequest, match="numbers/9 is no file of an array of zarr"):
        client.register_dataset(name, [place])
    (place / "numbers" / ".zattrs").write_text("secret")
    with pytest.raises(forebay.InvalidRequest, match=r"is no JSON object|is no file of an array"):
        client.register_dataset(name, [place])
    with pytest.raises(forebay.InvalidRequest, match="a dataset is one zarr store"):
        client.register_dataset(name, [folder / "two.zarr", folder / "three.zarr"])


def test_objects_of_s3_in_place(
    s3: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in s3.environment.items():  # this process lists the store
        monkeypatch.setenv(variable, value)
    s3.file_system().clear_instance_cache()  # those of other tests have other keys
    fill(tmp_path / "made.zarr")
    place = s3.url("zarr-corpus")
    s3.file_system().put(str(tmp_path / "made.zarr"), f"{place}/made.zarr", recursive=True)
    options = ",".join(f"{name}={value}" for name, value in s3.options.items())
    arguments = ("--origin-prefixes", place, "--origin-options", options)
    with (
        DaemonProcess(tmp_path / "data", *arguments) as daemon,
        forebay.connect(address(daemon)) as client,
    ):
        found = samples(client.register_dataset("d", [f"{place}/made.zarr"]), ARRAYS)
        image = np.arange(NUM * 40).reshape(NUM, 8, 5)
        assert (found.read(np.arange(NUM))["image"] == image).all()
