"""Where plans stand: how much of what their loaders read next is here already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.serve.plans import Plan, Plans
from forebay_server.tier.registry import Tiers

MAX_AHEAD: Final = 64
"""Blobs of one plan that are looked at: as many as prefetching looks at."""

MAX_AHEAD_OF_ALL: Final = 2048

MAX_USES: Final = 4096
"""Of one plan: in a shuffled order the next blobs may come again and again."""


@dataclass(frozen=True)
class Standing:
    """One plan."""

    plan: Plan
    ahead_bytes: int
    """Of the blobs that come next, as far as they were looked at."""
    ready_bytes: int
    """Of these: in a local tier."""
    expires_seconds: float
    now: float
    """By the clock that the plan's times are of."""


class PlanReader:
    """Reads where all plans stand. Belongs to the event loop."""

    def __init__(self, tiers: Tiers, catalog: Catalog, plans: Plans) -> None:
        self._local = frozenset(tier.name for tier in tiers.landing)
        self._catalog = catalog
        self._plans = plans

    async def read(self) -> list[Standing]:
        """All plans now, the oldest first."""
        plans = self._plans.all
        limit = max(1, min(MAX_AHEAD, MAX_AHEAD_OF_ALL // max(1, len(plans))))
        ahead = [_next_blobs(plan, limit) for plan in plans]
        located = await self._catalog.locate(sorted({blob for blobs in ahead for blob in blobs}))
        sizes = {blob: one.num_bytes for blob, one in located.items()}
        ready = {
            blob: one.num_bytes
            for blob, one in located.items()
            if any(replica.tier in self._local for replica in one.live())
        }
        now = self._plans.clock()
        return [
            Standing(
                plan,
                sum(sizes.get(blob, 0) for blob in blobs),
                sum(ready.get(blob, 0) for blob in blobs),
                max(0.0, plan.expires - now),
                now,
            )
            for plan, blobs in zip(plans, ahead, strict=True)
        ]


def _next_blobs(plan: Plan, limit: int) -> Sequence[str]:
    found: dict[str, None] = {}
    start = plan.time(plan.epoch, plan.position)
    for _, blob in islice(plan.view.uses(start), MAX_USES):
        found.setdefault(blob)
        if len(found) >= limit:
            break
    return list(found)
