"""The folder in which a store of zarr keeps what is set and deleted until it is committed.

``state`` says which version the session began with and which *layers* lie over it, oldest first.
What changes goes into the last one. A commit puts an empty layer on top and publishes those below;
then they are gone, and the version that it made is what the rest lies over. Each of these steps is
one replacement of ``state``, so that other processes see all of it or nothing.

Values are not synced one by one, but all of them before a commit counts on them; one that a power
cut has left incomplete until then does not match its digest, and is refused.

    state                      JSON: format, and the fields of State
    lock                       held while a commit, or the first change, is under way
    layers/NAME/set/KEY        a value, and its XXH3-64 (8 bytes, little-endian)
    layers/NAME/deleted/DIGEST of a key; empty
    layers/NAME/parts/RANDOM   a value that is being written
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from forebay_wire.errors import IntegrityError, InvalidRequest
from forebay_wire.ids import new_random_name
from forebay_wire.segments import xxh3

FORMAT: Final = 3
"""Of the folder: 1 had no ``state``, and 2 no digests."""

DIGEST_BYTES: Final = 8


@dataclass(frozen=True)
class State:
    """What a session lies over. Without layers nothing was changed since its last commit, which
    made version *number*; or never, and *token* is empty."""

    token: str = ""
    """Another one whenever anything here changes."""
    number: int = 0
    """0: there was no such dataset yet."""
    manifest: str = ""
    layers: tuple[str, ...] = ()
    attempts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Commits that were begun since *number* and of which it is not known that they went through:
    the name that the daemon knows one by, to the layers that it publishes."""


