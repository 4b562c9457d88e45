"""Directory tiers: what is on the disk, when the disk is full, and what a crash leaves."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier
from forebay_wire.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    StorageError,
)
from forebay_wire.ids import new_random_name

MIB = 1 << 20


def open_ssd(folder: Path, limit_bytes: int = 0) -> DirectoryTier:
    tier = DirectoryTier("ssd", "ssd", folder, limit_bytes=limit_bytes, reserve_bytes=0)
    tier.open()
    return tier


def write_in_pieces(tier: Tier, name: str, pieces: list[bytes]) -> None:
    with tier.create(name, 0) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.publish()


def all_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------- the volume


def test_files_lie_by_their_first_digits_and_nothing_else_does(tmp_path: Path) -> None:
    tier, name = open_ssd(tmp_path), new_random_name()
    tier.put(name, b"data")
    assert (tmp_path / "files" / name[:2] / name).read_bytes() == b"data"
    assert all_files(tmp_path) == sorted([name, "lock", "volume.json"])


def test_a_volume_of_another_tier_is_refused(tmp_path: Path) -> None:
    open_ssd(tmp_path).close()
    with pytest.raises(InvalidRequest, match="volume of tier ssd, not of tier hdd"):
        DirectoryTier("hdd", "hdd", tmp_path).open()


def test_a_folder_is_open_in_one_daemon_at_a_time(tmp_path: Path) -> None:
    tier = open_ssd(tmp_path)
    with pytest.raises(InvalidRequest, match=f"{tmp_path} is in use as tier ssd.*own \\(ssd-path"):
        open_ssd(tmp_path)
    tier.open()
    tier.close()
    open_ssd(tmp_path).close()


def open_as(node: str, folder: Path) -> DirectoryTier:
    tier = DirectoryTier("ssd", "ssd", folder, reserve_bytes=0, node=node)
    tier.open()
    return tier


def test_another_nodes_volume_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    tier, name = open_as("first", tmp_path), new_random_name()
    tier.put(name, b"data")
    tier.close()
    with pytest.raises(InvalidRequest, match=f"{tmp_path} is the ssd volume of node first"):
        open_as("second", tmp_path)
    tier = open_as("first", tmp_path)
    assert tier.get(name) == b"data"
    tier.close()


def test_a_volume_without_a_node_becomes_its_users(tmp_path: Path) -> None:
    open_ssd(tmp_path).close()
    volume = json.loads((tmp_path / "volume.json").read_text())
    open_as("first", tmp_path).close()
    assert json.loads((tmp_path / "volume.json").read_text()) == {**volume, "node": "first"}
    with pytest.raises(InvalidRequest, match="node first"):
        open_as("second", tmp_path)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InvalidRequest, match=r"thesis\.tex"):
        open_ssd(tmp_path)
    assert all_files(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"volume": 1}'])
def test_a_strange_volume_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "volume.json").write_text(content)
    with pytest.raises(InvalidRequest, match="no volume file"):
        open_ssd(tmp_path)


def test_a_file_in_the_folders_place_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "ssd").write_text("x")
    with pytest.raises(StorageError, match="ssd"):
        open_ssd(tmp_path / "ssd")


@pytest.mark.parametrize("name", ["", "x", "../" + "0" * 29, "A" * 32, "0" * 31, "0" * 32 + "\n"])
def test_a_name_that_is_not_random_is_refused(tmp_path: Path, name: str) -> None:
    tier = open_ssd(tmp_path)
    for call in (tier.read, tier.head, tier.delete, lambda name: tier.create(name, 1)):
        with pytest.raises(InvalidRequest):
            call(name)


# ----------------------------------------------------------------------------------------- a crash


DIE_WHILE_WRITING = """
import signal, sys
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
folder = sys.argv[1]
if sys.argv[2] == "object":
    tier = RemoteTier("object", "file://" + folder)
else:
    tier = DirectoryTier("ssd", "ssd", folder, reserve_bytes=0)
