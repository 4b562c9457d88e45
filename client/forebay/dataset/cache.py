"""The shards that a process holds open, and their parsed record batches: bounded, least used out.

One cache for each daemon serves all datasets of the process: splits of one version share shards.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from forebay.dataset.schema import Schema
from forebay.dataset.shard import BatchColumns, ShardReader
from forebay.transfer import Transfer, local_path_is_on, make_transfer
from forebay_wire.limits import GIB, MAX_OPEN_BLOBS_PER_CLIENT, MIB
from forebay_wire.manifest import ShardRef
from forebay_wire.protocol import DataEndpoint

MAX_OPEN_SHARDS: Final = MAX_OPEN_BLOBS_PER_CLIENT // 2
"""The rest of what the daemon grants a client is for reads on their way and for checkpoints."""

MAPPED_BYTES: Final = 256 * GIB
"""Record batches over mapped files cost address space and a few kilobytes each."""

FETCHED_BYTES: Final = 512 * MIB
"""Record batches that came over HTTP lie in this process's memory."""


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
        self._opening = threading.Lock()
        self._shards: OrderedDict[str, ShardReader] = OrderedDict()
        self._batches: OrderedDict[tuple[str, int], BatchColumns] = OrderedDict()
        self._held_bytes = 0
        self._origins: dict[str, str] = {}
        """Blob to the origin that it was opened as."""
        transfer.wanted_back.listen(self.give_back)

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
        with self._lock:
            for place in places:
                if place.ref.blob in self._shards:
                    self._shards.move_to_end(place.ref.blob)
            while len(self._shards) > self._max_shards:
                self._forget(self._shards.popitem(last=False)[0])
        return [shard or fresh[place.ref.blob] for place, shard in zip(places, found, strict=True)]

    def _open_missing(self, places: list[ShardPlace]) -> dict[str, ShardReader]:
        if not places:
            return {}
        context = places[0].context if len(places) == 1 else places[0].context.partition(",")[0]
        blobs = self._transfer.open([place.ref.blob for place in places], context)
        fresh = {
            place.ref.blob: ShardReader(blob, place.schema, place.ref.batch_rows, place.context)
            for place, blob in zip(places, blobs, strict=True)
        }
        with self._lock:
            self._shards.update(fresh)
            for place, blob in zip(places, blobs, strict=True):
                if blob.id != place.ref.blob:
                    self._origins[blob.id] = place.ref.blob
        return fresh

    def batch(self, blob: str, shard: ShardReader, index: int) -> BatchColumns:
        """Record batch *index* of an open *shard*, parsed (and verified) at its first use."""
        key = (blob, index)
        with self._lock:
            found = self._batches.get(key)
            if found is not None:
                self._batches.move_to_end(key)
                return found
        parsed = shard.batch(index)  # two threads may both do this once; both results are right
        with self._lock:
            if key not in self._batches and blob in self._shards:
                self._batches[key] = parsed
                self._held_bytes += parsed.num_bytes
            while self._held_bytes > self._batch_bytes and len(self._batches) > 1:
                self._held_bytes -= self._batches.popitem(last=False)[1].num_bytes
        return parsed

    def give_back(self, blobs: Sequence[str]) -> None:
        """Close these shards, as soon as the last reader lets go of them."""
        with self._lock:
            for blob in [self._origins.get(blob, blob) for blob in blobs]:
                if self._shards.pop(blob, None) is not None:
                    self._forget(blob)

    def _forget(self, blob: str) -> None:
        for key in [key for key in self._batches if key[0] == blob]:
            self._held_bytes -= self._batches.pop(key).num_bytes


_lock = threading.Lock()
_known: weakref.WeakValueDictionary[DataEndpoint, ShardCache] = weakref.WeakValueDictionary()


def shard_cache(endpoint: DataEndpoint) -> ShardCache:
    """The cache of this process for *endpoint*; it lives as long as somebody holds it."""
    with _lock:
        found = _known.get(endpoint)
        if found is None:
            mapped = bool(endpoint.descriptor_socket) and local_path_is_on()
            budget = MAPPED_BYTES if mapped else FETCHED_BYTES
            found = _known[endpoint] = ShardCache(make_transfer(endpoint), batch_bytes=budget)
        return found


def _forget_parent() -> None:
    """In a forked child: start anew; another thread of the parent may have held the lock."""
    global _lock, _known
    _lock = threading.Lock()
    _known = weakref.WeakValueDictionary()


os.register_at_fork(after_in_child=_forget_parent)
