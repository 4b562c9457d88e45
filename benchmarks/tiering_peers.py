"""Cache policies that the daemon's are compared with, as their papers describe them.

Each is made with a capacity in bytes and answers ``access(blob, num_bytes)``: whether the blob was
there. Those that bring in every missed blob do so also if they regret it; that is the point.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

NEVER = 1 << 60


class Policy(Protocol):
    """One cache."""

    def access(self, blob: str, num_bytes: int) -> bool:
        """Read *blob*; True if it was there."""


class Lru:
    """Evicts what was not used for the longest time."""

    def __init__(self, capacity_bytes: int) -> None:
        self.room = capacity_bytes
        self.sizes: OrderedDict[str, int] = OrderedDict()

    def access(self, blob: str, num_bytes: int) -> bool:
        if blob in self.sizes:
            self.sizes.move_to_end(blob)
            return True
        if num_bytes <= self.room + sum_at_most(self.sizes, num_bytes):
            while self.room < num_bytes:
                self.room += self.sizes.popitem(last=False)[1]
            self.sizes[blob] = num_bytes
            self.room -= num_bytes
        return False


def sum_at_most(sizes: OrderedDict[str, int], enough: int) -> int:
    """The sum of *sizes*, or any number above *enough*."""
    total = 0
    for num_bytes in sizes.values():
        total += num_bytes
        if total > enough:
            break
    return total


class Random:
    """Evicts any blob."""

    def __init__(self, capacity_bytes: int) -> None:
        self.room = capacity_bytes
        self.capacity = capacity_bytes
        self.blobs: list[str] = []
        self.places: dict[str, tuple[int, int]] = {}
        self.dice = random.Random(0)

    def access(self, blob: str, num_bytes: int) -> bool:
        if blob in self.places:
            return True
        if num_bytes > self.capacity:
            return False
        while self.room < num_bytes:
            place = self.dice.randrange(len(self.blobs))
            gone, last = self.blobs[place], self.blobs.pop()
            self.room += self.places.pop(gone)[1]
            if gone != last:
                self.blobs[place] = last
                self.places[last] = (place, self.places[last][1])
        self.places[blob] = (len(self.blobs), num_bytes)
        self.blobs.append(blob)
        self.room -= num_bytes
        return False


class Sieve:
    """Y. Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024."""

    def __init__(self, capacity_bytes: int) -> None:
        self.room = capacity_bytes
        self.capacity = capacity_bytes
        self.visited: dict[str, bool] = {}
        self.sizes: dict[str, int] = {}
        self.newer: dict[str, str | None] = {}
        self.older: dict[str, str | None] = {}
        self.head: str | None = None
        self.tail: str | None = None
        self.hand: str | None = None

    def access(self, blob: str, num_bytes: int) -> bool:
        if blob in self.visited:
            self.visited[blob] = True
            return True
        if num_bytes > self.capacity:
            return False
        while self.room < num_bytes:
            self._evict()
        self.visited[blob] = False
        self.sizes[blob] = num_bytes
        self.room -= num_bytes
        self.newer[blob], self.older[blob] = None, self.head
        if self.head is not None:
            self.newer[self.head] = blob
        self.head = blob
        if self.tail is None:
            self.tail = blob
        return False

    def _evict(self) -> None:
        hand = self.hand or self.tail
        while hand is not None and self.visited[hand]:
            self.visited[hand] = False
            hand = self.newer[hand] or self.tail
        assert hand is not None
        newer, older = self.newer.pop(hand), self.older.pop(hand)
        self.hand = newer
        if newer is not None:
            self.older[newer] = older
        else:
            self.head = older
        if older is not None:
            self.newer[older] = newer
        else:
            self.tail = newer
        del self.visited[hand]
        self.room += self.sizes.pop(hand)


class S3Fifo:
    """J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: a small queue
    of 10 %, a main one, and a ghost of as many bytes as main may hold."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity = capacity_bytes
        self.small_target = capacity_bytes // 10
        self.small: deque[str] = deque()
        self.main: deque[str] = deque()
        self.small_bytes = 0
        self.main_bytes = 0
        self.ghost: OrderedDict[str, int] = OrderedDict()
        self.ghost_bytes = 0
        self.uses: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def access(self, blob: str, num_bytes: int) -> bool:
        if blob in self.uses:
            self.uses[blob] = min(3, self.uses[blob] + 1)
            return True
        if num_bytes > self.capacity:
            return False
        while self.small_bytes + self.main_bytes + num_bytes > self.capacity:
            self._evict()
        self.sizes[blob] = num_bytes
        self.uses[blob] = 0
        if blob in self.ghost:
            self.ghost_bytes -= self.ghost.pop(blob)
            self._to_main(blob)
        else:
            self.small.append(blob)
            self.small_bytes += num_bytes
        return False

    def _to_main(self, blob: str) -> None:
        self.main.append(blob)
        self.main_bytes += self.sizes[blob]

    def _evict(self) -> None:
        if self.small and (self.small_bytes >= self.small_target or not self.main):
            blob = self.small.popleft()
            self.small_bytes -= self.sizes[blob]
            if self.uses[blob] > 1:
                self.uses[blob] = 0
                self._to_main(blob)
                return
            self.ghost[blob] = self.sizes[blob]
            self.ghost_bytes += self.sizes[blob]
            while self.ghost_bytes > self.capacity - self.small_target:
                self.ghost_bytes -= self.ghost.popitem(last=False)[1]
        else:
            blob = self.main.popleft()
            self.main_bytes -= self.sizes[blob]
            if self.uses[blob] > 0:
                self.uses[blob] -= 1
                self._to_main(blob)
                return
        del self.uses[blob], self.sizes[blob]


