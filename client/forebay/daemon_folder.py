"""The daemon of a data folder: found if it runs, started if not, once however many ranks race.

A daemon that was started here runs in its own session, writes ``DIR/daemon.log``, and ends by
itself some time after its last client. What makes it the only one is its own lock on the folder.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forebay.transfer.connection import DescriptorConnection, Hello
from forebay.waiting import Backoff, Deadline
from forebay_wire.errors import DaemonUnavailable, InvalidRequest, NotFound, StorageError
from forebay_wire.protocol import ADDRESS_FILE_NAME, LOCK_FILE_NAME

IDLE_EXIT_SECONDS: Final = 60
"""A daemon that a client started ends when for so long no client was there and all is safe."""

LOG_FILE_NAME: Final = "daemon.log"
START_LOCK_NAME: Final = "start.lock"
"""Held by the one client that starts the daemon, while the others wait."""

ALREADY_RUNNING: Final = 3
"""Exit status of a daemon that found another one in its folder."""

LOG_TAIL_LINES: Final = 15


@dataclass(frozen=True)
class RunningDaemon:
    """A daemon that answered, and where."""

    rpc: str
    descriptor_socket: str
    hello: Hello


def is_data_folder(folder: Path) -> bool:
    """Whether a daemon has ever served *folder*."""
    return (folder / LOCK_FILE_NAME).exists()


def find(folder: Path) -> RunningDaemon | None:
    """The daemon that serves *folder* right now; None if none answers."""
    try:
        written = json.loads((folder / ADDRESS_FILE_NAME).read_text(encoding="utf-8"))
        rpc, data = str(written["rpc"]), str(written["descriptor_socket"])
        connection, hello = DescriptorConnection.connect(data)
    except (FileNotFoundError, NotADirectoryError, DaemonUnavailable):
        return None
    except PermissionError as error:
        raise StorageError(f"cannot read {error.filename}: it is another user's") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{folder / ADDRESS_FILE_NAME} is no address of a daemon ({error}): remove it"
        ) from error
    connection.close()
    return RunningDaemon(rpc, data, hello)


def wait(folder: Path, deadline: Deadline) -> RunningDaemon:
    """The daemon that serves *folder*, waited for; never started."""
    backoff = Backoff(limit=0.25)
    while (found := find(folder)) is None:
        if not backoff.pause(deadline):
            raise _not_served(folder)
    return found


def find_running(folder: Path, deadline: Deadline) -> RunningDaemon:
    """The daemon that serves *folder*, waited for only if it is just starting."""
    found = find(folder)
    if found is None and not _is_locked(folder):
        raise _not_served(folder)
    return found or wait(folder, deadline)


def _not_served(folder: Path) -> DaemonUnavailable:
    return DaemonUnavailable(
        f"no daemon serves the data folder {folder}: start it (forebay serve --data {folder}), "
        "or give connect() this folder, which starts one"
    )


def find_or_start(folder: Path, deadline: Deadline) -> RunningDaemon:
    """The daemon that serves *folder*; starts one if none does.

    Of any number of processes that call this at once, one starts it and all get the same.
    Raises DaemonUnavailable with the end of its log if it does not come up in time.
    """
    found = find(folder)
    if found is not None:
        return found
    _make_folder(folder)
    with _start_lock(folder, deadline) as is_ours:
        if is_ours:
            return _start(folder, deadline)
    return wait(folder, deadline)  # another client's start has just succeeded


def _start(folder: Path, deadline: Deadline) -> RunningDaemon:
    process: subprocess.Popen[bytes] | None = None
    backoff = Backoff(limit=0.1)
    while (found := find(folder)) is None:
        if process is None and not deadline.expired and not _is_locked(folder):
            process = _spawn(folder)
        if process is not None and process.poll() is not None:
            if process.returncode != ALREADY_RUNNING:
                raise _failed_start(folder, f"ended with status {process.returncode}")
            process = None
        if not backoff.pause(deadline):
            raise _failed_start(folder, f"did not answer within {deadline.seconds:.0f} s")
    if process is not None:
        # Reaps it, should it end before we do; holding the object keeps Popen from complaining.
        threading.Thread(target=process.wait, name="forebay-daemon-reaper", daemon=True).start()
    return found


def _spawn(folder: Path) -> subprocess.Popen[bytes]:
    if importlib.util.find_spec("forebay_server") is None:
        raise DaemonUnavailable(
            f"no daemon serves {folder}, and none can be started: the daemon is not installed "
            "(pip install 'forebay[server]')"
        )
    # -P: modules beside the data must not shadow the daemon's.
    command = [sys.executable, "-P", "-m", "forebay_server", "serve", "--data", str(folder)]
    log = os.open(folder / LOG_FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        # A session of its own: launchers like torchrun kill process groups.
        return subprocess.Popen(
            [*command, "--idle-exit", str(IDLE_EXIT_SECONDS)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)


def _make_folder(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise StorageError(
            f"cannot make the data folder {folder}: {error.strerror}; give another one"
        ) from error
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder: give connect() a folder or an address")


@contextmanager
def _start_lock(folder: Path, deadline: Deadline) -> Iterator[bool]:
    """Hold the folder's start lock; yields False if somebody else's start made it needless."""
    try:
        descriptor = os.open(folder / START_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write to the data folder {folder}: {error.strerror}") from error
    try:
        backoff = Backoff(limit=0.1)
        while not _try_lock(descriptor):
            if find(folder) is not None:
                yield False
                return
            if not backoff.pause(deadline):
                raise _failed_start(
                    folder, f"is being started by another process since {deadline.seconds:.0f} s"
                )
        yield True
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(folder: Path) -> bool:
    """Whether a daemon owns *folder*, answering yet or not."""
    try:
        descriptor = os.open(folder / LOCK_FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _failed_start(folder: Path, what: str) -> DaemonUnavailable:
    log = folder / LOG_FILE_NAME
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    tail = "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:]) or "  (empty)"
    return DaemonUnavailable(
        f"the daemon of the data folder {folder} {what}; the end of its log {log}:\n{tail}"
    )


def require(folder: Path) -> None:
    """Raise NotFound unless *folder* is a data folder already."""
    if not is_data_folder(folder):
        raise NotFound(
            f"{folder} is no data folder of Forebay: give the right one (--data DIR), or make one "
            f"(forebay serve --data {folder})"
        )
