"""What becomes of what was set: sessions that collide, are shared, cut off, or given nonsense."""

import errno
import itertools
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zarr.core.buffer import cpu

import forebay
from forebay import zarr_session
from forebay.dataset.parallel import WriteSession
from forebay.zarr import MAX_ROW_BYTES, ForebayStore
from forebay.zarr_journal import Journal
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import new_random_name


@pytest.fixture
def address(daemon: DaemonProcess) -> str:
    return str(daemon.address()["rpc"])


@pytest.fixture
def store(tmp_path: Path, address: str) -> ForebayStore:
    return ForebayStore(
        f"zarr-{new_random_name()}", address=address, session=tmp_path / "sessions" / "first"
    )


def sharing(store: ForebayStore) -> ForebayStore:
    """As another process that is given the same session."""
    return ForebayStore(store.name, address=store.address, session=store.session)


def another(store: ForebayStore, name: str) -> ForebayStore:
    assert store.session is not None
    return ForebayStore(store.name, address=store.address, session=store.session.parent / name)


def put(store: ForebayStore, **values: str) -> None:
    for key, value in values.items():
        store.set_sync(key, cpu.Buffer.from_bytes(value.encode()))


def content(store: ForebayStore) -> dict[str, str]:
    found = {key: store.get_sync(key) for key in store._keys("")}
    return {key: value.to_bytes().decode() for key, value in found.items() if value is not None}


def published(store: ForebayStore) -> dict[str, str]:
    return content(ForebayStore(store.name, address=store.address, read_only=True))


def num_versions(store: ForebayStore) -> int:
    with forebay.connect(store.address) as client:
        return len(client.describe_dataset(store.name).versions)