tier.open()
tier.put(tier.blob_name("0" * 32), b"published")
writer = tier.create(tier.blob_name("1" * 32), 5 << 20)
writer.write(bytes(3 << 20))
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("is_object", [False, True])
def test_a_killed_writer_leaves_only_what_the_next_start_sweeps(
    tmp_path: Path, is_object: bool
) -> None:
    command = [sys.executable, "-c", DIE_WHILE_WRITING, tmp_path, "object" if is_object else "ssd"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    def restart() -> Tier:
        if not is_object:
            return open_ssd(tmp_path)
        tier = RemoteTier("object", f"file://{tmp_path}")
        tier.open()
        return tier

    if is_object:
        restart()
        assert len(all_files(tmp_path / "tmp")) == 1  # it is alive: its file stays
    else:
        with pytest.raises(InvalidRequest, match="in use"):
            restart()
    process.kill()
    process.communicate()
    tier = restart()
    assert all_files(tmp_path / "tmp") == []
    assert [info.name for info in tier.list()] == [tier.blob_name("0" * 32)]
    assert tier.space().num_files == 1


# ------------------------------------------------------------------------------------- a full disk


def test_the_limit_holds_with_numbers_and_frees_by_deleting(tmp_path: Path) -> None:
    tier, name = open_ssd(tmp_path, limit_bytes=10 * MIB), new_random_name()
    tier.put(name, bytes(6 * MIB))
    with pytest.raises(ResourceExhausted, match=rf"{5 * MIB} bytes needed, {4 * MIB} free"):
        tier.create(new_random_name(), 5 * MIB)
    with tier.create(new_random_name(), 3 * MIB), pytest.raises(ResourceExhausted):
        tier.create(new_random_name(), 2 * MIB)
    tier.delete(name)
    tier.put(new_random_name(), bytes(10 * MIB))


def test_a_file_that_outgrows_the_limit_leaves_nothing(tmp_path: Path) -> None:
    tier, name = open_ssd(tmp_path, limit_bytes=10 * MIB), new_random_name()
    with pytest.raises(ResourceExhausted):
        write_in_pieces(tier, name, [bytes(MIB)] * 20)
    assert tier.space().free_bytes == 10 * MIB
    assert all_files(tmp_path) == ["lock", "volume.json"]


@contextmanager
def small_file_system(folder: Path, num_bytes: int) -> Iterator[None]:
    """A file system of its own, which only root can mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no small file system here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.needs("mount", package="mount")
def test_a_full_device_refuses_and_keeps_what_is_there(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", 8 * MIB):
        tier, name = open_ssd(tmp_path / "disk" / "ssd"), new_random_name()
        data = random_bytes(5 * MIB, 1)
        tier.put(name, data)
        with pytest.raises(ResourceExhausted, match="bytes needed"):
            tier.put(new_random_name(), data)
        (tmp_path / "disk" / "stranger").write_bytes(bytes(2 * MIB))  # the ledger cannot know
        with pytest.raises(ResourceExhausted):
            write_in_pieces(tier, new_random_name(), [bytes(100_000)] * 100)
        assert tier.get(name) == data
        assert [info.name for info in tier.list()] == [name]
        assert all_files(tmp_path / "disk" / "ssd" / "tmp") == []
        tier.delete(name)
        tier.put(new_random_name(), data)
        tier.close()


def test_the_limit_of_file_sizes_is_a_full_device_too(tmp_path: Path) -> None:
    tier = open_ssd(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(ResourceExhausted):
            tier.put(new_random_name(), bytes(2 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all_files(tmp_path) == ["lock", "volume.json"]
    assert tier.space().reserved_bytes == 0


# ------------------------------------------------------------------------------- a failing device


def test_after_a_failed_fsync_the_file_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may count pages as clean that it has lost: a second fsync would lie."""
    tier, name = open_ssd(tmp_path), new_random_name()
    writer = tier.create(name, 100)
    writer.write(b"data")
    synced = []

    def fail(descriptor: int) -> None:
        synced.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            writer.publish()
    assert len(synced) == 1
    with pytest.raises(StorageError):
        writer.publish()
    assert all_files(tmp_path) == ["lock", "volume.json"]
    assert tier.space().reserved_bytes == 0
    tier.put(name, b"data")


def test_publishing_syncs_the_file_before_its_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, name = open_ssd(tmp_path), new_random_name()
    events: list[str] = []
    fsync, link = os.fsync, os.link

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"fsync {path.relative_to(tmp_path).parts[0]}/{len(path.parts)}")
        fsync(descriptor)

    def recorded_link(source: Path, target: Path) -> None:
        events.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    depth = len(tmp_path.parts)
    tier.put(name, b"data")
    made_folder = [f"fsync tmp/{depth + 2}", f"fsync files/{depth + 1}", "link"]
    assert events == [*made_folder, f"fsync files/{depth + 2}"]
    events.clear()
    tier.put(name[:2] + new_random_name()[2:], b"data")
    assert events == [f"fsync tmp/{depth + 2}", "link", f"fsync files/{depth + 2}"]


