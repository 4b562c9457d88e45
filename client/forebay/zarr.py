"""A zarr store over versions of a dataset: ``pip install forebay[zarr]``.

    store = forebay.zarr.ForebayStore("weather", address="data/", session="/tmp/weather")
    zarr.create_array(store, name="t2m", shape=(8760, 721, 1440), chunks=(24, 721, 1440), ...)
    store.commit()                                             # version 1, all or nothing

    zarr.open_array(forebay.zarr.ForebayStore("weather", address="data/", read_only=True), ...)

Each key of a version is a row, whose value is a range of a blob that is mapped, verified at its
first use, and handed out without a copy. What is set or deleted before a commit lies in the
*session*, a folder, over the version that the session began with; the commit appends what changed
and publishes the next version.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import pyarrow as pa
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.buffer.core import default_buffer_prototype

import forebay
from forebay.dataset.dataset import Dataset
from forebay_wire.errors import Conflict, InvalidRequest, NotFound
from forebay_wire.ids import new_random_name

if TYPE_CHECKING:
    from forebay.client import Client

KEY: Final = "key"
VALUE: Final = "value"
SCHEMA: Final = {KEY: "string", VALUE: "binary"}

INDEX_KEY: Final = ""
"""The key of a version's last row: an Arrow stream of all keys, in order, with row and size."""

METADATA: Final = {"zarr": 3}

PART_SUFFIX: Final = ".part"
"""Of a file that is being written; no key of zarr ends like it."""

_INDEX_SCHEMA: Final = pa.schema(
    [pa.field(KEY, pa.string()), pa.field("row", pa.int64()), pa.field("size", pa.int64())]
)


@dataclass(frozen=True)
class _Place:
    row: int
    size: int


