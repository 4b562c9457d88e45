"""Where rows lie in this process's memory, so that those of a batch are copied by one call.

The rows of a batch lie all over the mapped shards of a version, a few in each record batch. numpy
copies rows of one array from anywhere in it (its "advanced indexing"), without the interpreter's
lock; so all memory is looked at as one array, whose rows begin at every byte and overlap. Only
rows whose address is known are ever touched, while whoever keeps their memory is held.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forebay.dataset.schema import Column
from forebay.dataset.shard import BatchColumns

FIRST_ADDRESS: Final = 4096
"""No memory is ever mapped below."""

NUM_ADDRESSES: Final = 1 << 48
"""As far as the memory of a process goes, unless it asks for more."""

LARGEST_PIECE: Final = 32 * 1024 - 1
"""Bytes that are copied as one row: numpy counts the bytes of an array in 63 bits."""

WORDS: Final = {1: 0, 2: 1, 4: 2, 8: 3}
"""Bytes of numbers, and their binary logarithms: where they are aligned, numpy is fastest."""

ITEMS: Final = (1, 2, 4, 8, 16)
"""Bytes that numpy copies as one item, aligned or not."""

SHORT_COPY: Final = 1 << 20
"""Bytes that are copied in less time than it takes to give up the interpreter's lock and get it
back: rows as single items, which is a tenth faster."""

FEW_RUNS: Final = 4
LONG_RUN: Final = 256
"""Bytes from which on a run is copied by a call of its own."""

UNKNOWN: Final = np.iinfo(np.int64).min

Addresses = NDArray[np.int64]


class _Memory:
    """All memory as an array, by numpy's protocol for memory of others."""

    def __init__(self, item: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": item,
            "shape": shape,
            "strides": strides,
            "data": (FIRST_ADDRESS, True),
        }


_views: dict[tuple[int, bool], NDArray[Any]] = {}
_words: dict[int, NDArray[Any]] = {}


def _view(num_bytes: int, *, as_items: bool) -> NDArray[Any]:
    """Row i is the *num_bytes* from address ``FIRST_ADDRESS + i`` on."""
    view = _views.get((num_bytes, as_items))
    if view is None:
        count = NUM_ADDRESSES - FIRST_ADDRESS - num_bytes
        if as_items:
            memory = _Memory(f"|V{num_bytes}", (count,), (1,))
        else:
            memory = _Memory("|u1", (count, num_bytes), (1, 1))
        view = _views[num_bytes, as_items] = np.asarray(memory)
    return view


def _aligned(num_bytes: int) -> NDArray[Any]:
    """Item i is the word of *num_bytes* at address ``FIRST_ADDRESS + i * num_bytes``."""
    words = _words.get(num_bytes)
    if words is None:
        count = (NUM_ADDRESSES - FIRST_ADDRESS) // num_bytes
        memory = _Memory(f"<u{num_bytes}", (count,), (num_bytes,))
        words = _words[num_bytes] = np.asarray(memory)
    return words


def _all_bytes() -> NDArray[Any]:
    """Byte i is that at address ``FIRST_ADDRESS + i``."""
    found = _words.get(0)
    if found is None:
        memory = _Memory("|u1", (NUM_ADDRESSES - FIRST_ADDRESS,), (1,))
        found = _words[0] = np.asarray(memory)
    return found


def gather(addresses: Addresses, num_bytes: int) -> NDArray[np.uint8]:
    """A new array ``(len(addresses), num_bytes)``: the bytes from each address on."""
    count = len(addresses)
    if num_bytes == 0 or count == 0:
        return np.empty((count, num_bytes), dtype=np.uint8)
    offsets = addresses - FIRST_ADDRESS
    shift = WORDS.get(num_bytes)
    if shift is not None and not np.bitwise_or.reduce(offsets) & (num_bytes - 1):
        words: NDArray[Any] = _aligned(num_bytes).take(offsets >> shift)
        return words.view(np.uint8).reshape(count, num_bytes)
    piece = _piece(num_bytes)
    view = _view(piece, as_items=num_bytes in ITEMS or count * num_bytes <= SHORT_COPY)
    if num_bytes == piece:
        rows: NDArray[np.uint8] = view[offsets].view(np.uint8)
        return rows.reshape(count, num_bytes)
    pieces = np.arange(0, num_bytes - piece + 1, piece)
    body: NDArray[np.uint8] = view[offsets[:, None] + pieces].view(np.uint8).reshape(count, -1)
    if body.shape[1] == num_bytes:
        return body
    tail = gather(addresses + body.shape[1], num_bytes - body.shape[1])
    return np.concatenate((body, tail), axis=1)


