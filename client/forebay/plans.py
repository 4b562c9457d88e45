"""The daemon's calls about plans of explicit ranges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from forebay.methods import Method, Plans, Request
from forebay_wire.v1 import plans_pb2

if TYPE_CHECKING:
    from forebay._channel import RpcChannel


class PlanCalls:
    """What a reader says of one plan. Thread-safe; raises what the daemon raises."""

    def __init__(self, channel: RpcChannel, plan: str) -> None:
        self._channel = channel
        self._plan = plan

    def register(self, reader: str, manifest: str, position: int, *, wait_for_daemon: bool) -> None:
        """Begin the plan anew: *reader* says whose it is, *manifest* of which dataset version;
        its first range will begin at *position*. NotFound if there is no such version."""
        request = plans_pb2.RegisterPlanRequest(
            plan=self._plan, loader=reader, manifest=manifest, position=position
        )
        self._call(Plans.RegisterPlan, request, wait_for_daemon=wait_for_daemon)

    def add_ranges(self, page: int, ranges: Iterable[tuple[Sequence[str], int]]) -> None:
        """The blobs that are read next: those of each turn, and how many samples it has."""
        found = [
            plans_pb2.BlobRange(blob=blob, num_samples=count, beside=place > 0)
            for blobs, count in ranges
            for place, blob in enumerate(blobs)
        ]
        request = plans_pb2.AddRangesRequest(plan=self._plan, page=page, ranges=found)
        self._call(Plans.AddRanges, request)

    def advance(self, position: int) -> None:
        """All before *position* is read. NotFound: register again."""
        request = plans_pb2.AdvancePlanRequest(plan=self._plan, position=position)
        self._call(Plans.AdvancePlan, request)

    def end(self) -> None:
        """Idempotent."""
        self._call(Plans.EndPlan, plans_pb2.EndPlanRequest(plan=self._plan))

    def _call(
        self, method: Method[Request, Any], request: Request, *, wait_for_daemon: bool = False
    ) -> None:
        self._channel.call(method, request, wait_for_daemon=wait_for_daemon)
