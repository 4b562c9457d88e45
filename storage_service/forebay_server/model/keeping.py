"""What one tier keeps: by plans where there are some, by what readers did lately elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from forebay_server.model.admission import ReactiveCache
from forebay_server.model.nextuse import REFUSED, Admission, NextUse

_BEFORE_ANY_PLAN: Final = (-sys.float_info.max, 0.0)
"""Keys that go before this one belong to blobs that no plan needs again."""


class Keeping(NextUse):
    """A :class:`NextUse` that also decides about blobs and times without a plan.

    * No plans at all: a :class:`ReactiveCache` decides.
    * A plan needs the blob again: the plans decide.
    * Plans, but none for the blob: it gets in if the reactive policy wants it and what no plan
      needs makes room.

    Tell :meth:`asked` about each read, before :meth:`should_admit`.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self.capacity_bytes = capacity_bytes
        """What the tier may hold, as it was last told."""
        self._reactive = ReactiveCache(capacity_bytes)

    @property
    def following(self) -> str:
        """The policy for what is not planned: for metrics and explanations."""
        return self._reactive.following

    def resize(self, capacity_bytes: int) -> None:
        """What the tier may hold has changed; small changes cost nothing."""
        self.capacity_bytes = capacity_bytes
        self._reactive.resize(capacity_bytes)

    def asked(self, blob: str, num_bytes: int, now: float) -> None:
        """Somebody reads *blob*, which the tier has or has not: once per reader, and not for
        checkpoints."""
        self._reactive.access(blob, num_bytes)
        self.touched(blob, now)

    def stored(self, blob: str, num_bytes: int, now: float) -> None:
        """See :class:`NextUse`."""
        super().stored(blob, num_bytes, now)
        self._reactive.stored(blob, num_bytes)

    def removed(self, blob: str) -> None:
        """See :class:`NextUse`."""
        super().removed(blob)
        self._reactive.removed(blob)

    def victims(
        self, bytes_needed: int, may_go: Callable[[str], bool] = lambda blob: True
    ) -> list[str]:
        """See :class:`NextUse`; without plans in the order of the reactive policy."""
        if self._plans:
            return super().victims(bytes_needed, may_go)
        return self._reactive.victims(bytes_needed, may_go)

    def should_admit(
        self,
        blob: str,
        num_bytes: int,
        room_bytes: int,
        may_go: Callable[[str], bool] = lambda blob: True,
    ) -> Admission:
        """See :class:`NextUse`."""
        if not self._plans:
            return self._reactive.should_admit(blob, num_bytes, room_bytes, may_go)
        if self._is_planned(blob):
            return super().should_admit(blob, num_bytes, room_bytes, may_go)
        if not self._reactive.wants(blob):
            return REFUSED
        return self._admit_before(_BEFORE_ANY_PLAN, num_bytes, room_bytes, may_go)
