"""The shards that a process holds open, and their parsed record batches: bounded, least used out.

One cache for each daemon serves all datasets of the process: splits of one version share shards.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Final

from forebay.dataset.addresses import AddressTable
from forebay.dataset.formats import open_shard
from forebay.dataset.schema import Schema
from forebay.dataset.shard import BatchColumns, ShardReader
from forebay.stopwatch import Turn
from forebay.transfer import Transfer, local_path_is_on, make_transfer
from forebay_wire.limits import GIB, MAX_OPEN_BLOBS_PER_CLIENT, MIB
from forebay_wire.manifest import ShardRef
from forebay_wire.protocol import DataEndpoint

MAX_OPEN_SHARDS: Final = MAX_OPEN_BLOBS_PER_CLIENT // 2
"""The rest of what the daemon grants a client is for reads on their way and for checkpoints."""

MAPPED_BYTES: Final = 256 * GIB
"""Record batches over mapped files cost address space and a few kilobytes each."""

FETCHED_BYTES: Final = 512 * MIB
"""Record batches that came over HTTP lie in this process's memory: so much of it, or less if a
loader was given less."""


@dataclass(frozen=True)
class ShardPlace:
    """A shard with all that is needed to open and to read it."""

    ref: ShardRef
    schema: Schema
    context: str
    """Whose it is, for error messages: ``dataset mnist v1, shard 3``."""


class ShardCache:
    """Open shards and parsed batches by least recent use. Thread-safe; not for use after a fork.

    What falls out is closed when the last reader lets go of it.
    """

    def __init__(
        self, transfer: Transfer, *, batch_bytes: int, max_shards: int = MAX_OPEN_SHARDS
    ) -> None:
        self._transfer = transfer
        self._batch_bytes = batch_bytes
        self._max_shards = max_shards
        self._lock = threading.Lock()
        self._opening = Turn()
        self._shards: OrderedDict[str, _OpenShard] = OrderedDict()
        self._batches: OrderedDict[tuple[str, int], _HeldBatch] = OrderedDict()
        self._held_bytes = 0
        self._copied_bytes = 0
        self._clock = count(1)
        self._origins: dict[str, str] = {}
        """Blob to the origin that it was opened as."""
        transfer.wanted_back.listen(self.give_back)

    def now(self) -> int:
        """The time, for the question what was used last."""
        return next(self._clock)

    @property
    def num_shards(self) -> int:
        """Shards held open."""
        return len(self._shards)

    @property
    def held_bytes(self) -> int:
        """Bytes of the record batches that are held."""
        return self._held_bytes

    def open(self, places: Sequence[ShardPlace]) -> list[ShardReader]:
        """The shards, open; those that are not yet open are opened in one request."""
        with self._opening:
            with self._lock:
                found = [self._shards.get(place.ref.blob) for place in places]
                missing = {
                    place.ref.blob: place
                    for place, shard in zip(places, found, strict=True)
                    if shard is None
                }
            fresh = self._open_missing(list(missing.values()))
        now = self.now()
        with self._lock:
            for place in places:
                shard = self._shards.get(place.ref.blob)
                if shard is not None:
                    shard.used = now
                    self._shards.move_to_end(place.ref.blob)
            self._close_least_used()
        return [
            fresh[place.ref.blob] if shard is None else shard.reader
            for place, shard in zip(places, found, strict=True)
        ]

    def _close_least_used(self) -> None:
        """Reads that find their batches held do not come by here: who was used since gets another
        turn (the "second chance" of page replacement)."""
        while len(self._shards) > self._max_shards:
            blob, shard = next(iter(self._shards.items()))
            used = max((self._batches[blob, n].last_use for n in shard.batches), default=0)
            if used > shard.used:
                shard.used = used
                self._shards.move_to_end(blob)
            else:
                self._forget(blob)

    def _open_missing(self, places: list[ShardPlace]) -> dict[str, ShardReader]:
        if not places:
            return {}
        context = places[0].context if len(places) == 1 else places[0].context.partition(",")[0]
        blobs = self._transfer.open([place.ref.blob for place in places], context)
        fresh = {
            place.ref.blob: open_shard(
                blob, place.schema, place.ref.batch_rows, place.context, place.ref.format
            )
            for place, blob in zip(places, blobs, strict=True)
        }
        with self._lock:
            self._shards.update((blob, _OpenShard(reader)) for blob, reader in fresh.items())
            for place, blob in zip(places, blobs, strict=True):
                if blob.id != place.ref.blob:
                    self._origins[blob.id] = place.ref.blob
        return fresh

    def batch(
        self, blob: str, shard: ShardReader, index: int, table: AddressTable, number: int
    ) -> BatchColumns:
        """Record batch *index* of an open *shard*, parsed (and verified) at its first use.

        As long as it is held, *table* has it as its batch *number*.
        """
        key = (blob, index)
        with self._lock:
            found = self._batches.get(key)
            if found is not None:
                self._batches.move_to_end(key)
                found.tell(table, number)
                return found.columns
        parsed = shard.batch(index)  # two threads may both do this once; both results are right
        with self._lock:
            if key not in self._batches and blob in self._shards:
                held = self._batches[key] = _HeldBatch(parsed, self.now())
                held.tell(table, number)
                self._shards[blob].batches.add(index)
                self._held_bytes += parsed.num_bytes
                self._copied_bytes += parsed.copied_bytes
                parsed.on_copy = partial(_tell_copied, weakref.ref(self), key)
            self._drop_least_used()
        return parsed

    def copied(self, key: tuple[str, int], columns: BatchColumns, num_bytes: int) -> None:
        """*columns* of a record batch were unpacked: what they take is not the page cache's."""
        with self._lock:
            held = self._batches.get(key)
            if held is not None and held.columns is columns:
                self._copied_bytes += num_bytes
                self._batches.move_to_end(key)  # it is being used
                self._drop_least_used()

    def limit(self, batch_bytes: int) -> None:
        """Hold record batches of so many bytes from here on."""
        with self._lock:
            self._batch_bytes = batch_bytes
            self._drop_least_used()

    def _drop_least_used(self) -> None:
        while len(self._batches) > 1 and (
            self._held_bytes > self._batch_bytes or self._copied_bytes > _fetched_bytes
        ):
            key, held = next(iter(self._batches.items()))
            used = held.last_use
            if used > held.used:
                held.used = used
                self._batches.move_to_end(key)
            else:
                self._shards[key[0]].batches.discard(key[1])
                self._drop(key)

    def give_back(self, blobs: Sequence[str]) -> None:
        """Close these shards, as soon as the last reader lets go of them."""
        with self._lock:
            for blob in [self._origins.get(blob, blob) for blob in blobs]:
                if blob in self._shards:
                    self._forget(blob)

    def _forget(self, blob: str) -> None:
        for index in self._shards.pop(blob).batches:
            self._drop((blob, index))

    def _drop(self, key: tuple[str, int]) -> None:
        held = self._batches.pop(key)
        self._held_bytes -= held.columns.num_bytes
        self._copied_bytes -= held.columns.copied_bytes
        held.drop()


