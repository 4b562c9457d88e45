"""The data folder of a daemon: its lock, its secrets, its address file and its sockets' folder."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from blake3 import blake3

from forebay_wire.errors import AlreadyRunning, InvalidRequest, StorageError
from forebay_wire.limits import MAX_UNIX_PATH_BYTES
from forebay_wire.protocol import (
    ADDRESS_FILE_NAME,
    DESCRIPTOR_SOCKET_NAME,
    LOCK_FILE_NAME,
    RPC_SOCKET_NAME,
)

SECRET_FILE_NAME: Final = "secret.key"
TOKEN_FILE_NAME: Final = "token"
NODE_FILE_NAME: Final = "node.json"
HTTP_PORT_FILE_NAME: Final = "http-port"
SECRET_BYTES: Final = 32

LOCK_PATIENCE_SECONDS: Final = 1.0
"""Clients probe the lock for an instant; a daemon that starts just then must not give up."""


class FolderLock:
    """The flock that makes a daemon the only one of its data folder; held until closed.

    The kernel releases it when the process ends, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        make_private_folder(self._folder)
        path = self._folder / LOCK_FILE_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"cannot open {path}: {error.strerror}; check owner and mode of the data folder"
            ) from error
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > deadline:
                raise AlreadyRunning(self._refusal(descriptor))
            time.sleep(0.02)

    def _refusal(self, descriptor: int) -> str:
        folder = self._folder.resolve()
        pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        return (
            f"another daemon, pid {pid}, serves the data folder {folder}: connect to it "
            f"with forebay.connect({str(folder)!r}), or stop it first (kill {pid})"
        )


@dataclass(frozen=True)
class Sockets:
    """Where the daemon's two Unix sockets lie."""

    folder: Path

    @property
    def rpc(self) -> Path:
        return self.folder / RPC_SOCKET_NAME

    @property
    def descriptors(self) -> Path:
        return self.folder / DESCRIPTOR_SOCKET_NAME

    def remove(self) -> None:
        """Remove both, also those that a killed daemon left; only the lock's holder may."""
        for path in (self.rpc, self.descriptors):
            path.unlink(missing_ok=True)


def make_private_folder(folder: Path) -> None:
    """Make *folder* and what is missing above it; a new one is for this user only."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder: give another one, or move it away")


def make_sockets(data_folder: Path, environment: Mapping[str, str]) -> Sockets:
    """The sockets' folder of a data folder, made with mode 0700 and checked to be ours.

    It lies under ``$XDG_RUNTIME_DIR`` or, without one, under ``/tmp/forebay-<uid>``: data folders
    may lie deeper than the 107 bytes of a Unix socket's path, and on file systems without sockets.
    """
    name = blake3(os.fsencode(data_folder.resolve())).hexdigest()[:16]
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if runtime and os.path.isabs(runtime) and os.access(runtime, os.W_OK | os.X_OK):
        sockets = Sockets(Path(runtime) / f"forebay-{name}")
    else:
        ours = Path(f"/tmp/forebay-{os.geteuid()}")  # noqa: S108 - its owner is checked below
        _make_own_folder(ours)
        sockets = Sockets(ours / name)
    _make_own_folder(sockets.folder)
    for path in (sockets.rpc, sockets.descriptors):
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            raise InvalidRequest(
                f"the socket path {path} is longer than {MAX_UNIX_PATH_BYTES} bytes: set "
                "XDG_RUNTIME_DIR to a shorter folder, or unset it"
            )
    return sockets


def _make_own_folder(folder: Path) -> None:
    """Make *folder* for this user only; refuse one that somebody else could have prepared."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StorageError(
            f"{folder} is no folder of uid {os.geteuid()}: somebody else made it; remove it, or "
            "set XDG_RUNTIME_DIR to a folder of your own"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)


def load_secret(folder: Path) -> bytes:
    """The key of tokens and tickets: made once, so that tokens outlive a restart."""
    path = folder / SECRET_FILE_NAME
    with suppress(FileNotFoundError):
        secret = path.read_bytes()
        if len(secret) != SECRET_BYTES:
            raise StorageError(
                f"{path} holds {len(secret)} bytes and not {SECRET_BYTES}: remove it; clients "
                "then need new tokens"
            )
        return secret
    secret = secrets.token_bytes(SECRET_BYTES)
    write_private(path, secret)
    return secret


def load_node(folder: Path) -> str:
    """The random name of this node, made at the folder's first start."""
    path = folder / NODE_FILE_NAME
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["node"])
    except FileNotFoundError:
        node = secrets.token_hex(8)
        write_private(path, json.dumps({"node": node}).encode())
        return node
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} does not name a node: restore it from the catalog's table nodes"
        ) from error


def load_http_port(folder: Path) -> int:
    """The port on which the folder's last daemon served bytes; 0 before the first."""
    with suppress(OSError, ValueError):
        port = int((folder / HTTP_PORT_FILE_NAME).read_text(encoding="ascii"))
        return port if 0 < port < 1 << 16 else 0
    return 0


def save_http_port(folder: Path, port: int) -> None:
    """Remember the port: readers elsewhere know no other way to find a restarted daemon."""
    if port != load_http_port(folder):
        write_private(folder / HTTP_PORT_FILE_NAME, f"{port}\n".encode())


@dataclass(frozen=True)
class DaemonAddress:
    """What ``daemon.json`` tells about a running daemon."""

    pid: int
    incarnation: str
    node: str
    version: str
    rpc: str
    tcp: str | None
    descriptor_socket: str
    http_url: str
    protocols: str

    def write(self, folder: Path) -> None:
        """Write it whole or not at all; every address in it must be listening already."""
        write_private(folder / ADDRESS_FILE_NAME, json.dumps(vars(self), indent=2).encode() + b"\n")


def remove_address(folder: Path) -> None:
    """Remove ``daemon.json``: nobody listens any more."""
    (folder / ADDRESS_FILE_NAME).unlink(missing_ok=True)


def write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 so that readers see the old or the new content, durably."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
