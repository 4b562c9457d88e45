"""The folder in which a store of zarr keeps what is set and deleted until it is committed.

``state`` says which version the session began with and which *layers* lie over it, oldest first.
What changes goes into the last one. A commit puts an empty layer on top and publishes those below;
then they are gone, and the version that it made is what the rest lies over. Each of these steps is
one replacement of ``state``, so that other processes see all of it or nothing.

Values are not synced one by one, but all of them before a commit counts on them. What was set and
deleted is, in each layer's journal: a value that a power cut has left incomplete, or taken, is not
what the journal says, and is refused (see zarr_journal).

    state                      JSON: format, and the fields of State
    lock                       held while a commit, or the first change, is under way
    layers/NAME/journal        what was set and deleted
    layers/NAME/set/KEY        a value, and its XXH3-64 (8 bytes, little-endian)
    layers/NAME/deleted/DIGEST of a key; empty
    layers/NAME/parts/RANDOM   a value that is being written
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from forebay.publish_file import sync_folder
from forebay.zarr_journal import ABSENT, Journal, make_layer
from forebay_wire.errors import IntegrityError, InvalidRequest
from forebay_wire.ids import new_random_name
from forebay_wire.segments import xxh3

FORMAT: Final = 4
"""Of the folder: 1 had no ``state``, 2 no digests, and 3 no journals."""

NAMED: Final = 20
"""Values that a message names."""

MAX_NAME_BYTES: Final = 255
"""Of a part of a key: what file systems take."""

MAX_KEY_BYTES: Final = 3072
"""Of a key: that of a file below the session's folder has to be shorter than 4096."""

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
    """Thread-safe, also among processes."""

    def __init__(self, folder: Path) -> None:
        self._lost: dict[Path, set[str]] = {}
        """Of layers that were looked at: keys whose values a power cut took."""
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
        try:
            values["layers"] = tuple(values["layers"])
            values["attempts"] = {name: tuple(some) for name, some in values["attempts"].items()}
            return State(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{self._state} is not complete ({error}): set anew") from error

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
                with suppress(PermissionError):
                    sync_folder(self._folder.parent)  # that the session's own folder stays
                self._write(State("", number, manifest, (self._new_layer(),)))

    def _new_layer(self) -> str:
        name = new_random_name()
        make_layer(self._layers / name)
        return name

    def freeze(self, state: State, attempt: str) -> State:
        """Begin to commit all layers: from now on changes go into another one. What was changed is
        synced on return; OSError if it cannot be, IntegrityError if some of it was lost."""
        self._check_all(state.layers)
        sync_file_system(self._folder)
        layers = (*state.layers, self._new_layer())
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
        sync_folder(self._folder)  # or a state that knows nothing of a commit might come back
        return state

    def _has_changes(self, layer: str) -> bool:
        folder = self._layers / layer
        return bool(self._lost_of(folder)) or any(
            path.is_file() for kind in ("set", "deleted") for path in folder.glob(f"{kind}/**/*")
        )

    # Changing. *begun* gives the state of a session that has layers.

    def put(self, begun: Callable[[], State], key: str, value: Any) -> None:
        digest = _digest_of(value)

        def place(_: State, layer: Path) -> None:
            path = layer / "set" / key
            part = layer / "parts" / new_random_name()
            with Journal(layer) as journal:
                for folder in (part.parent, path.parent):
                    folder.mkdir(parents=True, exist_ok=True)
                try:
                    with part.open("wb") as file:
                        file.write(value)
                        file.write(digest)
                    with journal.change(key, digest.hex()):
                        _drop_empty(path)
                        part.replace(path)
                finally:
                    part.unlink(missing_ok=True)

        try:
            self._change(begun, place)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise InvalidRequest(
                f"key {key!r}: a session keeps no value both of a key and of one below it, as "
                "zarr has none; delete the other one first"
            ) from error
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise InvalidRequest(
                f"key {key!r} is too long for the file system of the session {self._folder}"
            ) from error

    def delete(
        self, begun: Callable[[], State], key: str, is_below: Callable[[State], bool]
    ) -> None:
        """*is_below*: whether there may be such a key below the last layer."""

        def place(state: State, layer: Path) -> None:
            hides = is_below(state)
            with Journal(layer) as journal, journal.change(key, ABSENT, hides):
                if hides:
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
            self._check(layer, key)
            try:
                return True, read_value(layer / "set" / key)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                if (layer / "deleted" / _digest(key)).exists():
                    return True, None
        return False, None

    def size(self, layers: Sequence[str], key: str) -> tuple[bool, int | None]:
        """As :meth:`read`, of the value's bytes."""
        for layer in self._of(key, layers):
            self._check(layer, key)
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
        """What there is if *keys* lie below: each key to its file, or to None if it is below. Those
        of lost values are there, too."""
        found: dict[str, Path | None] = dict.fromkeys(keys)
        for layer in (self._layers / name for name in layers):
            gone = {path.name for path in layer.glob("deleted/*")}
            if gone:
                found = {key: path for key, path in found.items() if _digest(key) not in gone}
            folder = layer / "set"
            paths = (path for path in folder.rglob("*") if path.is_file())
            found.update((path.relative_to(folder).as_posix(), path) for path in paths)
            found.update((key, folder / key) for key in self._lost_of(layer))
        return found

    # What a power cut took.

    def _check(self, layer: Path, key: str) -> None:
        if key in self._lost_of(layer):
            raise _lost_error([layer / "set" / key])

    def _check_all(self, layers: Sequence[str]) -> None:
        """IntegrityError if something was lost that was not set or deleted again."""
        lost: dict[str, Path] = {}
        for layer in (self._layers / name for name in layers):
            for key, is_there in _compared(layer):
                if is_there:
                    lost.pop(key, None)
                else:
                    lost[key] = layer / "set" / key
        if lost:
            raise _lost_error(sorted(lost.values()))

    def _lost_of(self, layer: Path) -> set[str]:
        """Looked for once, before this process relies on the layer; again while there are some, as
        they may be set again."""
        known = self._lost.get(layer)
        if known is None or known:
            try:
                known = {key for key, is_there in _compared(layer) if not is_there}
            except FileNotFoundError:  # dropped under our hands, so it does not count
                return set()
            self._lost[layer] = known
        return known

    def _of(self, key: str, layers: Sequence[str]) -> Iterator[Path]:
        """Newest first; none for a key that cannot be set."""
        if is_key(key):
            yield from (self._layers / name for name in reversed(layers))


def _compared(layer: Path) -> list[tuple[str, bool]]:
    """Each key that was set or deleted in the layer, and whether that is still so."""
    with Journal(layer) as journal, journal.alone():
        return [
            (key, _value_of(layer / "set" / key) in values and (not hides or _hides(layer, key)))
            for key, (values, hides) in journal.allowed().items()
        ]


def _value_of(path: Path) -> str:
    """As a journal names it, by its digest alone."""
    try:
        with path.open("rb") as file:
            file.seek(-DIGEST_BYTES, os.SEEK_END)
            return file.read().hex()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ABSENT
    except OSError:  # shorter than a digest
        return "incomplete"


def _hides(layer: Path, key: str) -> bool:
    return (layer / "deleted" / _digest(key)).exists()


def _lost_error(paths: Sequence[Path]) -> IntegrityError:
    named = ", ".join(map(str, paths[:NAMED])) + (", …" if len(paths) > NAMED else "")
    return IntegrityError(
        f"{named} is incomplete, missing, or older than what was set or deleted last: the machine "
        "stopped before it was on disk; set it again, or delete it"
    )


def _drop_empty(folder: Path) -> None:
    """The folders of keys below one that were all deleted. Leaves what there is else."""
    if folder.is_dir():
        for one in (*sorted(folder.rglob("*"), reverse=True), folder):
            with suppress(OSError):
                one.rmdir()


def is_key(key: str) -> bool:
    """Whether it names a file below a folder, and only one key does."""
    return (
        "\0" not in key
        and len(key) <= MAX_KEY_BYTES
        and all(
            part not in ("", ".", "..") and _name_bytes(part) <= MAX_NAME_BYTES
            for part in key.split("/")
        )
    )


def _name_bytes(part: str) -> int:
    """Of a name of a file; more than any may have if it can be none."""
    try:
        return len(part.encode())
    except UnicodeEncodeError:
        return MAX_NAME_BYTES + 1


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
