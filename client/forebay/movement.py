"""Where bytes lie: warm holds, pins, policies, the trash, jobs; part of :class:`forebay.Client`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from forebay.methods import Movement
from forebay_wire.errors import DeadlineExceeded, StorageError
from forebay_wire.limits import MAX_PAGE_ROWS
from forebay_wire.v1 import admin_pb2, movement_pb2

if TYPE_CHECKING:
    from forebay._channel import RpcChannel

POLL_SECONDS = 0.2
LONGEST_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class WarmState:
    """What a warm hold or a pin promised, and whether that is still so."""

    token: str
    """Names it, for ``is_warm``, ``unpin`` and ``forebay pins``."""
    still_warm: bool
    """All blobs are in the tier, were verified, and stay there."""
    because: str
    """Why not; empty if it is."""
    target: str
    tier: str
    state: str
    """``fetching``, ``held``, ``ended`` or ``failed``."""
    done_bytes: int
    total_bytes: int
    expires_unix: float
    """0: until it is unpinned, or not yet known."""


class MovementCalls:
    """The calls of :class:`forebay.Client` about where bytes lie. Thread-safe."""

    channel: RpcChannel

    # Warm holds and pins.

    def warm(
        self,
        name: str,
        version: int | str = "latest",
        *,
        tier: str = "",
        hold: float | timedelta = 0.0,
        timeout: float | None = None,
        on_progress: Callable[[WarmState], object] = lambda state: None,
    ) -> WarmState:
        """Have all of a dataset version in *tier* (default: the fastest), verified, and keep it
        there for *hold* seconds from then on (0: until it is unpinned).

        Returns once it is so. ResourceExhausted at once if it cannot fit, with the bytes needed and
        what holds the space; DeadlineExceeded after *timeout* seconds, while it goes on: ``pins``
        names it. *on_progress* is told now and then how far it is.
        """
        target = f"dataset {name}" + ("" if version == "latest" else f"@{version}")
        state = self.pin(target, tier=tier, hold=hold)
        deadline = None if timeout is None else time.monotonic() + timeout
        wait = POLL_SECONDS
        while state.state == "fetching":
            on_progress(state)
            if deadline is not None and time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"{state.target} is not warm in {state.tier} after {timeout:g} s: "
                    f"{state.because}; it goes on (forebay pins {state.token})"
                )
            time.sleep(wait)
            wait = min(wait * 1.5, LONGEST_POLL_SECONDS)
            state = self.is_warm(state.token)
        on_progress(state)
        if not state.still_warm:
            raise StorageError(f"{state.target} is not warm in {state.tier}: {state.because}")
        return state

    def is_warm(self, token: str) -> WarmState:
        """Whether what a warm hold promised is still so, in one call. NotFound for an unknown
        token."""
        return _state(self.channel.call(Movement.GetPin, movement_pb2.GetPinRequest(pin=token)))

    def pin(self, target: str, *, tier: str = "", hold: float | timedelta = 0.0) -> WarmState:
        """Keep a dataset (``NAME``, ``NAME@VERSION``) or a generation (``RUN@ATTEMPT/STEP``) in
        *tier* (default: the fastest); what is not there is fetched in the background.

        The room is reserved on return: ResourceExhausted if it cannot fit. *hold* as for ``warm``.
        """
        seconds = hold.total_seconds() if isinstance(hold, timedelta) else float(hold)
        request = movement_pb2.PinRequest(target=target, tier=tier, hold_seconds=seconds)
        return _state(self.channel.call(Movement.Pin, request))

    def unpin(self, which: str) -> int:
        """End a pin (its token), or all pins of a dataset or generation; how many there were."""
        request = movement_pb2.UnpinRequest(pin=which)
        return self.channel.call(Movement.Unpin, request).num_unpinned

    def pins(self) -> list[WarmState]:
        """All pins, those that ended lately included, oldest first."""
        answer = self.channel.call(Movement.ListPins, movement_pb2.ListPinsRequest())
        return [_state(one) for one in answer.pins]

    # Policies.

    def set_policy(self, owner: str, policy: str) -> str:
        """Assign a named policy to ``"dataset NAME"`` or ``"run NAME"``, which need not exist yet;
        the policy that it has now. Empty: the default one. InvalidRequest for an unknown one."""
        request = movement_pb2.SetPolicyRequest(owner=owner, policy=policy)
        return self.channel.call(Movement.SetPolicy, request).policy

    def policies(self) -> movement_pb2.ListPoliciesResponse:
        """The named policies, and what they are assigned to: fields as in ``movement.proto``."""
        return self.channel.call(Movement.ListPolicies, movement_pb2.ListPoliciesRequest())

    # The trash.

    def trash(self) -> list[movement_pb2.TrashEntry]:
        """What was deleted and can be restored, newest first."""
        answer = self.channel.call(Movement.ListTrash, movement_pb2.ListTrashRequest())
        return list(answer.entries)

    def restore_trash(self, which: str) -> movement_pb2.TrashEntry:
        """Bring back what one deletion took: its own name, or what was deleted last under a name
        (``"mnist"``, ``"dataset mnist"``). AlreadyExists if the name is taken by now, Conflict if
        it may mean more than one thing, NotFound."""
        request = movement_pb2.RestoreTrashRequest(deletion=which)
        return self.channel.call(Movement.RestoreTrash, request)

    def empty_trash(self, which: str = "") -> int:
        """Let go what one deletion took, or everything, for good; how many deletions."""
        request = movement_pb2.EmptyTrashRequest(deletion=which)
        return self.channel.call(Movement.EmptyTrash, request).num_deletions

    # What goes on, and why.

    def jobs(self, *, everything: bool = False) -> list[admin_pb2.JobStatus]:
        """Background jobs, oldest first; *everything*: also finished ones and those due later."""
        found: list[admin_pb2.JobStatus] = []
        after = ""
        while True:
            request = movement_pb2.ListJobsRequest(all=everything, after=after, limit=MAX_PAGE_ROWS)
            page = self.channel.call(Movement.ListJobs, request)
            found.extend(page.jobs)
            after = page.next
            if not after:
                return found

    def why(self, subject: str, num_events: int = 0) -> movement_pb2.WhyResponse:
        """Where a blob, dataset, run or generation lies, why, and what happened to it: fields as in
        ``movement.proto``. NotFound if nothing is known of it."""
        request = movement_pb2.WhyRequest(subject=subject, num_events=num_events)
        return self.channel.call(Movement.Why, request)


def _state(found: movement_pb2.PinState) -> WarmState:
    return WarmState(
        token=found.pin,
        still_warm=found.is_warm,
        because=found.because,
        target=found.target,
        tier=found.tier,
        state=found.state,
        done_bytes=found.done_bytes,
        total_bytes=found.total_bytes,
        expires_unix=found.expires_unix,
    )