class NeverEvict:
    """Keeps what came first."""

    def __init__(self, capacity_bytes: int) -> None:
        self.room = capacity_bytes
        self.blobs: set[str] = set()

    def access(self, blob: str, num_bytes: int) -> bool:
        if blob in self.blobs:
            return True
        if num_bytes <= self.room:
            self.blobs.add(blob)
            self.room -= num_bytes
        return False


class Belady:
    """Evicts what is needed farthest in the future, and does not keep what would go first: the
    optimum for blobs of equal size, and close to it for others. It knows the whole trace."""

    def __init__(self, capacity_bytes: int, blobs: Sequence[str]) -> None:
        self.room = capacity_bytes
        self.next_uses = [NEVER] * len(blobs)
        seen: dict[str, int] = {}
        for index in range(len(blobs) - 1, -1, -1):
            self.next_uses[index] = seen.get(blobs[index], NEVER)
            seen[blobs[index]] = index
        self.index = 0
        self.sizes: dict[str, int] = {}
        self.current: dict[str, int] = {}
        self.farthest: list[tuple[int, str]] = []

    def access(self, blob: str, num_bytes: int) -> bool:
        next_use = self.next_uses[self.index]
        self.index += 1
        if blob in self.sizes:
            self._set(blob, next_use)
            return True
        if next_use < NEVER and self._make_room(num_bytes, next_use):
            self.sizes[blob] = num_bytes
            self.room -= num_bytes
            self._set(blob, next_use)
        return False

    def _set(self, blob: str, next_use: int) -> None:
        self.current[blob] = next_use
        heapq.heappush(self.farthest, (-next_use, blob))

    def _make_room(self, num_bytes: int, next_use: int) -> bool:
        going: list[str] = []
        room = self.room
        while room < num_bytes and self.farthest:
            use, blob = self.farthest[0]
            if self.current.get(blob) != -use:
                heapq.heappop(self.farthest)
                continue
            if -use <= next_use:
                break
            heapq.heappop(self.farthest)
            going.append(blob)
            room += self.sizes[blob]
        if room < num_bytes:
            for blob in going:
                heapq.heappush(self.farthest, (-self.current[blob], blob))
            return False
        for blob in going:
            del self.current[blob]
            self.room += self.sizes.pop(blob)
        return True


REACTIVE = {
    "LRU": Lru,
    "random": Random,
    "SIEVE": Sieve,
    "S3-FIFO": S3Fifo,
    "never-evict": NeverEvict,
}
"""Those that know nothing of the future."""
