"""The states of packs and generations, and which event leads from which to which."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from forebay_wire.durability import Durability, check_durability, reaches


class PackState(StrEnum):
    """Where one rank's contribution to a generation stands."""

    OPEN = "open"
    """Planned; the rank still fills its slot."""
    SEALED = "sealed"
    """Complete in the daemon's memory; lands without the trainer."""
    LANDED = "landed"
    """Digested and fsynced on a tier of this node."""


class GenerationState(StrEnum):
    """Where a generation stands; only a committed one is ever visible to a reader."""

    OPEN = "open"
    SEALED = "sealed"
    """All planned ranks have sealed; it lands without any trainer."""
    COMMITTED = "committed"
    ABORTED = "aborted"
    """Given up before it was committed: a newer attempt or the daemon's end came first."""
    FAILED = "failed"
    """A pack could not be landed."""


class Event(StrEnum):
    """What happens to a generation."""

    ALL_SEALED = "all ranks sealed"
    ALL_LANDED = "all packs landed"
    FENCED = "a newer attempt of the run began"
    DAEMON_ENDED = "the daemon ended"
    FAILED = "a pack could not be landed"


__all__ = [
    "TRANSITIONS",
    "Durability",
    "Event",
    "GenerationState",
    "PackState",
    "advance",
    "after_packs",
    "check_durability",
    "durability_of",
    "is_final",
    "reaches",
]

_G = GenerationState

TRANSITIONS: Final[dict[tuple[GenerationState, Event], GenerationState]] = {
    (_G.OPEN, Event.ALL_SEALED): _G.SEALED,
    (_G.OPEN, Event.FENCED): _G.ABORTED,
    (_G.OPEN, Event.DAEMON_ENDED): _G.ABORTED,
    (_G.OPEN, Event.FAILED): _G.FAILED,
    (_G.SEALED, Event.ALL_LANDED): _G.COMMITTED,
    (_G.SEALED, Event.FENCED): _G.SEALED,
    (_G.SEALED, Event.DAEMON_ENDED): _G.ABORTED,
    (_G.SEALED, Event.FAILED): _G.FAILED,
    (_G.COMMITTED, Event.FENCED): _G.COMMITTED,
    (_G.COMMITTED, Event.DAEMON_ENDED): _G.COMMITTED,
    (_G.ABORTED, Event.FENCED): _G.ABORTED,
    (_G.ABORTED, Event.DAEMON_ENDED): _G.ABORTED,
    (_G.ABORTED, Event.FAILED): _G.ABORTED,
    (_G.FAILED, Event.FENCED): _G.FAILED,
    (_G.FAILED, Event.DAEMON_ENDED): _G.FAILED,
    (_G.FAILED, Event.FAILED): _G.FAILED,
}
"""Every pair that is missing here cannot happen: above all, only a sealed generation is ever
committed, and a committed one stays so until it is deleted."""


def advance(state: GenerationState, event: Event) -> GenerationState | None:
    """The state after *event*, or None if the event cannot happen to a generation in *state*."""
    return TRANSITIONS.get((state, event))


def after_packs(
    state: GenerationState, num_ranks: int, packs: Iterable[PackState]
) -> GenerationState:
    """The state of a generation of *num_ranks* once its *packs* (one each rank) stand as given."""
    found = list(packs)
    if len(found) < num_ranks or PackState.OPEN in found:
        return state
    if state is GenerationState.OPEN:
        state = TRANSITIONS[state, Event.ALL_SEALED]
    if state is GenerationState.SEALED and all(pack is PackState.LANDED for pack in found):
        state = TRANSITIONS[state, Event.ALL_LANDED]
    return state


def is_final(state: GenerationState) -> bool:
    """Whether no landing can change the state any more."""
    return state not in (GenerationState.OPEN, GenerationState.SEALED)


def durability_of(state: GenerationState, is_remote: bool) -> Durability:
    """What has been reached by a generation in *state*; *is_remote*: its manifest is published."""
    if state is GenerationState.COMMITTED:
        return Durability.REMOTE if is_remote else Durability.LOCAL
    return Durability.RAM if state is GenerationState.SEALED else Durability.NONE
