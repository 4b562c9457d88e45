"""What a tier keeps of what it is asked for while no plan tells what comes next.

No single policy is right for epochs, skewed reuse and moving working sets alike. So several are
run beside each other on names only, which costs no data, and the cache follows the one that would
have saved most bytes lately: M. K. Qureshi et al., "Adaptive insertion policies for high
performance caching", ISCA 2007 (set dueling), with whole shadow caches in place of sampled sets,
as C. Waldspurger et al., "Cache modeling and optimization using miniature simulations", USENIX ATC
2017, choose parameters.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from forebay_server.model.nextuse import REFUSED, Admission
from forebay_server.model.shadows import (
    KeepShadow,
    LruShadow,
    S3FifoShadow,
    Shadow,
    WindowedKeepShadow,
)

LEAD: Final = 1.05
"""Another policy is followed once it has saved this many times the bytes of the present one."""

CHANCE: Final = 2.0
"""And leads by this many standard deviations of what chance would make of their disagreements."""

GRAIN: Final = 16
"""Parts of the capacity; a change of less than one is not worth a reaction."""


@dataclass
class _Candidate:
    name: str
    shadow: Shadow
    saved_bytes: float = 0.0
    """Lately: old ones count less."""


class ReactiveCache:
    """Decides about reads that no plan announced. Not thread-safe; no clock: time is bytes read.

    Feed every read of something cacheable to :meth:`access`, once per reader; reads of checkpoints
    stay out. Report what really came and went to :meth:`stored` and :meth:`removed`: answers are
    advice. Each call costs O(log n), except when another policy is followed from then on: O(n).
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = max(1, capacity_bytes)
        self._now = 0.0
        self._keep = KeepShadow(self._capacity)
        self._candidates = (
            _Candidate("keep", self._keep),
            _Candidate("eager keep", KeepShadow(self._capacity, caution=2.0)),
            _Candidate("windowed keep", WindowedKeepShadow(self._capacity)),
            _Candidate("s3-fifo", S3FifoShadow(self._capacity)),
            _Candidate("lru", LruShadow(self._capacity)),
        )
        self._followed = self._candidates[0]
        self._disputed = 0.0
        """Sum of the squared sizes of what some candidates had and others had not, lately."""
        self._resident: OrderedDict[str, int] = OrderedDict()  # by last use
        self._unwanted: OrderedDict[str, None] = OrderedDict()
        """Residents that the followed policy does not hold, in the order they came to be so."""

    @property
    def following(self) -> str:
        """The name of the policy that is followed: for metrics and explanations."""
        return self._followed.name

    def access(self, blob: str, num_bytes: int) -> bool:
        """Somebody reads *blob*; whether the cache has it."""
        self._now += num_bytes
        decay = math.exp2(-num_bytes / self._half_life())
        num_hits = 0
        for candidate in self._candidates:
            shadow = candidate.shadow
            hit = shadow.access(blob, num_bytes, self._now)
            num_hits += hit
            candidate.saved_bytes = candidate.saved_bytes * decay + hit * num_bytes
            if candidate is self._followed:
                for gone in shadow.evicted:
                    if gone in self._resident and gone not in shadow:
                        self._unwanted[gone] = None
            shadow.evicted.clear()
        self._disputed *= decay
        if 0 < num_hits < len(self._candidates):
            self._disputed += num_bytes**2
        if blob in self._followed.shadow:
            self._unwanted.pop(blob, None)
        self._follow_the_best()
        if blob not in self._resident:
            return False
        self._resident.move_to_end(blob)
        return True

    def wants(self, blob: str) -> bool:
        """Whether the followed policy would hold *blob*, of whose read :meth:`access` knows."""
        return blob in self._followed.shadow

    def should_admit(
        self,
        blob: str,
        num_bytes: int,
        room_bytes: int,
        may_go: Callable[[str], bool] = lambda blob: True,
    ) -> Admission:
        """Whether a missed *blob*, of whose read :meth:`access` knows, is to be kept, and what goes
        for it. *room_bytes* are free."""
        if not self.wants(blob):
            return REFUSED
        if num_bytes <= room_bytes:
            return Admission(admit=True)
        victims = self._pick(num_bytes - room_bytes, may_go, only_unwanted=True)
        freed = sum(self._resident[victim] for victim in victims)
        if room_bytes + freed < num_bytes:
            return REFUSED
        return Admission(admit=True, victims=tuple(victims))

    def victims(
        self, bytes_needed: int, may_go: Callable[[str], bool] = lambda blob: True
    ) -> list[str]:
        """Blobs of together at least *bytes_needed* (all that may go, if they are fewer bytes):
        first what the followed policy does not hold, then the least recently used. Nothing is
        removed."""
        return self._pick(bytes_needed, may_go, only_unwanted=False)

    def stored(self, blob: str, num_bytes: int) -> None:
        """The cache has *blob* now, for whatever reason."""
        self._resident[blob] = num_bytes
        if blob not in self._followed.shadow:
            self._unwanted[blob] = None

    def removed(self, blob: str) -> None:
        """The cache has *blob* no more. Idempotent."""
        self._resident.pop(blob, None)
        self._unwanted.pop(blob, None)

    def forget(self, blob: str) -> None:
        """There is no such blob any more: it was deleted. Idempotent."""
        self.removed(blob)
        for candidate in self._candidates:
            candidate.shadow.forget(blob)

    def resize(self, capacity_bytes: int) -> None:
        """What the cache may hold has changed. Frees nothing by itself: see :meth:`victims`.
        Changes of less than 1/:data:`GRAIN` wait for more: this costs O(n)."""
        if abs(capacity_bytes - self._capacity) * GRAIN < self._capacity:
            return
        self._capacity = max(1, capacity_bytes)
        for candidate in self._candidates:
            candidate.shadow.resize(self._capacity)
            candidate.shadow.evicted.clear()
        self._list_unwanted()

    # ------------------------------------------------------------------------------- parts

    def _half_life(self) -> float:
        """Bytes of reads after which a saved byte counts half: an epoch or more, since within one
        a policy may have all its hits at the start."""
        longest = self._keep.longest_interval(self._now)
        return min(max(longest, self._capacity), 16.0 * self._capacity)

    def _follow_the_best(self) -> None:
        best = max(self._candidates, key=lambda one: one.saved_bytes)
        least = LEAD * self._followed.saved_bytes + CHANCE * math.sqrt(self._disputed)
        if best.saved_bytes > least:
            self._followed = best
            self._list_unwanted()

    def _list_unwanted(self) -> None:
        wanted = self._followed.shadow
        self._unwanted = OrderedDict((blob, None) for blob in self._resident if blob not in wanted)

    def _pick(
        self, bytes_needed: int, may_go: Callable[[str], bool], *, only_unwanted: bool
    ) -> list[str]:
        picked: dict[str, None] = {}
        for source in (self._unwanted,) if only_unwanted else (self._unwanted, self._resident):
            for blob in source:
                if bytes_needed <= 0:
                    return list(picked)
                if blob not in picked and may_go(blob):
                    picked[blob] = None
                    bytes_needed -= self._resident[blob]
        return list(picked)
