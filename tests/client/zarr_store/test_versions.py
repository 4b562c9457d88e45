"""Arrays of zarr in versions: written once, read by zarr, older versions as they were."""

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync

import forebay
from forebay.zarr import ForebayStore
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import new_random_name


@pytest.fixture
def address(daemon: DaemonProcess, way: str) -> str:
    return str(daemon.address()["rpc"])


@pytest.fixture
def session(tmp_path: Path, address: str) -> ForebayStore:
    name = f"zarr-{new_random_name()}"
    return ForebayStore(name, address=address, session=tmp_path / "session")


def reader(store: ForebayStore, version: int | str = "latest") -> ForebayStore:
    return ForebayStore(store.name, address=store.address, version=version, read_only=True)


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, (100, 30)).astype("i4")


def test_an_array_and_its_next_version(session: ForebayStore) -> None:
    first = values()
    array = zarr.create_array(session, name="t", shape=first.shape, chunks=(7, 30), dtype="i4")
    array[:] = first
    array.attrs["unit"] = "K"
    assert session.commit() == 1
    second = first.copy()
    second[10:20] += 1
    again = zarr.open_array(session, path="t", mode="r+")
    assert (again[:] == first).all()
    again[10:20] = second[10:20]
    assert session.commit() == 2
    for version, wanted in ((1, first), (2, second), ("latest", second)):
        found = zarr.open_array(reader(session, version), path="t", mode="r")
        assert (found[:] == wanted).all()
        assert found.attrs["unit"] == "K"
    with forebay.connect(session.address) as client:  # only the chunks that changed were written
        rows = client.dataset(session.name, 1).num_rows, client.dataset(session.name).num_rows
    assert rows == (18, 18 + 3)  # 15 chunks, 2 of metadata, the index; then 2, and the index


def test_what_is_set_is_seen_by_nobody_before_the_commit(session: ForebayStore) -> None:
    sync(session.set("a", cpu.Buffer.from_bytes(b"1")))
    session.commit()
    other = reader(session)
    assert sync(other.get("a")).to_bytes() == b"1"
    sync(session.set("a", cpu.Buffer.from_bytes(b"2")))
    sync(session.set("b", cpu.Buffer.from_bytes(b"3")))
    sync(session.delete("a"))
    assert sync(session.get("a")) is None
    assert sync(reader(session).get("a")).to_bytes() == b"1"
    session.commit()
    assert sync(other.get("a")).to_bytes() == b"1", "a reader stays on its version"
    assert sync(reader(session).get("a")) is None
    assert sync(reader(session).get("b")).to_bytes() == b"3"
    with pytest.raises(FileNotFoundError):
        sync(reader(session).getsize("a"))


def test_values_are_not_copied_from_mapped_memory(
    session: ForebayStore, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "http":
        pytest.skip("nothing is mapped over HTTP")
    sync(session.set("a", cpu.Buffer.from_bytes(b"x" * 100_000)))
    session.commit()
    store = reader(session)
    one, two = (sync(store.get("a")).as_numpy_array() for _ in range(2))
    assert np.shares_memory(one, two)
    assert not one.flags.writeable


def test_of_two_sessions_the_later_one_is_refused(session: ForebayStore, tmp_path: Path) -> None:
    session.commit()
    other = ForebayStore(session.name, address=session.address, session=tmp_path / "other")
    sync(other.set("a", cpu.Buffer.from_bytes(b"1")))
    sync(session.set("a", cpu.Buffer.from_bytes(b"2")))
    session.commit()
    with pytest.raises(forebay.Conflict, match="the session began with version 1"):
        other.commit()
    assert sync(other.get("a")).to_bytes() == b"1", "what was set is still there"


WRITE_PART = """
import pickle, sys
import zarr
store, start, data = pickle.load(sys.stdin.buffer)
zarr.open_array(store, path="t", mode="r+")[start : start + len(data)] = data
"""


def test_processes_write_one_version_together(session: ForebayStore) -> None:
    wanted = values()
    zarr.create_array(session, name="t", shape=wanted.shape, chunks=(25, 30), dtype="i4")
    for start in (0, 50):
        given = pickle.dumps((session, start, wanted[start : start + 50]))
        subprocess.run([sys.executable, "-c", WRITE_PART], input=given, check=True, timeout=60)
    session.commit()
    assert (zarr.open_array(reader(session), path="t", mode="r")[:] == wanted).all()


def test_a_session_is_gone_on_with_later(session: ForebayStore) -> None:
    sync(session.set("a", cpu.Buffer.from_bytes(b"1")))
    session.commit()
    sync(session.set("b", cpu.Buffer.from_bytes(b"2")))
    sync(session.delete("a"))
    later = ForebayStore(session.name, address=session.address, session=session.session)
    assert sync(later.get("a")) is None
    assert later.commit() == 2
    assert sync(reader(session).get("b")).to_bytes() == b"2"
    assert not sync(reader(session).exists("a"))


def test_many_reads_at_once(session: ForebayStore) -> None:
    async def all_of_them() -> list[bytes]:
        store = reader(session)
        found = await asyncio.gather(*(store.get(f"k/{number}") for number in range(300)))
        return [one.to_bytes() for one in found]

    for number in range(300):
        sync(session.set(f"k/{number}", cpu.Buffer.from_bytes(b"%d" % number)))
    session.commit()
    assert asyncio.run(all_of_them()) == [b"%d" % number for number in range(300)]


def test_what_is_no_store_or_not_there_is_named(session: ForebayStore) -> None:
    with pytest.raises(forebay.NotFound):
        sync(reader(session).get("a", default_buffer_prototype()))
    with (
        forebay.connect(session.address) as client,
        client.create_dataset(session.name, {"x": "int64"}) as writer,
    ):
        writer.write(x=1)
    with pytest.raises(forebay.InvalidRequest, match="is no zarr store: it has the columns x"):
        sync(reader(session).get("a"))
    with pytest.raises(forebay.InvalidRequest, match="without a session is read only"):
        ForebayStore(session.name, address=session.address)
