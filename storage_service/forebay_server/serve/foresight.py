"""What each landing tier holds that may go, beside what all plans are going to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from forebay_server.model.keeping import Keeping
from forebay_server.model.lookahead import OrderView, RangesView
from forebay_server.model.nextuse import Admission, Use

View = OrderView | RangesView

MAX_LOOK: Final = 20_000
"""Uses that one search for the next needed blobs looks at: some milliseconds."""


class Foresight:
    """Belongs to the event loop; its own clock, so that all speak of the same time.

    Only copies that may go are reported as stored (another tier has the blob, nothing pins it).
    """

    def __init__(
        self, tiers: Mapping[str, int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """*tiers*: the landing tiers, and how many bytes each may keep: see :meth:`resize`."""
        self.clock = clock
        self._tiers = {name: Keeping(num_bytes) for name, num_bytes in tiers.items()}
        self._views: dict[str, View] = {}

    # -------------------------------------------------------------------------------- plans

    @property
    def has_plans(self) -> bool:
        return bool(self._views)

    def add_plan(self, plan: str, view: View, position: int) -> None:
        """A loader registered, standing at *position*."""
        self._views[plan] = view
        for known in self._tiers.values():
            known.add_plan(plan, view, position, self.clock())

    def remove_plan(self, plan: str) -> None:
        """It ended. Idempotent."""
        self._views.pop(plan, None)
        for known in self._tiers.values():
            known.remove_plan(plan)

    def advance(self, plan: str, position: int) -> None:
        """A loader stands at *position*, not before the last one."""
        for known in self._tiers.values():
            known.advance(plan, position, self.clock())
        self._views[plan].forget_before(position)

    def served(self, plan: str, blob: str) -> None:
        """A reader of *plan*, if that is known, got *blob* for its next use."""
        if plan in self._views:
            for known in self._tiers.values():
                known.served(plan, blob)

    def is_needed(self, blob: str) -> bool:
        """Whether any plan reads *blob* again."""
        return any(known.next_use(blob) is not None for known in self._first())

    def seconds_until(self, blob: str) -> float | None:
        """How long until some plan needs *blob*; None: no plan does."""
        for known in self._first():
            at = known.next_use(blob)
            return None if at is None else at - self.clock()
        return None

    def upcoming(self, limit: int, wanted: Callable[[str], bool]) -> list[Use]:
        """The first use of each of the next *limit* blobs that are *wanted*, earliest first."""
        found: dict[str, Use] = {}
        seen: set[str] = set()
        num_known = sum(view.num_blobs for view in self._views.values())
        for looked, use in enumerate(self._deadlines()):
            if looked >= MAX_LOOK or len(found) >= limit or len(seen) >= num_known:
                break
            if use.blob in seen:
                continue
            seen.add(use.blob)
            if wanted(use.blob):
                found[use.blob] = use
        return list(found.values())

    # ---------------------------------------------------------------------------- the tiers

    def stored(self, tier: str, blob: str, num_bytes: int) -> None:
        """*tier* holds *blob*, in a file of *num_bytes*, and it may go."""
        self._tiers[tier].stored(blob, num_bytes, self.clock())

    def resize(self, tier: str, num_bytes: int) -> None:
        """*tier* may keep so much now."""
        self._tiers[tier].resize(num_bytes)

    def asked(self, blob: str, num_bytes: int) -> None:
        """Somebody reads *blob*, which is none of a checkpoint, wherever it lies: once per reader,
        and before :meth:`should_admit`."""
        for known in self._tiers.values():
            known.asked(blob, num_bytes, self.clock())

    def touched(self, blob: str) -> None:
        """Somebody reads *blob*, and that says nothing about who will."""
        for known in self._tiers.values():
            known.touched(blob, self.clock())

    def removed(self, tier: str, blob: str) -> None:
        """*tier* holds *blob* no more. Idempotent."""
        self._tiers[tier].removed(blob)

    def holds(self, tier: str, blob: str) -> bool:
        """Whether *tier* holds *blob* as something that may go."""
        return blob in self._tiers[tier]

    def victims(self, tier: str, num_bytes: int, may_go: Callable[[str], bool]) -> list[str]:
        """What *tier* gives up first, of together at least *num_bytes*."""
        return self._tiers[tier].victims(num_bytes, may_go)

    def should_admit(
        self, tier: str, blob: str, num_bytes: int, room_bytes: int, may_go: Callable[[str], bool]
    ) -> Admission:
        """Whether *blob* is worth its room in *tier*, and what goes for it."""
        return self._tiers[tier].should_admit(blob, num_bytes, room_bytes, may_go)

    def is_wanted(self, tier: str, blob: str, num_bytes: int) -> bool:
        """Whether *tier* would keep *blob* if nothing had to go for it."""
        return self._tiers[tier].should_admit(blob, num_bytes, num_bytes).admit

    def capacities(self) -> dict[str, int]:
        """Tier to bytes that it may hold, the fastest first."""
        return {name: known.capacity_bytes for name, known in self._tiers.items()}

    def policies(self) -> dict[str, str]:
        """Tier to the policy that it follows for what no plan knows."""
        return {name: known.following for name, known in self._tiers.items()}

    def _first(self) -> Iterator[Keeping]:
        yield from list(self._tiers.values())[:1]

    def _deadlines(self) -> Iterator[Use]:
        for known in self._first():
            yield from known.deadlines()