class ForebayStore(Store):
    """One dataset of keys and values, as a store of zarr.

    Equal and picklable by what it was made with. Thread-safe; each process has a connection of its
    own. Without a *session* it can only be read, and never changes.
    """

    supports_writes: bool = True
    supports_deletes: bool = True
    supports_partial_writes = False
    supports_listing: bool = True

    def __init__(
        self,
        name: str,
        *,
        address: str | os.PathLike[str] | None = None,
        version: int | str = "latest",
        session: str | os.PathLike[str] | None = None,
        read_only: bool = False,
    ) -> None:
        """*name*: of the dataset; with a *session* it need not exist yet. *address*: as for
        ``forebay.connect``. *version*: which one is read, or begun with. *session*: a folder for
        what is not committed; processes that share it write one version together."""
        if session is None and not read_only:
            raise InvalidRequest(
                "a store without a session is read only: pass read_only=True, or session=FOLDER "
                "for what you set until you commit it"
            )
        super().__init__(read_only=read_only)
        self.name = name
        self.version = version
        self.address = None if address is None else os.fspath(address)
        self.session = None if session is None else Path(session).absolute()
        self._staged = None if self.session is None else _Staged(self.session)
        self._lock = threading.Lock()
        self._base: tuple[int, _Version] | None = None

    # What it is.

    def _made_with(self) -> tuple[Any, ...]:
        return self.name, self.address, self.version, self.session, self.read_only

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForebayStore) and self._made_with() == other._made_with()

    def __hash__(self) -> int:
        return hash(self._made_with())

    def __repr__(self) -> str:
        return f"ForebayStore({self.name!r}, address={self.address!r}, version={self.version!r})"

    def __str__(self) -> str:
        return f"forebay://datasets/{self.name}"

    def __reduce__(self) -> Any:
        return _remade, (*self._made_with(), self._is_open)

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same, not open, to be read only or not."""
        return type(self)(
            self.name,
            address=self.address,
            version=self.version,
            session=self.session,
            read_only=read_only,
        )

    # Reading.

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """The value of *key*, or a range of it, over mapped memory; None if there is none.

        Raises IntegrityError for damaged bytes, DaemonUnavailable.
        """
        await self._ensure_open()
        return await asyncio.to_thread(
            self.get_sync, key, prototype=prototype, byte_range=byte_range
        )

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """:meth:`get` for threads without an event loop; blocks."""
        value = self._read(key)
        if value is None:
            return None
        start, stop = _bounds(byte_range, len(value))
        buffer = (prototype or default_buffer_prototype()).buffer
        return buffer.from_array_like(np.frombuffer(value, np.uint8)[start:stop])

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> builtins.list[Buffer | None]:
        """What :meth:`get` gives for each of them."""
        return await asyncio.gather(*(self.get(key, prototype, one) for key, one in key_ranges))

    async def exists(self, key: str) -> bool:
        try:
            await self.getsize(key)
        except FileNotFoundError:
            return False
        return True

    async def getsize(self, key: str) -> int:
        """Bytes of the value of *key*, which is not read for it; FileNotFoundError if absent."""
        await self._ensure_open()
        return await asyncio.to_thread(self._size, key)

    def _size(self, key: str) -> int:
        if self._staged is not None and (size := self._staged.size(key)) is not None:
            return size
        place = self._version().places.get(key)
        if place is None or self._is_deleted(key):
            raise FileNotFoundError(key)
        return place.size

    def _read(self, key: str) -> memoryview | bytes | None:
        if self._staged is not None and (staged := self._staged.read(key)) is not None:
            return staged
        base = self._version()
        place = base.places.get(key)
        if place is None or base.dataset is None or self._is_deleted(key):
            return None
        return base.dataset.value(place.row, VALUE)

    def _is_deleted(self, key: str) -> bool:
        return self._staged is not None and self._staged.is_deleted(key)

    # Changing a session.

    async def set(self, key: str, value: Buffer) -> None:
        """Set *key* in the session: durable at the commit."""
        await self._ensure_open()
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """:meth:`set` for threads without an event loop; blocks."""
        if not isinstance(value, Buffer):
            raise TypeError(
                f"ForebayStore.set(): `value` must be a Buffer instance. Got an instance of "
                f"{type(value)} instead."
            )
        if not key:
            raise InvalidRequest("a key is not empty")
        self._writable().put(key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self.exists(key):
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        """Delete *key* in the session; older versions keep it."""
        await self._ensure_open()
        await asyncio.to_thread(self.delete_sync, key)

    def delete_sync(self, key: str) -> None:
        """:meth:`delete` for threads without an event loop; blocks."""
        self._writable().delete(key, is_below=key in self._version().places)

    def _writable(self) -> _Staged:
        self._check_writable()
        assert self._staged is not None, "only a read-only store has no session"
        self._staged.begin(self._version().number)
        return self._staged

    # Listing.

    def list(self) -> AsyncIterator[str]:
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        await self._ensure_open()
        for key in await asyncio.to_thread(self._keys, prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        await self._ensure_open()
        start = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        keys = await asyncio.to_thread(self._keys, start)
        for name in sorted({key[len(start) :].partition("/")[0] for key in keys}):
            yield name

    def _keys(self, prefix: str) -> builtins.list[str]:
        """Those that begin with *prefix*, in order."""
        keys = {key for key in self._version().places if key.startswith(prefix)}
        if self._staged is not None:
            keys = self._staged.without_deleted(keys)
            keys |= {key for key in self._staged.files() if key.startswith(prefix)}
        return sorted(keys)

    # Committing.

    def commit(self) -> int:
        """Publish what the session changed as the next version; its number.

        All or nothing, durable on return; the session is empty then, and goes on from there.
        Raises Conflict if the dataset has a newer version than the session began with.
        """
        staged = self._writable()
        client, base = self._client(), self._version()
        newest = _open_version(client, self.name, "latest", may_lack=True)
        if newest.number != base.number:
            raise Conflict(
                f"zarr store {self.name!r}: the session began with version {base.number}, and the "
                f"newest is {newest.number}: open another session on it, and set anew"
            )
        if base.dataset is None:
            writer = client.create_dataset(self.name, SCHEMA, metadata=METADATA)
        else:
            writer = client.append_dataset(self.name, metadata=METADATA)
        kept = staged.without_deleted(set(base.places))
        places = {key: place for key, place in base.places.items() if key in kept}
        row = 0 if base.dataset is None else base.dataset.num_rows
        with writer:
            for key, path in staged.files().items():
                value = path.read_bytes()
                writer.write(key=key, value=value)
                places[key] = _Place(row, len(value))
                row += 1
            writer.write(key=INDEX_KEY, value=_index_of(places))
        assert writer.version is not None, "it has committed"
        staged.clear()
        with self._lock:
            self.version = writer.version
            self._base = None
        return writer.version

    # Its connection, one a process.

    def _client(self) -> Client:
        return forebay.connect(self.address)

    def _version(self) -> _Version:
        """The version that is read; found once, so that it never changes under a reader."""
        with self._lock:
            if self._base is None or self._base[0] != os.getpid():
                self._base = (os.getpid(), self._open_base())
            return self._base[1]

    def _open_base(self) -> _Version:
        begun = None if self._staged is None else self._staged.begun
        version = self.version if begun is None else begun
        if version == 0:
            return _Version(0, None, {})
        may_lack = self.session is not None and begun is None
        return _open_version(self._client(), self.name, version, may_lack=may_lack)


def _remade(
    name: str,
    address: str | None,
    version: int | str,
    session: Path | None,
    read_only: bool,
    is_open: bool,
) -> ForebayStore:
    store = ForebayStore(
        name, address=address, version=version, session=session, read_only=read_only
    )
    store._is_open = is_open
    return store


@dataclass(frozen=True)
class _Version:
    """What a session begins with."""

    number: int
    """0: there is no such dataset yet."""
    dataset: Dataset | None
    places: Mapping[str, _Place]


def _open_version(client: Client, name: str, version: int | str, *, may_lack: bool) -> _Version:
    try:
        dataset = client.dataset(name, version)
    except NotFound:
        if not may_lack or version != "latest":
            raise
        return _Version(0, None, {})
    if dataset.schema.names != list(SCHEMA):
        raise InvalidRequest(
            f"dataset {name!r} is no zarr store: it has the columns "
            f"{', '.join(dataset.schema.names)}, and none was committed by ForebayStore"
        )
    index = dataset.value(dataset.num_rows - 1, VALUE)
    table = pa.ipc.open_stream(pa.py_buffer(index)).read_all()
    keys, rows, sizes = (table.column(field.name).to_pylist() for field in _INDEX_SCHEMA)
    places = {key: _Place(row, size) for key, row, size in zip(keys, rows, sizes, strict=True)}
    return _Version(dataset.version, dataset, places)


def _index_of(places: Mapping[str, _Place]) -> bytes:
    keys = sorted(places)
    columns = [keys, [places[key].row for key in keys], [places[key].size for key in keys]]
    table = pa.Table.from_arrays(
        [
            pa.array(values, field.type)
            for values, field in zip(columns, _INDEX_SCHEMA, strict=True)
        ],
        schema=_INDEX_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _INDEX_SCHEMA) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _bounds(request: ByteRequest | None, size: int) -> tuple[int, int]:
    if request is None:
        return 0, size
    if isinstance(request, RangeByteRequest):
        return request.start, request.end
    if isinstance(request, OffsetByteRequest):
        return request.offset, size
    if isinstance(request, SuffixByteRequest):
        return max(0, size - request.suffix), size
    raise TypeError(f"Unexpected byte_range, got {request}.")


class _Staged:
    """What a session changed: files that are called like their keys, and empty ones called like
    the digest of a key for those that are deleted. Processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._set = folder / "set"
        self._deleted = folder / "deleted"
        self._base = folder / "version"

    @property
    def begun(self) -> int | None:
        """The version that the session began with; None before its first change."""
        try:
            return int(self._base.read_text())
        except FileNotFoundError:
            return None

    def begin(self, version: int) -> None:
        """Write down what the session begins with, unless it has begun."""
        if self._base.exists():
            return
        self._base.parent.mkdir(parents=True, exist_ok=True)
        part = self._base.with_name(f"{new_random_name()}{PART_SUFFIX}")
        part.write_text(f"{version}")
        with suppress(FileExistsError):
            os.link(part, self._base)
        part.unlink()

    def read(self, key: str) -> bytes | None:
        try:
            return (self._set / key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def size(self, key: str) -> int | None:
        path = self._set / key
        return path.stat().st_size if path.is_file() else None

    def put(self, key: str, value: Any) -> None:
        path = self._set / key
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{new_random_name()}{PART_SUFFIX}")
        part.write_bytes(value)
        part.replace(path)
        self._tombstone(key).unlink(missing_ok=True)

    def delete(self, key: str, *, is_below: bool) -> None:
        """*is_below*: the version that the session began with has it."""
        if is_below:
            self._deleted.mkdir(parents=True, exist_ok=True)
            self._tombstone(key).touch()
        path = self._set / key
        if path.is_file():
            path.unlink(missing_ok=True)

    def is_deleted(self, key: str) -> bool:
        return self._tombstone(key).exists()

    def without_deleted(self, keys: set[str]) -> set[str]:
        gone = {path.name for path in self._deleted.glob("*")}
        return {key for key in keys if _digest(key) not in gone} if gone else keys

    def files(self) -> dict[str, Path]:
        """Key to file of what is set, in order."""
        paths = (path for path in self._set.rglob("*") if path.is_file())
        found = ((path.relative_to(self._set).as_posix(), path) for path in paths)
        return dict(sorted(one for one in found if not one[0].endswith(PART_SUFFIX)))

    def clear(self) -> None:
        for folder in (self._set, self._deleted):
            shutil.rmtree(folder, ignore_errors=True)
        self._base.unlink(missing_ok=True)

    def _tombstone(self, key: str) -> Path:
        return self._deleted / _digest(key)


def _digest(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