def _tell_copied(
    cache: weakref.ref[ShardCache], key: tuple[str, int], columns: BatchColumns, num_bytes: int
) -> None:
    """What the batches of a cache call, which do not keep it."""
    found = cache()
    if found is not None:
        found.copied(key, columns, num_bytes)


@dataclass
class _OpenShard:
    reader: ShardReader
    batches: set[int] = field(default_factory=set)
    """Record batches of it that are held."""
    used: int = 0


@dataclass
class _HeldBatch:
    """A parsed record batch, and the tables that have it."""

    columns: BatchColumns
    used: int
    """Its last use, as far as is known here."""
    tables: list[tuple[weakref.ref[AddressTable], int]] = field(default_factory=list)

    @property
    def last_use(self) -> int:
        tables = [(reference(), number) for reference, number in self.tables]
        uses = [int(table.used[number]) for table, number in tables if table is not None]
        return max(self.used, *uses) if uses else self.used

    def tell(self, table: AddressTable, number: int) -> None:
        table.hold(number, self.columns)
        if (table.reference, number) not in self.tables:
            self.tables = [one for one in self.tables if one[0]() is not None]
            self.tables.append((table.reference, number))

    def drop(self) -> None:
        for reference, number in self.tables:
            table = reference()
            if table is not None:
                table.drop(number)


_lock = threading.Lock()
_fetched_bytes = FETCHED_BYTES
_has_decoded = False
"""Whether there are values that were decoded of record batches which came over HTTP."""
_known: weakref.WeakValueDictionary[DataEndpoint, ShardCache] = weakref.WeakValueDictionary()


def shard_cache(endpoint: DataEndpoint) -> ShardCache:
    """The cache of this process for *endpoint*; it lives as long as somebody holds it."""
    with _lock:
        found = _known.get(endpoint)
        if found is None:
            budget = MAPPED_BYTES if _is_mapped(endpoint) else _batch_bytes()
            found = _known[endpoint] = ShardCache(make_transfer(endpoint), batch_bytes=budget)
        return found


def limit_fetched_bytes(num_bytes: int) -> None:
    """Hold no more than that of what came over HTTP, from here on, for each daemon."""
    global _fetched_bytes
    with _lock:
        _fetched_bytes = min(_fetched_bytes, num_bytes)
        _limit_all()


def decoded_bytes(endpoint: DataEndpoint) -> int:
    """What may be kept in this process's memory of values that were decoded of record batches: all
    that these do not take themselves. Where they come over HTTP, they have a half from now on."""
    global _has_decoded
    if _is_mapped(endpoint):
        return _fetched_bytes
    with _lock:
        if not _has_decoded:
            _has_decoded = True
            _limit_all()
        return _batch_bytes()


def _batch_bytes() -> int:
    """Of record batches that came over HTTP."""
    return _fetched_bytes // 2 if _has_decoded else _fetched_bytes


def _limit_all() -> None:
    for endpoint, cache in list(_known.items()):
        if not _is_mapped(endpoint):
            cache.limit(_batch_bytes())


def _is_mapped(endpoint: DataEndpoint) -> bool:
    return bool(endpoint.descriptor_socket) and local_path_is_on()


def _forget_parent() -> None:
    """In a forked child: start anew; another thread of the parent may have held the lock."""
    global _lock, _known
    _lock = threading.Lock()
    _known = weakref.WeakValueDictionary()


os.register_at_fork(after_in_child=_forget_parent)
