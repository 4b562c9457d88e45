"""The data folder: one lock, private files, a socket folder that nobody else prepared."""

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay_server.folder import (
    FolderLock,
    load_node,
    load_secret,
    make_sockets,
    write_private,
)
from forebay_wire.errors import AlreadyRunning, InvalidRequest, StorageError

HOLD_LOCK = """
import sys
from pathlib import Path
from forebay_server.folder import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def runtime() -> Iterator[dict[str, str]]:
    """An environment with a runtime folder of its own, short enough for a socket's path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield {"XDG_RUNTIME_DIR": folder}


def test_lock_of_another_process_is_refused_with_its_pid(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyRunning, match=rf"pid {holder.pid}.*forebay\.connect"):
            FolderLock(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        with FolderLock(tmp_path):  # the kernel gave it back
            pass


def test_lock_waits_out_a_client_that_only_probes(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    probing = threading.Timer(0.2, os.close, (descriptor,))
    probing.start()
    with FolderLock(tmp_path):
        pass
    probing.join()


def test_new_data_folder_is_private(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b"):
        assert mode(tmp_path / "a" / "b") == 0o700
        assert mode(tmp_path / "a" / "b" / "lock") == 0o600


def test_sockets_lie_in_the_runtime_folder(tmp_path: Path, runtime: dict[str, str]) -> None:
    sockets = make_sockets(tmp_path, runtime)
    assert sockets.folder.parent == Path(runtime["XDG_RUNTIME_DIR"])
    assert mode(sockets.folder) == 0o700
    assert make_sockets(tmp_path, runtime) == sockets
    assert make_sockets(tmp_path / "other", runtime) != sockets


def test_one_data_folder_has_one_socket_folder_by_any_path(
    tmp_path: Path, runtime: dict[str, str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert make_sockets(tmp_path / "link", runtime) == make_sockets(tmp_path, runtime)


def test_without_runtime_folder_sockets_lie_in_a_private_one(tmp_path: Path) -> None:
    sockets = make_sockets(tmp_path, {})
    try:
        assert sockets.folder.parent == Path(f"/tmp/forebay-{os.geteuid()}")
        assert mode(sockets.folder.parent) == 0o700
    finally:
        sockets.folder.rmdir()


def test_too_long_socket_path_says_what_to_do(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with pytest.raises(InvalidRequest, match="107 bytes: set XDG_RUNTIME_DIR"):
        make_sockets(tmp_path, {"XDG_RUNTIME_DIR": str(long)})


def test_socket_folder_that_is_a_link_is_refused(tmp_path: Path, runtime: dict[str, str]) -> None:
    sockets = make_sockets(tmp_path, runtime)
    sockets.folder.rmdir()
    (tmp_path / "trap").mkdir()
    sockets.folder.symlink_to(tmp_path / "trap")
    with pytest.raises(StorageError, match="somebody else made it"):
        make_sockets(tmp_path, runtime)


def test_secret_and_node_stay_the_same(tmp_path: Path) -> None:
    assert load_secret(tmp_path) == load_secret(tmp_path)
    assert load_node(tmp_path) == load_node(tmp_path)
    assert mode(tmp_path / "secret.key") == 0o600


def test_damaged_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_bytes(b"short")
    with pytest.raises(StorageError, match="5 bytes and not 32"):
        load_secret(tmp_path)


def test_private_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, b"new")
    assert (path.read_text(), mode(path)) == ("new", 0o600)
    assert os.listdir(tmp_path) == ["file"]
