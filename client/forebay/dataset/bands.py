"""Decoded parts of arrays that a process keeps: bounded in bytes, least used out, each decoded by
one thread however many want it."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

Band = tuple[str, str, int]
"""Manifest id, path of an array, number: a run of samples whose chunks are decoded together."""

POINTER_BYTES = 8
"""What an element takes beside its object."""


class Bands:
    """Thread-safe; not for use after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[Band, tuple[NDArray[Any], int]] = OrderedDict()
        self._decoding: dict[Band, Future[NDArray[Any]]] = {}
        self.held_bytes = 0
        """Of the bands that are kept."""

    def missing(self, bands: Sequence[Band]) -> list[Band]:
        """Those that nobody has or decodes; the others are used now, and fall out later."""
        return self._look(bands, {})

    def take(
        self,
        bands: Sequence[Band],
        decode: Callable[[Sequence[Band]], list[NDArray[Any]]],
        prepare: Callable[[Sequence[Band]], object],
        limit_bytes: int,
        at_once: int = 1,
    ) -> list[NDArray[Any]]:
        """The *bands*; those that nobody has yet are decoded here, others waited for.

        *prepare* is told which of them are missing, before; *decode* gets so many of them
        *at_once*. *limit_bytes*: what may be kept; the ones used last are kept in any case.
        """
        found: dict[Band, NDArray[Any]] = {}
        if missing := self._look(bands, found):
            prepare(missing)
        while missing:  # who comes later takes what is left
            mine = self._claim(missing, at_once)
            self._decode(mine, decode, limit_bytes, found)
        for band in bands:
            while band not in found:
                self._await(band, decode, limit_bytes, found)
        return [found[band] for band in bands]

    def _look(self, bands: Sequence[Band], found: dict[Band, NDArray[Any]]) -> list[Band]:
        """Put those that are kept into *found*; the ones that nobody is decoding either."""
        missing = []
        with self._lock:
            for band in bands:
                held = self._held.get(band)
                if held is not None:
                    self._held.move_to_end(band)
                    found[band] = held[0]
                elif band not in self._decoding:
                    missing.append(band)
        return missing

    def _claim(self, missing: list[Band], at_once: int) -> dict[Band, Future[NDArray[Any]]]:
        """Take from *missing* what this thread is to decode, and what others wait for meanwhile."""
        mine: dict[Band, Future[NDArray[Any]]] = {}
        with self._lock:
            while missing and len(mine) < at_once:
                band = missing.pop(0)
                if band not in self._held and band not in self._decoding:
                    mine[band] = self._decoding[band] = Future()
        return mine

    def _decode(
        self,
        mine: dict[Band, Future[NDArray[Any]]],
        decode: Callable[[Sequence[Band]], list[NDArray[Any]]],
        limit_bytes: int,
        found: dict[Band, NDArray[Any]],
    ) -> None:
        if not mine:
            return
        try:
            made = dict(zip(mine, decode(list(mine)), strict=True))
        except BaseException as error:
            with self._lock:
                for band in mine:
                    del self._decoding[band]
            for future in mine.values():
                future.set_exception(error)
            raise
        with self._lock:
            for band, values in made.items():
                values.flags.writeable = False
                del self._decoding[band]
                self._held[band] = (values, _bytes_of(values))
                self.held_bytes += self._held[band][1]
            while self.held_bytes > limit_bytes and len(self._held) > 1:
                self.held_bytes -= self._held.popitem(last=False)[1][1]
        for band, future in mine.items():
            future.set_result(made[band])
        found.update(made)

    def _await(
        self,
        band: Band,
        decode: Callable[[Sequence[Band]], list[NDArray[Any]]],
        limit_bytes: int,
        found: dict[Band, NDArray[Any]],
    ) -> None:
        """For a band that another thread decodes, or did."""
        with self._lock:
            held, future = self._held.get(band), self._decoding.get(band)
        if held is not None:
            found[band] = held[0]
        elif future is not None:
            found[band] = future.result()
        else:  # it fell out again
            self._decode(self._claim([band], 1), decode, limit_bytes, found)


def _bytes_of(values: NDArray[Any]) -> int:
    if values.dtype.kind != "O":
        return int(values.nbytes)
    return sum(sys.getsizeof(one) + POINTER_BYTES for one in values.reshape(-1).tolist())


_bands = Bands()


def process_bands() -> Bands:
    """Those of this process: of all stores, as they share its memory."""
    return _bands


def _forget_parent() -> None:
    """In a forked child: another thread of the parent may have held the lock, or been decoding."""
    global _bands
    _bands = Bands()


os.register_at_fork(after_in_child=_forget_parent)