def around(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    *,
    before: Callable[[], Any] = lambda: None,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """Have something happen once, just before or after a call of *method*."""
    real = getattr(owner, method)

    def called(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(owner, method, real)
        before()
        result = real(*arguments, **named)
        after()
        return result

    monkeypatch.setattr(owner, method, called)


def cut_off() -> None:
    raise KeyboardInterrupt


# Sessions that collide.


def test_a_commit_between_look_and_append_is_a_conflict(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, a="1", b="1")
    store.commit()
    other = another(store, "other")
    put(store, a="2")
    put(other, b="2")
    around(monkeypatch, forebay.Client, "write_session", before=other.commit)
    with pytest.raises(forebay.Conflict):
        store.commit()
    assert published(store) == {"a": "1", "b": "2"}
    assert content(store) == {"a": "2", "b": "1"}, "what was set is still there"


def test_of_two_that_create_the_later_one_is_refused(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = another(store, "other")
    put(store, a="1")
    put(other, b="2")
    around(monkeypatch, forebay.Client, "write_session", before=other.commit)
    with pytest.raises(forebay.Conflict, match="began with version 0, and the newest is 1"):
        store.commit()
    assert published(store) == {"b": "2"}


def test_a_dataset_that_was_deleted_and_made_anew_is_a_conflict(store: ForebayStore) -> None:
    put(store, a="1", b="1")
    store.commit()
    put(store, a="2")
    with forebay.connect(store.address) as client:
        client.delete_dataset(store.name)
    new = another(store, "new")
    put(new, c="3")
    assert new.commit() == 1
    for stale in (store, sharing(store)):
        with pytest.raises(forebay.Conflict, match="made anew"):
            stale.commit()
    with pytest.raises(forebay.Conflict, match="made anew"):
        sharing(store).get_sync("b")
    assert published(store) == {"c": "3"}


# Sessions that are shared.


def test_those_that_share_a_session_go_on_after_a_commit(store: ForebayStore) -> None:
    put(store, a="1")
    store.commit()
    other = sharing(store)
    assert content(other) == {"a": "1"}
    put(store, a="2")
    assert content(other) == {"a": "2"}
    assert store.commit() == 2
    assert content(other) == {"a": "2"}
    put(other, b="3")
    assert other.commit() == 3
    assert content(store) == published(store) == {"a": "2", "b": "3"}
    put(store, c="4")
    assert store.commit() == 4


def test_an_empty_session_begins_with_the_newest_version(store: ForebayStore) -> None:
    put(store, a="1")
    store.commit()
    other = another(store, "other")
    put(other, b="2")
    other.commit()
    later = sharing(store)
    put(later, c="3")
    assert later.commit() == 3
    assert published(store) == {"a": "1", "b": "2", "c": "3"}


def test_what_is_set_during_a_commit_is_not_lost(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, a="1", b="1", c="1")
    other = sharing(store)

    def meanwhile() -> None:
        assert content(other) == {"a": "1", "b": "1", "c": "1"}
        put(other, b="2", d="2")
        other.delete_sync("a")
        assert content(other) == content(store) == {"b": "2", "c": "1", "d": "2"}

    around(monkeypatch, WriteSession, "commit", before=meanwhile)
    assert store.commit() == 1
    assert published(store) == {"a": "1", "b": "1", "c": "1"}
    assert content(other) == content(store) == {"b": "2", "c": "1", "d": "2"}
    assert other.commit() == 2
    assert published(store) == {"b": "2", "c": "1", "d": "2"}


def test_setting_while_others_commit(store: ForebayStore) -> None:
    """Nothing is lost or comes back, and every read sees what its thread has set."""
    errors: list[str] = []

    def go_on(name: str) -> None:
        mine = sharing(store)
        for number in range(30):
            put(mine, **{f"{name}-{number % 5}": str(number)})
            mine.delete_sync(f"{name}-{(number + 2) % 5}")
            value = mine.get_sync(f"{name}-{number % 5}")
            if value is None or value.to_bytes() != str(number).encode():
                errors.append(f"{name}: {number} became {value}")
            if mine.get_sync(f"{name}-{(number + 2) % 5}") is not None:
                errors.append(f"{name}: what was deleted before {number} came back")

    put(store, begun="yes")
    threads = [threading.Thread(target=go_on, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.commit()
    store.commit()
    left = {f"{name}-{number % 5}": str(number) for name in "xyz" for number in (27, 28, 29)}
    assert not errors
    assert published(store) == {"begun": "yes", **left}


# Commits that are cut off.


def test_after_a_commit_that_failed_all_of_it_is_committed_at_once(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, a="1", b="1")
    around(monkeypatch, WriteSession, "commit", before=cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.commit()
    later = sharing(store)
    assert content(later) == {"a": "1", "b": "1"}
    later.delete_sync("a")
    put(later, c="2")
    assert later.commit() == 1
    assert published(store) == {"b": "1", "c": "2"}


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_commit_cut_off_after_its_version_is_recognised(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    put(store, z="0")
    store.commit()
    put(store, a="1")
    around(monkeypatch, WriteSession, "commit", after=cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.commit()
    later = sharing(store)
    if goes_on:
        put(later, b="2")
    assert later.commit() == num_versions(store) == (3 if goes_on else 2)
    assert published(store) == {"z": "0", "a": "1", **({"b": "2"} if goes_on else {})}


def test_a_child_forked_during_a_read_can_read(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    address = str(own_daemon.address()["rpc"])
    writer = ForebayStore("w", address=address, session=tmp_path / "session")
    put(writer, a="1")
    writer.commit()
    store = ForebayStore("w", address=address, read_only=True)
    reading = threading.Thread(target=store.get_sync, args=("a",))
    os.kill(own_daemon.pid, signal.SIGSTOP)  # it does not answer
    try:
        reading.start()
        until = time.monotonic() + 20
        while not _is_calling(reading):
            assert time.monotonic() < until
            time.sleep(0.001)
        if (child := os.fork()) == 0:
            _end_with(store)
    finally:
        os.kill(own_daemon.pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    reading.join(timeout=30)
    assert not reading.is_alive()


def _end_with(store: ForebayStore) -> None:
    """In the child: 0 if it can read."""
    signal.alarm(20)  # ends one that hangs
    warnings.simplefilter("ignore")  # that its calls go by way of another process
    status = 1
    try:
        value = store.get_sync("a")
        status = 0 if value is not None and value.to_bytes() == b"1" else 2
    finally:
        os._exit(status)


def _is_calling(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith("_channel.py"):
            return True
        frame = frame.f_back
    return False


def test_equal_content_has_an_equal_manifest(store: ForebayStore, tmp_path: Path) -> None:
    found = set()
    for name in ("one", "two"):
        one = another(store, name)
        put(one, a="1", b="2")
        one.commit()
        put(one, b="3")
        one.commit()
        with forebay.connect(store.address) as client:
            dataset = client.dataset(store.name)
            found.add(dataset.manifest_id)
            assert dataset.manifest.metadata == {"zarr": 3}
            client.delete_dataset(store.name)
    assert len(found) == 1


# Sessions on a disk.


def test_what_was_not_on_disk_when_the_machine_stopped_is_refused(store: ForebayStore) -> None:
    """As ext4 may leave a file that was written and renamed, and not synced."""
    put(store, a="1", b="some more", c="3")
    (layer,) = (store.session / "layers").iterdir()
    for key, left in (("a", 0), ("b", 10)):
        os.truncate(layer / "set" / key, left)
    for key in "ab":
        with pytest.raises(forebay.IntegrityError, match=f"set/{key} is incomplete"):
            store.get_sync(key)
    with pytest.raises(forebay.IntegrityError, match=r"set/a, .*set/b is incomplete.* again"):
        store.commit()
    put(store, a="4", b="5")
    assert store.commit() == 1
    assert published(store) == {"a": "4", "b": "5", "c": "3"}


def value_of(store: ForebayStore, key: str) -> Path:
    """The file of a value that was set."""
    found = [path / "set" / key for path in (store.session / "layers").iterdir()]
    (path,) = [path for path in found if path.is_file()]
    return path


@pytest.mark.parametrize("again", ["set", "deleted"])
@pytest.mark.parametrize("lost", ["set", "overwritten", "deleted", "deleted below"])
def test_what_a_power_cut_took_is_named(store: ForebayStore, lost: str, again: str) -> None:
    """As after a rename, or the removal of a name, that was not on disk yet."""
    put(store, **{"x/0": "below", "kept": "yes"})
    store.commit()
    put(store, other="1")
    if lost == "set":
        put(store, **{"x/0": "1"})
        value_of(store, "x/0").unlink()
    elif lost == "overwritten":
        put(store, **{"x/0": "1"})
        before = value_of(store, "x/0").read_bytes()
        put(store, **{"x/0": "2"})
        value_of(store, "x/0").write_bytes(before)
    elif lost == "deleted":
        put(store, **{"x/0": "1"})
        path = value_of(store, "x/0")
        before = path.read_bytes()
        store.delete_sync("x/0")
        path.write_bytes(before)
    else:
        store.delete_sync("x/0")
        (tombstone,) = store.session.glob("layers/*/deleted/*")
        tombstone.unlink()
    for one in (sharing(store), sharing(store)):
        assert one._keys("") == ["kept", "other", "x/0"]
        for use in (one.get_sync, one._size):
            with pytest.raises(forebay.IntegrityError, match="set/x/0 is incomplete, missing"):
                use("x/0")
        with pytest.raises(forebay.IntegrityError, match="set/x/0 is incomplete, missing"):
            one.commit()
        assert content_of(one, "other") == "1"
    later = sharing(store)
    wanted = {"kept": "yes", "other": "1"}
    if again == "set":
        put(later, **{"x/0": "3"})
        wanted["x/0"] = "3"
    else:
        later.delete_sync("x/0")
    assert content(later) == content(one) == wanted
    assert one.commit() == 2
    assert published(store) == wanted


def content_of(store: ForebayStore, key: str) -> str:
    found = store.get_sync(key)
    assert found is not None
    return str(found.to_bytes().decode())


def test_what_was_lost_in_the_midst_of_a_commit_is_named(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was set while a commit was under way that was cut off after its version."""
    put(store, a="1")
    around(monkeypatch, WriteSession, "commit", before=lambda: put(store, b="2"), after=cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.commit()
    value_of(store, "b").unlink()
    with pytest.raises(forebay.IntegrityError, match="set/b is incomplete, missing"):
        sharing(store).commit()
    assert published(store) == {"a": "1"}


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("before", [{}, {"a": "0"}])
def test_a_change_that_was_cut_off_is_not_lost(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch, step: int, before: dict[str, str]
) -> None:
    put(store, b="1", **before)
    real, steps = Journal._append, itertools.count(1)

    def appends(*given: Any) -> None:
        if step == next(steps):
            os.write(given[0]._file, b'\n["a", "1234')
            cut_off()
        real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_append", appends)
        with pytest.raises(KeyboardInterrupt):
            put(store, a="2")
    wanted = {"b": "1", **(before if step == 1 else {"a": "2"})}
    later = sharing(store)
    assert content(later) == wanted
    put(later, c="3")
    assert later.commit() == 1
    assert published(store) == {**wanted, "c": "3"}


def test_a_commit_counts_on_nothing_that_cannot_be_synced(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, a="1")
    synced = []

    def fails(folder: Path) -> None:
        synced.append(folder)
        raise OSError(errno.EIO, "the disk is broken")

    with monkeypatch.context() as patched:
        patched.setattr(zarr_session, "sync_file_system", fails)
        with pytest.raises(OSError, match="the disk is broken"):
            store.commit()
    assert synced == [store.session]
    with pytest.raises(forebay.NotFound):
        published(store)
    assert store.commit() == 1
    assert published(store) == {"a": "1"}


def test_sessions_of_older_builds_are_named(store: ForebayStore) -> None:
    put(store, a="1")
    state = json.loads((store.session / "state").read_text())
    del state["format"]
    (store.session / "state").write_text(json.dumps(state))
    first = store.session.parent / "of the first builds"
    (first / "set").mkdir(parents=True)
    (first / "version").write_text("1")
    for old in (store, another(store, first.name)):
        with pytest.raises(forebay.InvalidRequest, match="begun by another build"):
            old.get_sync("a")
        with pytest.raises(forebay.InvalidRequest, match="begun by another build"):
            put(old, a="2")
    (store.session / "state").write_text("{")
    with pytest.raises(forebay.IntegrityError, match="state is no JSON"):
        store.get_sync("a")
    for fields in ({}, {"layers": [], "attempts": {}, "more": 1}, {"layers": 1, "attempts": {}}):
        (store.session / "state").write_text(json.dumps({"format": zarr_session.FORMAT, **fields}))
        with pytest.raises(forebay.IntegrityError, match="state is not complete"):
            store.get_sync("a")


# Keys, values and datasets that are none.


def test_any_ending_of_a_key_is_listed_and_committed(store: ForebayStore) -> None:
    wanted = {"c/0.part": "1", "parts/x": "2", "deleted": "3", "set/set": "4", "lock": "5"}
    put(store, **wanted)
    assert content(store) == wanted
    store.commit()
    assert published(store) == wanted


@pytest.mark.parametrize(
    "key", ["../../../../outside", "/{tmp}/outside", "a/../b", "a//b", "a/", ""]
)
def test_a_key_that_leads_elsewhere_is_refused(
    store: ForebayStore, tmp_path: Path, key: str
) -> None:
    key = key.format(tmp=tmp_path)
    (tmp_path / "outside").write_text("not yours")
    put(store, a="1")
    for change in (lambda: put(store, **{key: "x"}), lambda: store.delete_sync(key)):
        with pytest.raises(forebay.InvalidRequest, match="a key has parts"):
            change()
    assert store.get_sync(key) is None
    assert (tmp_path / "outside").read_text() == "not yours"
    assert content(store) == {"a": "1"}


def test_a_key_and_one_below_it_are_not_both_kept(store: ForebayStore) -> None:
    put(store, **{"a": "1", "x/y/z": "1"})
    for key in ("a/b", "a/b/c", "x/y", "x"):
        with pytest.raises(forebay.InvalidRequest, match="both of a key and of one below it"):
            put(store, **{key: "2"})
    assert content(store) == {"a": "1", "x/y/z": "1"}
    for key in ("a", "x/y/z"):
        store.delete_sync(key)
    put(store, **{"a/b": "2", "x": "2"})
    assert store.commit() == 1
    assert published(store) == {"a/b": "2", "x": "2"}


@pytest.mark.parametrize("key", ["k" * 256, "é" * 128, "bad\udcff", "/".join(["k"] * 3000)])
def test_a_key_that_names_no_file_is_refused(store: ForebayStore, key: str) -> None:
    for one in (store, another(store, "begun")):
        put(one, a="1")
        with pytest.raises(forebay.InvalidRequest, match=r"at most 255 bytes in UTF-8"):
            put(one, **{key: "1"})
        with pytest.raises(forebay.InvalidRequest, match=r"at most 255 bytes in UTF-8"):
            one.delete_sync(key)
        assert one.get_sync(key) is None
    put(store, **{"k" * 255: "1"})


def test_a_value_that_fits_no_shard_is_refused_when_it_is_set(store: ForebayStore) -> None:
    most = MAX_ROW_BYTES - len("big")
    with pytest.raises(forebay.InvalidRequest, match=f"'big' has {most + 1} bytes, and at most"):
        store.set_sync("big", cpu.Buffer.from_bytes(bytes(most + 1)))
    store.set_sync("big", cpu.Buffer.from_bytes(bytes(most)))
    store.commit()
    reader = ForebayStore(store.name, address=store.address, read_only=True)
    assert reader._size("big") == most


@pytest.mark.parametrize("rows", [0, 1])
def test_a_dataset_of_keys_and_values_that_is_no_store_is_named(
    store: ForebayStore, rows: int
) -> None:
    with (
        forebay.connect(store.address) as client,
        client.create_dataset(store.name, {"key": "string", "value": "binary"}) as writer,
    ):
        for _ in range(rows):
            writer.write(key="", value=b"x")
    with pytest.raises(forebay.InvalidRequest, match="no zarr store: it was not committed by"):
        published(store)


def test_rows_that_were_appended_to_a_store_are_named(store: ForebayStore) -> None:
    put(store, a="1")
    store.commit()
    with (
        forebay.connect(store.address) as client,
        client.append_dataset(store.name) as writer,
    ):
        writer.write(key="b", value=b"x")
    with pytest.raises(forebay.InvalidRequest, match="no zarr store: rows were appended"):
        published(store)
