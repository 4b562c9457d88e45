"""Who holds which blobs open: the counts behind the caps and behind a tier's open bytes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from forebay_wire.errors import LimitExceeded
from forebay_wire.limits import MAX_OPEN_BLOBS_PER_CLIENT, MAX_OPEN_BYTES_PER_CLIENT

MAX_ASKED_BACK: Final = 256
"""Ids in one answer: 18 KB."""


@dataclass(frozen=True)
class Hold:
    """One open of one blob."""

    blob: str
    tier: str
    num_bytes: int
    let_go: Callable[[], None] | None = None
    """To be called by whoever removes the hold."""


@dataclass
class _Client:
    holds: dict[str, list[Hold]] = field(default_factory=dict)
    num_blobs: int = 0
    num_bytes: int = 0
    asked_back: set[str] = field(default_factory=set)


class Holds:
    """All blobs that clients hold open. Thread-safe."""

    def __init__(
        self,
        max_blobs: int = MAX_OPEN_BLOBS_PER_CLIENT,
        max_bytes: int = MAX_OPEN_BYTES_PER_CLIENT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Caps for each client; *clock* answers Unix seconds."""
        self._clock = clock
        self._max_blobs = max_blobs
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}
        self._open_bytes: Counter[str] = Counter()
        self._open_blobs: Counter[str] = Counter()
        self._used: dict[str, float] = {}

    def add(self, client: str, holds: Sequence[Hold]) -> None:
        """Count *holds* for *client*: all, or none and :class:`LimitExceeded`."""
        if not holds:
            return
        more_bytes = sum(hold.num_bytes for hold in holds)
        with self._lock:
            held = self._clients.get(client) or _Client()
            self._check(held, len(holds), more_bytes)
            self._clients[client] = held
            held.num_blobs += len(holds)
            held.num_bytes += more_bytes
            for hold in holds:
                held.holds.setdefault(hold.blob, []).append(hold)
                self._open_bytes[hold.tier] += hold.num_bytes
                self._open_blobs[hold.blob] += 1
                self._used[hold.blob] = self._clock()

    def take_uses(self) -> dict[str, float]:
        """Which blobs were opened or released since the last call, and when, in Unix seconds."""
        with self._lock:
            uses, self._used = self._used, {}
            return uses

    def remove(self, client: str, blobs: Sequence[str]) -> list[Hold]:
        """One open less for each of *blobs*, the oldest, and what those were.

        Unknown ones are left out.
        """
        with self._lock:
            held = self._clients.get(client)
            if held is None:
                return []
            removed = []
            for blob in blobs:
                opens = held.holds.get(blob)
                if not opens:
                    continue
                removed.append(self._drop(held, opens.pop(0)))
                if not opens:
                    del held.holds[blob]
            if not held.holds:
                del self._clients[client]
            return removed

    def remove_client(self, client: str) -> list[Hold]:
        """Everything that *client* holds. Idempotent."""
        with self._lock:
            held = self._clients.pop(client, None)
            if held is None:
                return []
            return [self._drop(held, hold) for opens in held.holds.values() for hold in opens]

    def ask_back(self, blobs: Sequence[str]) -> None:
        """Note that whoever holds any of *blobs* is to release it, if it can."""
        wanted = set(blobs)
        with self._lock:
            for held in self._clients.values():
                held.asked_back |= wanted & held.holds.keys()

    def asked_back(self, client: str) -> list[str]:
        """What *client* is to release and still holds; told once."""
        with self._lock:
            held = self._clients.get(client)
            if held is None or not held.asked_back:
                return []
            asked, held.asked_back = held.asked_back, set()
            return sorted(asked & held.holds.keys())[:MAX_ASKED_BACK]

    def is_open(self, blob: str) -> bool:
        with self._lock:
            return self._open_blobs[blob] > 0

    def open_bytes(self) -> dict[str, int]:
        """Tier to bytes of blobs that were handed over from it and not released yet."""
        with self._lock:
            return dict(+self._open_bytes)

    def _drop(self, held: _Client, hold: Hold) -> Hold:
        self._used[hold.blob] = self._clock()
        held.num_blobs -= 1
        held.num_bytes -= hold.num_bytes
        self._open_bytes[hold.tier] -= hold.num_bytes
        self._open_blobs[hold.blob] -= 1
        if not self._open_blobs[hold.blob]:
            del self._open_blobs[hold.blob]
        return hold

    def _check(self, held: _Client, more_blobs: int, more_bytes: int) -> None:
        if held.num_blobs + more_blobs > self._max_blobs:
            raise LimitExceeded(
                f"a client may hold {self._max_blobs} blobs open; this one has {held.num_blobs} "
                f"and wants {more_blobs} more: close some first"
            )
        if held.num_bytes + more_bytes > self._max_bytes:
            raise LimitExceeded(
                f"a client may hold {self._max_bytes} bytes open; this one has {held.num_bytes} "
                f"and wants {more_bytes} more: close some first"
            )