def gather_runs(addresses: Addresses, sizes: Addresses, item_bytes: int) -> NDArray[np.uint8]:
    """*sizes* items of *item_bytes* from each address on, one run after the other."""
    total = int(sizes.sum())
    # Long runs are few: a loop over them costs less than an address for each item.
    if len(sizes) <= FEW_RUNS or total * item_bytes >= LONG_RUN * len(sizes):
        out = np.empty(total * item_bytes, dtype=np.uint8)
        ends = np.cumsum(sizes) * item_bytes
        offsets = addresses - FIRST_ADDRESS
        memory, place = _all_bytes(), 0
        for offset, end in zip(offsets.tolist(), ends.tolist(), strict=True):
            if end > place:
                out[place:end] = memory[offset : offset + end - place]
                place = end
        return out
    within = np.arange(total, dtype=np.int64)
    within -= np.repeat(np.cumsum(sizes) - sizes, sizes)
    within *= item_bytes
    within += np.repeat(addresses, sizes)
    return gather(within, item_bytes).reshape(-1)


def _piece(num_bytes: int) -> int:
    """Bytes of the pieces that a row of *num_bytes* is copied in: equal ones, if there are."""
    for count in range(-(-num_bytes // LARGEST_PIECE), 2 * (num_bytes // LARGEST_PIECE) + 2):
        if num_bytes % count == 0:
            return num_bytes // count
    return LARGEST_PIECE


def origin(batch: BatchColumns, column: Column, first_row: int) -> int:
    """Where row 0 of the version would lie if all rows lay in line with those of *batch*, which
    begins with *first_row*."""
    return batch.address(column) - first_row * column.fixed_bytes


class AddressTable:
    """The record batches of a version that are held open, and where their columns lie.

    Thread-safe. Whoever lets go of a batch (the cache) says so by :meth:`drop`.
    """

    def __init__(self, starts: NDArray[np.int64]) -> None:
        """*starts*: the first row of each record batch, and the number of rows last."""
        self._starts = starts
        self._lock = threading.Lock()
        self._held = np.full(len(starts) - 1, None, dtype=object)
        self._origins: dict[str, NDArray[np.int64]] = {}
        self.used = np.zeros(len(starts) - 1, dtype=np.int64)
        """Record batch to the time (of its cache's clock) of its last use."""
        self.reference = weakref.ref(self)

    def hold(self, number: int, batch: BatchColumns) -> None:
        """Record batch *number* of the version is *batch*."""
        with self._lock:
            self._held[number] = batch

    def drop(self, number: int) -> None:
        """Forget record batch *number*."""
        with self._lock:
            self._held[number] = None
            for origins in self._origins.values():
                origins[number] = UNKNOWN

    def use(self, number: int, now: int) -> BatchColumns | None:
        """Record batch *number*, if it is held, for one row of it."""
        self.used[number] = now
        batch: BatchColumns | None = self._held[number]
        return batch

    def look(
        self, batches: NDArray[np.int64], columns: Sequence[Column], now: int
    ) -> tuple[NDArray[Any], list[NDArray[np.int64]]] | None:
        """For each of *batches* (record batch numbers, any number of times each) what keeps its
        memory, and by column the origin (see :func:`origin`). None if one of them is not held.
        """
        with self._lock:
            held = self._held[batches]
            tables = [self._of(column.name) for column in columns]
            origins = [table[batches] for table in tables]
        self.used[batches] = now
        for column, table, found in zip(columns, tables, origins, strict=True):
            is_new = len(found) > 0 and np.minimum.reduce(found) == UNKNOWN
            if is_new and not self._learn(column, table, batches, held, found):
                return None
        if not columns and None in held:
            return None
        return held, origins

    def _of(self, name: str) -> NDArray[np.int64]:
        table = self._origins.get(name)
        if table is None:
            table = np.full(len(self._held), UNKNOWN, dtype=np.int64)
            self._origins[name] = table
        return table

    def _learn(
        self,
        column: Column,
        table: NDArray[np.int64],
        batches: NDArray[np.int64],
        held: NDArray[Any],
        found: NDArray[np.int64],
    ) -> bool:
        """Complete *found*; False if a record batch is not held."""
        places = np.flatnonzero(found == UNKNOWN)
        numbers, firsts, which = np.unique(batches[places], return_index=True, return_inverse=True)
        learned = np.empty(len(numbers), dtype=np.int64)
        for index, (number, place) in enumerate(zip(numbers, places[firsts], strict=True)):
            batch = held[place]
            if batch is None:
                return False
            learned[index] = origin(batch, column, int(self._starts[number]))
            with self._lock:
                if self._held[number] is batch:
                    table[number] = learned[index]
        found[places] = learned[which]
        return True