class Session:
    """Thread-safe, also among processes; nothing is kept in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layers = folder / "layers"
        self._state = folder / "state"

    def state(self) -> State:
        try:
            values = json.loads(self._state.read_bytes())
        except FileNotFoundError:
            if any((self._folder / name).exists() for name in ("version", "set", "deleted")):
                raise self._of_another_build() from None
            return State()
        except ValueError as error:
            raise IntegrityError(f"{self._state} is no JSON ({error}): set anew") from error
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != FORMAT:
            raise self._of_another_build()
        values["layers"] = tuple(values["layers"])
        values["attempts"] = {name: tuple(some) for name, some in values["attempts"].items()}
        return State(**values)

    def _of_another_build(self) -> InvalidRequest:
        return InvalidRequest(
            f"the session {self._folder} was begun by another build of Forebay, whose sessions "
            "this one does not read: commit it with that build, or set anew in an empty folder"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all that commit or begin. Let go by name: children of a fork inherit it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    # What commits and begins; for who holds the lock, but for begin().

    def begin(self, seen: State, number: int, manifest: str) -> None:
        """Lay the first layer over a version, unless the session is not as it was *seen*."""
        with self.locked():
            if self.state() == seen and not seen.layers:
                self._write(State("", number, manifest, (new_random_name(),)))

    def freeze(self, state: State, attempt: str) -> State:
        """Begin to commit all layers: from now on changes go into another one. What was changed is
        synced on return; OSError if it cannot be."""
        sync_file_system(self._folder)
        layers = (*state.layers, new_random_name())
        return self._write(
            replace(state, layers=layers, attempts={**state.attempts, attempt: state.layers})
        )

    def finish(self, state: State, attempt: str, number: int, manifest: str) -> State:
        """The attempt made version *number*; its layers are dropped."""
        left = [name for name in state.layers if name not in state.attempts[attempt]]
        layers = tuple(left) if any(self._has_changes(name) for name in left) else ()
        finished = self._write(State("", number, manifest, layers))
        for path in self._layers.glob("*"):
            if path.name not in layers:
                shutil.rmtree(path, ignore_errors=True)
        return finished

    def _write(self, state: State) -> State:
        state = replace(state, token=new_random_name())
        part = self._folder / f"{state.token}.part"
        with part.open("w") as file:
            json.dump({"format": FORMAT, **asdict(state)}, file)
            file.flush()
            os.fsync(file.fileno())  # a session whose state is cut short would be lost
        part.replace(self._state)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # or an older state, which knows nothing of a commit, might come back
        finally:
            os.close(folder)
        return state

    def _has_changes(self, layer: str) -> bool:
        folder = self._layers / layer
        return any(
            path.is_file() for kind in ("set", "deleted") for path in folder.glob(f"{kind}/**/*")
        )

    # Changing. *begun* gives the state of a session that has layers.

    def put(self, begun: Callable[[], State], key: str, value: Any) -> None:
        def place(_: State, layer: Path) -> None:
            path = layer / "set" / key
            part = layer / "parts" / new_random_name()
            for folder in (part.parent, path.parent):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    file.write(value)
                    file.write(_digest_of(value))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

        self._change(begun, place)

    def delete(
        self, begun: Callable[[], State], key: str, is_below: Callable[[State], bool]
    ) -> None:
        """*is_below*: whether there may be such a key below the last layer."""

        def place(state: State, layer: Path) -> None:
            if is_below(state):
                tombstone = layer / "deleted" / _digest(key)
                tombstone.parent.mkdir(parents=True, exist_ok=True)
                tombstone.touch()  # what is set in the same layer counts more
            path = layer / "set" / key
            if path.is_file():
                path.unlink(missing_ok=True)

        self._change(begun, place)

    def _change(self, begun: Callable[[], State], place: Callable[[State, Path], None]) -> None:
        """In the layer that is on top, and again if another one was laid over it meanwhile: the
        commit may have listed the old one before."""
        while True:
            state = begun()
            top = state.layers[-1]
            try:
                place(state, self._layers / top)
            except FileNotFoundError:  # dropped under our hands
                if self.state().layers[-1:] == (top,):
                    raise
            if self.state().layers[-1:] == (top,):
                return

    # Looking. A commit may drop layers meanwhile: what is found counts if the state is the same
    # afterwards.

    def read(self, layers: Sequence[str], key: str) -> tuple[bool, memoryview | None]:
        """Whether the layers say anything about *key*; its value, None where it is deleted."""
        for layer in self._of(key, layers):
            try:
                return True, read_value(layer / "set" / key)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                if (layer / "deleted" / _digest(key)).exists():
                    return True, None
        return False, None

    def size(self, layers: Sequence[str], key: str) -> tuple[bool, int | None]:
        """As :meth:`read`, of the value's bytes."""
        for layer in self._of(key, layers):
            path = layer / "set" / key
            try:
                if path.is_file():
                    return True, max(0, path.stat().st_size - DIGEST_BYTES)
            except FileNotFoundError:
                pass
            if (layer / "deleted" / _digest(key)).exists():
                return True, None
        return False, None

    def over(self, layers: Sequence[str], keys: set[str]) -> dict[str, Path | None]:
        """What there is if *keys* lie below: each key to its file, or to None if it is below."""
        found: dict[str, Path | None] = dict.fromkeys(keys)
        for layer in (self._layers / name for name in layers):
            gone = {path.name for path in layer.glob("deleted/*")}
            if gone:
                found = {key: path for key, path in found.items() if _digest(key) not in gone}
            folder = layer / "set"
            paths = (path for path in folder.rglob("*") if path.is_file())
            found.update((path.relative_to(folder).as_posix(), path) for path in paths)
        return found

    def _of(self, key: str, layers: Sequence[str]) -> Iterator[Path]:
        """Newest first; none for a key that cannot be set."""
        if is_key(key):
            yield from (self._layers / name for name in reversed(layers))


def is_key(key: str) -> bool:
    """Whether it names a file below a folder, and only one key does."""
    return "\0" not in key and all(part not in ("", ".", "..") for part in key.split("/"))


def read_value(path: Path) -> memoryview:
    """The value in a file of a layer. IntegrityError if it is incomplete."""
    data = memoryview(path.read_bytes())
    value, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if digest != _digest_of(value):
        raise IntegrityError(
            f"{path} is incomplete: the machine stopped before it was on disk; set it again"
        )
    return value


def _digest_of(value: Any) -> bytes:
    return xxh3(value).to_bytes(DIGEST_BYTES, "little")


def sync_file_system(folder: Path) -> None:
    """Have all that was written to the file system of *folder* on its disk: one call for however
    many files. OSError if that fails."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "syncfs"):  # macOS
            os.sync()
        elif libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), os.fspath(folder))
    finally:
        os.close(descriptor)


def _digest(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
