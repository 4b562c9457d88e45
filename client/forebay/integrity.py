"""Whether all that is stored is good: scrub, fsck, garbage; part of :class:`forebay.Client`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from forebay.methods import Integrity
from forebay_wire.errors import StorageError
from forebay_wire.v1 import integrity_pb2

if TYPE_CHECKING:
    from forebay._channel import RpcChannel

POLL_SECONDS = 0.2
LONGEST_POLL_SECONDS = 2.0
REPAIR_SECONDS = 60.0
"""How long a scrub that has ended is waited for to have its damage repaired."""
FSCK_SECONDS = 6 * 3600.0
GARBAGE_SECONDS = 600.0


class IntegrityCalls:
    """The calls of :class:`forebay.Client` about whether bytes are good. Thread-safe."""

    channel: RpcChannel

    def scrub(
        self,
        tier: str = "",
        *,
        on_progress: Callable[[integrity_pb2.ScrubState], object] = lambda state: None,
    ) -> integrity_pb2.ScrubState:
        """Have every copy, in *tier* or in all tiers, read and compared with its digests.

        Returns the report, fields as in ``integrity.proto``, once it is done and what was damaged
        has had a minute to be repaired; it goes on in the daemon if this caller ends. Damage is no
        error: see ``damaged``. *on_progress* is told now and then how far it is.
        """
        request = integrity_pb2.ScrubRequest(tier=tier)
        state = self.channel.call(Integrity.Scrub, request)
        asked = integrity_pb2.GetScrubRequest(job=state.job)
        wait = POLL_SECONDS
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            on_progress(state)
            if state.state == "failed":
                raise StorageError(f"the scrub failed: {state.error}")
            if state.state == "done":
                if all(one.outcome != "quarantined" for one in state.damaged):
                    break
                deadline = deadline or time.monotonic() + REPAIR_SECONDS
            time.sleep(wait)
            wait = min(wait * 1.5, LONGEST_POLL_SECONDS)
            state = self.channel.call(Integrity.GetScrub, asked)
        return state

    def fsck(self, *, repair: bool = False) -> integrity_pb2.FsckReport:
        """Compare the catalog with the tiers, both ways: fields as in ``integrity.proto``.

        Nothing is changed unless *repair*: then what can be mended is, and ``left`` says what is
        wrong afterwards.
        """
        request = integrity_pb2.FsckRequest(repair=repair)
        return self.channel.call(Integrity.Fsck, request, timeout=FSCK_SECONDS)

    def garbage(self) -> integrity_pb2.ListGarbageResponse:
        """What garbage collection would delete now, and why; changes nothing."""
        request = integrity_pb2.ListGarbageRequest()
        return self.channel.call(Integrity.ListGarbage, request, timeout=GARBAGE_SECONDS)

    def collect_garbage(self) -> None:
        """Have it deleted now, in the background, and not within the next hour."""
        self.channel.call(Integrity.CollectGarbage, integrity_pb2.CollectGarbageRequest())
