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
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import numpy as np
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.buffer.core import default_buffer_prototype

import forebay
from forebay.dataset.dataset import Dataset
from forebay.dataset.schema import Schema
from forebay.dataset.shard import largest_sample
from forebay.dataset.write import SHARD_BYTES
from forebay.zarr_decode import bounds
from forebay.zarr_samples import Samples
from forebay.zarr_session import MAX_KEY_BYTES, MAX_NAME_BYTES, Session, State, is_key, read_value
from forebay.zarr_version import INDEX_KEY, METADATA, SCHEMA, Place, Version, index_of
from forebay_wire.errors import AlreadyExists, Conflict, InvalidRequest, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB

if TYPE_CHECKING:
    from forebay.client import Client

MAX_ROW_BYTES: Final = largest_sample(SHARD_BYTES, Schema.of(SCHEMA).arrow) - 16
"""Of a key and its value together: what surely fits a shard."""

PART: Final = "all"
"""Of the write session that makes a version: its only part."""

PART_SECONDS: Final = 600.0
"""How long that is kept of a commit that was cut off."""

T = TypeVar("T")


def samples(
    store: ForebayStore | Dataset, arrays: Sequence[str] | Mapping[str, str] | None = None
) -> Samples:
    """What ``forebay.DataLoader`` reads of a zarr store: sample i is element i, along the first
    axis, of each of the *arrays* (see :class:`Samples`).

    *store*: one without changes that are not committed, or the version that
    ``client.dataset(name, version)`` gives. *arrays*: paths, which name the columns, or column to
    path; default: the arrays of the root group.
    """
    if isinstance(store, ForebayStore):
        return Samples(store.committed(), arrays)
    return Samples(Version(store), arrays)


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
        self._session = None if self.session is None else Session(self.session)
        self._found: dict[tuple[int, str], Version] = {}

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

    def committed(self) -> Version:
        """The version that is read. InvalidRequest where there is none, or it was changed."""
        state = self._state()
        found = self._version(state)
        if state.layers or not found.number:
            raise InvalidRequest(
                f"zarr store {self.name!r} has changes that are not committed: commit() first, as "
                "a loader reads versions"
            )
        return found

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
        start, stop = bounds(byte_range, len(value))
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
        def look(state: State) -> int | None:
            if self._session is not None:
                is_staged, size = self._session.size(state.layers, key)
                if is_staged:
                    return size
            place = self._version(state).places.get(key)
            return None if place is None else place.size

        if (size := self._settled(look)) is None:
            raise FileNotFoundError(key)
        return size

    def _read(self, key: str) -> memoryview | bytes | None:
        def look(state: State) -> memoryview | bytes | None:
            if self._session is not None:
                is_staged, value = self._session.read(state.layers, key)
                if is_staged:
                    return value
            return self._version(state).read(key)

        return self._settled(look)

    def _settled(self, look: Callable[[State], T]) -> T:
        """What *look* finds in a state of the session that did not change meanwhile."""
        while True:
            state = self._state()
            found = look(state)
            if self._state().token == state.token:
                return found

    def _state(self) -> State:
        return State() if self._session is None else self._session.state()

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
        self._check_writable()
        _check_key(key)
        _check_size(key, len(value))
        self._own_session().put(self._begun, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self.exists(key):
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        """Delete *key* in the session; older versions keep it."""
        await self._ensure_open()
        await asyncio.to_thread(self.delete_sync, key)

    def delete_sync(self, key: str) -> None:
        """:meth:`delete` for threads without an event loop; blocks."""
        self._check_writable()
        _check_key(key)

        def is_below(begun: State) -> bool:
            return len(begun.layers) > 1 or key in self._version(begun).places

        self._own_session().delete(self._begun, key, is_below)

    def _own_session(self) -> Session:
        assert self._session is not None, "only a read-only store has no session"
        return self._session

    def _begun(self) -> State:
        """The state of a session that has a layer for what changes."""
        session = self._own_session()
        while not (state := session.state()).layers:
            base = self._version(state)
            session.begin(state, base.number, base.manifest)
        return state

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

        def look(state: State) -> Iterable[str]:
            keys = {key for key in self._version(state).places if key.startswith(prefix)}
            return keys if self._session is None else self._session.over(state.layers, keys)

        return sorted(key for key in self._settled(look) if key.startswith(prefix))

    # Committing.

    def commit(self) -> int:
        """Publish what the session changed as the next version; its number.

        All or nothing, durable on return; the session is empty then, and goes on from there. What
        is set meanwhile is published or stays in the session, for the next commit. After an error
        everything is still in the session: commit again, and if the first commit did go through
        its number is the answer. Raises Conflict if the newest version is not the one that the
        session began with.
        """
        self._check_writable()
        session = self._own_session()
        self._begun()
        with session.locked():  # against those that share the session, who wait
            state = self._recognised(session.state())
            if state.layers:
                state = self._publish(state)
            self.version = state.number
        return state.number

    def _recognised(self, state: State) -> State:
        """What the session lies over once a commit counts that was cut off after it had made its
        version."""
        if not state.attempts:
            return state
        client = self._client()
        for attempt in state.attempts:
            number = client.write_session(self.name, write=attempt).version
            if number is not None:
                made = client.dataset(self.name, number)
                return self._own_session().finish(state, attempt, number, made.manifest_id)
        return state

    def _publish(self, state: State) -> State:
        self._check_newest(state)
        session, base = self._own_session(), self._version(state)
        attempt = new_random_name()
        frozen = session.freeze(state, attempt)
        try:
            number = self._write(base, session.over(state.layers, set(base.places)), attempt)
        except AlreadyExists:
            self._check_newest(state)
            raise
        made = _open_version(self._client(), self.name, number)
        finished = session.finish(frozen, attempt, number, made.manifest)
        self._found[os.getpid(), _found_by(finished)] = made
        return finished

    def _write(self, base: Version, wanted: Mapping[str, Path | None], attempt: str) -> int:
        """A version of *wanted*: from each file, or what *base* has of the key."""
        places = {key: base.places[key] for key, path in wanted.items() if path is None}
        index_bytes = sum(len(key.encode()) + 24 for key in wanted) + 64 * KIB
        shard_bytes = max(SHARD_BYTES, index_bytes)
        row = base.num_rows
        client = self._client()
        session = client.write_session(
            self.name,
            None if base.number else SCHEMA,
            append=bool(base.number),
            base=base.dataset if base.number else None,
            write=attempt,  # which tells whether it went through
            shard_bytes=shard_bytes,
            metadata={**(base.dataset.manifest.metadata if base.number else {}), **METADATA},
            keep_seconds=PART_SECONDS,
        )
        with session.part(PART) as writer:
            for key, path in sorted(wanted.items()):
                if path is None:
                    continue
                try:
                    value = read_value(path)
                except FileNotFoundError:  # deleted just now, and again in the layer above
                    continue
                writer.write(key=key, value=value)
                places[key] = Place(row, len(value))
                row += 1
            writer.write(key=INDEX_KEY, value=index_of(places))
        try:
            return session.commit()
        except (AlreadyExists, Conflict):
            session.abort()
            raise

    def _check_newest(self, state: State) -> None:
        """Refuse early what the daemon would refuse at the commit."""
        try:
            newest = self._client().describe_dataset(self.name).versions[-1]
        except NotFound:
            number, manifest = 0, ""
        else:
            number, manifest = newest.version, newest.manifest
        if (number, manifest) != (state.number, state.manifest):
            same = ", of a dataset of that name made anew" if number == state.number else ""
            raise Conflict(
                f"zarr store {self.name!r}: the session began with version {state.number}, and the "
                f"newest is {number}{same}: open another session on it, and set anew"
            )

    # Its connection, one a process.

    def _client(self) -> Client:
        return forebay.connect(self.address)

    def _version(self, state: State) -> Version:
        """The version that is read; found once, so that it never changes under a reader unless
        the session goes on. No lock is held: a child of a fork would find it held for ever."""
        place = os.getpid(), _found_by(state)
        if (known := self._found.get(place)) is not None:
            return known
        found = self._found.setdefault(place, self._open_base(state))
        for other in tuple(self._found):
            if other != place:
                self._found.pop(other, None)
        return found

    def _open_base(self, state: State) -> Version:
        before = dict(self._found)
        if state.layers:
            version: int | str = state.number
            for (pid, _), one in before.items():  # as before the session began
                if pid == os.getpid() and (one.number, one.manifest) == (version, state.manifest):
                    return one
        elif same := [one for (_, by), one in before.items() if by == _found_by(state)]:
            version = same[0].number  # what the parent of this fork reads
        else:
            version = state.number if before else self.version
        if version == 0:
            return Version(None)
        may_lack = self.session is not None and not state.layers
        found = _open_version(self._client(), self.name, version, may_lack=may_lack)
        if state.layers and state.manifest != found.manifest:
            raise Conflict(
                f"zarr store {self.name!r}: version {state.number}, which the session began with, "
                "was deleted and made anew: open another session on it, and set anew"
            )
        return found


def _found_by(state: State) -> str:
    """What a version that was found is good for."""
    return f"{state.number} {state.manifest}" if state.layers else state.token


def _check_key(key: str) -> None:
    if not is_key(key):
        raise InvalidRequest(
            f"key {key!r}: a key has parts with / between them, none of them empty, . or .., and "
            f"of at most {MAX_NAME_BYTES} bytes in UTF-8, {MAX_KEY_BYTES} in all"
        )


def _check_size(key: str, num_bytes: int) -> None:
    most = MAX_ROW_BYTES - len(key.encode())
    if num_bytes > most:
        raise InvalidRequest(
            f"the value of key {key!r} has {num_bytes} bytes, and at most {most} fit: choose "
            "smaller chunks, or smaller shards of zarr"
        )


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


def _open_version(
    client: Client, name: str, version: int | str, *, may_lack: bool = False
) -> Version:
    try:
        found = Version(client.dataset(name, version))
    except NotFound:
        if not may_lack or version != "latest":
            raise
        return Version(None)
    _ = found.places  # what cannot be read is told now
    return found