def test_a_read_only_folder_is_named_at_the_start(tmp_path: Path) -> None:
    open_ssd(tmp_path / "ssd").close()
    made = subprocess.run(
        ["mount", "--bind", "-o", "ro", tmp_path / "ssd", tmp_path / "ssd"],
        capture_output=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip("only root can mount a folder read-only")
    try:
        with pytest.raises(StorageError, match="writable"):
            open_ssd(tmp_path / "ssd")
    finally:
        subprocess.run(["umount", tmp_path / "ssd"], check=True)


# ---------------------------------------------------------------------------------- object URLs


def test_an_unknown_object_url_is_explained() -> None:
    with pytest.raises(InvalidRequest, match="Protocol not known"):
        RemoteTier("object", "nonsense://x").open()


class LooksFirst(MemoryFileSystem):
    """Like most: looks whether the name is free, then writes."""

    protocol = "looksfirst"
    pipe_file = AbstractFileSystem.pipe_file


class NeverLooks(MemoryFileSystem):
    """Takes the mode for one more option to ignore."""

    protocol = "neverlooks"

    def pipe_file(self, path: str, value: bytes, mode: str = "", **kwargs: Any) -> None:
        super().pipe_file(path, value)


@pytest.mark.parametrize("kind", [LooksFirst, NeverLooks])
def test_a_store_that_cannot_create_exclusively_is_refused(kind: type[MemoryFileSystem]) -> None:
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    with pytest.raises(InvalidRequest, match="only if it does not exist"):
        RemoteTier("object", f"{kind.protocol}://place").open()
    assert kind().find("/place") == []


def test_an_object_url_whose_place_is_a_file_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        RemoteTier("object", f"file://{tmp_path}/file/object").open()


def test_credentials_of_an_object_url_are_not_shown() -> None:
    tier = RemoteTier("object", "nonsense://key:secret@host/bucket")
    assert "secret" not in tier.location
    with pytest.raises(InvalidRequest) as caught:
        tier.open()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../x", "a//b", ".hidden", "tmp/x", "a/"])
def test_object_names_stay_below_the_url(tmp_path: Path, name: str) -> None:
    tier = RemoteTier("object", f"file://{tmp_path}")
    tier.open()
    with pytest.raises(InvalidRequest, match="not allowed"):
        tier.put(name, b"x")


def test_objects_of_several_kinds_lie_side_by_side(tmp_path: Path) -> None:
    tier = RemoteTier("object", f"file://{tmp_path}/a/b")
    tier.open()
    for name in ("data/x", "blobs/x", "manifests/x"):
        tier.put(name, name.encode())
        with pytest.raises(AlreadyExists):
            tier.put(name, b"other")
    assert {info.name for info in tier.list("blobs/")} == {"blobs/x"}
    assert list(tier.list("nothing/")) == []
    with pytest.raises(NotFound):
        tier.read("blobs/y")
