"""Room for copies that policies demand: what nothing pins or promises goes for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from forebay_server.model.placement import CACHE
from forebay_server.tier.registry import Tiers
from forebay_server.tier.space import in_blocks
from forebay_server.tier.store import Tier
from forebay_wire.errors import ResourceExhausted

MakeRoom = Callable[[Tier, int], Awaitable[object]]
"""Gives so many bytes of a tier back, if there is that much that may go."""


def kind_of(tier: Tier) -> str:
    """The kind of *tier* as placement looks at it."""
    return CACHE if tier.caches_only else tier.kind


class RoomMaker:
    """Belongs to the event loop."""

    def __init__(self, tiers: Tiers, make_room: MakeRoom, room_in: Callable[[Tier], int]) -> None:
        """*room_in*: bytes that may be added in a landing tier without taking others'."""
        self._tiers = tiers
        self._make_room = make_room
        self._room_in = room_in

    def left_in(self, tier: Tier) -> int:
        """Bytes that copies may take up in *tier* as it is."""
        return self._room_in(tier) if tier in self._tiers.landing else tier.space().free_bytes

    async def ensure(self, name: str, num_bytes: int) -> None:
        """Have room for a file of *num_bytes* in the tier *name*; :class:`ResourceExhausted` if
        what may go there does not suffice."""
        tier, needed = self._tiers.get(name), in_blocks(num_bytes)
        short = needed - self.left_in(tier)
        if short > 0 and tier in self._tiers.landing:
            await self._make_room(tier, short)
        left = self.left_in(tier)
        if left < needed:
            raise ResourceExhausted(
                f"it waits for room in tier {name}: {needed} bytes needed, {left} may be added; "
                "all else there is pinned, kept by a policy, open, or has no other copy. Unpin, "
                "change policies, delete something, or give the tier more room"
            )
