"""Where copies of a blob must be and may go: named policies, and what to do to follow them.

A decision is a list of copies to make and copies to drop. It never drops the last place of its
durability: what counts are the replicas that are live now, not the ones that it asks for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

DURABILITY: Final[Mapping[str, int]] = MappingProxyType({"ram": 0, "ssd": 1, "hdd": 1, "object": 2})
"""Tier kind to how much its copies survive: a process, this node, the node's loss."""

CACHE: Final = "cache"
"""Kind of a tier that stands in for ``object`` where the store can only cache: its copies serve
readers, and count for nothing when another one is to go. Policies do not name it."""

WHEN_IDLE: Final = math.inf
"""Due time of a copy that policy wants, but by no particular time."""

AHEAD_SECONDS: Final = 300.0
"""Before a copy is due, room begins to be made for it: until then it takes what is free."""


@dataclass(frozen=True)
class Policy:
    """What happens to the blobs of one dataset or run."""

    name: str
    land: tuple[str, ...] = ("ssd", "hdd")
    """Kinds of the tiers where new bytes land, best first."""
    copies: Mapping[str, float | None] = field(default_factory=dict)
    """Tier kind to the seconds after creation by which a copy is there; None: at leisure."""
    demote_after_seconds: Mapping[str, float] = field(default_factory=dict)
    """Tier kind to the seconds without a use after which the copy there goes."""
    encoding: Mapping[str, str] = field(default_factory=dict)
    """Tier kind to the encoding at rest of copies made there; missing: raw."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"policy {self.name!r}: {problem}")

    def _problem(self) -> str:
        named = [*self.land, *self.copies, *self.demote_after_seconds, *self.encoding]
        unknown = [kind for kind in named if kind not in DURABILITY]
        if unknown:
            return f"there is no tier kind {unknown[0]!r}; there are {', '.join(DURABILITY)}"
        if not self.land:
            return "it names no tier where new bytes land"
        if len(set(self.land)) != len(self.land):
            return f"land names a tier twice: {', '.join(self.land)}"
        bad = [kind for kind in self.land if kind not in ("ssd", "hdd")]
        if bad:
            return f"new bytes land in ssd or hdd, not in {bad[0]!r}"
        times = [*self.copies.items(), *self.demote_after_seconds.items()]
        for kind, seconds in times:
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                return f"{seconds} is no number of seconds ({kind})"
        both = [kind for kind in self.copies if kind in self.demote_after_seconds]
        if both:
            return f"it wants copies in {both[0]!r} and takes them away there: name it once"
        return ""


_DAY: Final = 86400.0

HOT: Final = Policy("hot", land=("ssd", "hdd"), copies={"ssd": 0.0, "object": None})
WARM: Final = Policy(
    "warm", land=("ssd", "hdd"), copies={"object": None}, demote_after_seconds={"ssd": 7 * _DAY}
)
COLD: Final = Policy(
    "cold",
    land=("hdd", "ssd"),
    copies={"object": None},
    demote_after_seconds={"ssd": 0.0, "hdd": _DAY},
    encoding={"hdd": "lz4"},
)

BUILT_IN: Final[Mapping[str, Policy]] = MappingProxyType(
    {policy.name: policy for policy in (HOT, WARM, COLD)}
)


@dataclass(frozen=True)
class TierRoom:
    """A tier that takes part in decisions. A tier out of service is not given."""

    tier: str
    kind: str
    free_bytes: int


@dataclass(frozen=True)
class ReplicaFacts:
    """A live replica; quarantined ones are not given."""

    tier: str
    kind: str
    is_open: bool = False
    """Some client has it open."""


@dataclass(frozen=True)
class BlobFacts:
    """All that a decision about one blob depends on. Times by one clock, in seconds."""

    now: float
    created: float
    last_used: float
    num_bytes: int
    replicas: tuple[ReplicaFacts, ...]
    pinned_tiers: frozenset[str] = frozenset()
    is_dirty: bool = False
    """A write, flush or move of it is under way, or what it promised is not yet kept elsewhere."""
    planned_next_use: float | None = None


@dataclass(frozen=True)
class Copy:
    """Make a copy in tier *to*, by the time *due* (:data:`WHEN_IDLE`: at leisure)."""

    to: str
    due: float
    encoding: str
    reason: str
    makes_room: bool = False
    """There is no room: copies that nothing pins or promises go for it."""


@dataclass(frozen=True)
class Drop:
    """Remove the copy in *tier*."""

    tier: str
    reason: str


Action = Copy | Drop


def fills(kind: str, wanted: str) -> bool:
    """Whether a copy in a tier of *kind* is one that a policy wants in *wanted*."""
    return kind == wanted or (kind == CACHE and wanted == "object")


def has_work(policy: Policy, kinds: Collection[str]) -> bool:
    """Whether *policy* may ever ask for copies in, or drops from, tiers of *kinds*."""
    return any(kind in policy.demote_after_seconds for kind in kinds) or any(
        fills(kind, wanted) for kind in kinds for wanted in policy.copies
    )


def decide(policy: Policy, facts: BlobFacts, rooms: Sequence[TierRoom]) -> list[Action]:
    """What to do about one blob, most urgent copies first, drops last.

    Copies go to tiers of *rooms* with space for it, or, if they are due soon, to one where space
    has to be made. A drop of this list is safe whatever else of
    the list was or was not done: another live replica of *facts* at least as durable stays.
    """
    if not facts.replicas:
        return []
    copies = _copies(policy, facts, rooms)
    return [*sorted(copies, key=lambda copy: copy.due), *_drops(policy, facts)]


def _copies(policy: Policy, facts: BlobFacts, rooms: Sequence[TierRoom]) -> list[Copy]:
    wanted: dict[str, Copy] = {}
    for kind, within in policy.copies.items():
        room = _best_room(kind, rooms)
        if room is None or any(fills(replica.kind, kind) for replica in facts.replicas):
            continue
        due = demanded = WHEN_IDLE if within is None else facts.created + within
        if kind != "object" and facts.planned_next_use is not None:
            due = min(due, facts.planned_next_use)
        fits = room.free_bytes >= facts.num_bytes
        if not fits and demanded > facts.now + AHEAD_SECONDS:
            continue
        reason = f"policy {policy.name} keeps a copy in {kind}"
        encoding = policy.encoding.get(kind, "raw")
        wanted[room.tier] = Copy(room.tier, due, encoding, reason, makes_room=not fits)
    held = {replica.tier for replica in facts.replicas}
    for room in rooms:
        if room.tier in facts.pinned_tiers and room.tier not in held:
            fits = room.free_bytes >= facts.num_bytes
            encoding = policy.encoding.get(room.kind, "raw")
            reason = "it is pinned there"
            wanted[room.tier] = Copy(room.tier, facts.now, encoding, reason, makes_room=not fits)
    return list(wanted.values()) or _copies_before_demotion(policy, facts, rooms)


def _copies_before_demotion(
    policy: Policy, facts: BlobFacts, rooms: Sequence[TierRoom]
) -> list[Copy]:
    """The copy further down that lets an idle replica go, if nothing else holds its bytes."""
    for replica in facts.replicas:
        reason = _reason_to_drop(policy, facts, replica)
        if not reason or _is_covered(replica, facts.replicas):
            continue
        for kind in _below(replica.kind):
            to = _tier_with_room(kind, facts.num_bytes, rooms)
            # A copy that policy would take away again at once helps nothing.
            if to is not None and not _reason_to_drop(policy, facts, ReplicaFacts(to, kind)):
                encoding = policy.encoding.get(kind, "raw")
                return [Copy(to, WHEN_IDLE, encoding, f"to go from {replica.tier}: {reason}")]
    return []


def _below(kind: str) -> Sequence[str]:
    """The kinds that a copy of tier *kind* may go down to, nearest first."""
    steps = ("ssd", "hdd", "object")
    return steps[steps.index(kind) + 1 :] if kind in steps else ()


def _best_room(kind: str, rooms: Sequence[TierRoom]) -> TierRoom | None:
    """The tier for copies that are wanted in *kind*: the one with the most room."""
    found = [room for room in rooms if fills(room.kind, kind)]
    return max(found, key=lambda room: (room.kind == kind, room.free_bytes), default=None)


def _tier_with_room(kind: str, num_bytes: int, rooms: Sequence[TierRoom]) -> str | None:
    fitting = [room for room in rooms if room.kind == kind and room.free_bytes >= num_bytes]
    return max(fitting, key=lambda room: room.free_bytes).tier if fitting else None


def _reason_to_drop(policy: Policy, facts: BlobFacts, replica: ReplicaFacts) -> str:
    """Why *policy* no longer wants *replica*; empty: it does, or it must not go now."""
    after = policy.demote_after_seconds.get(replica.kind)
    if after is None or facts.is_dirty or replica.is_open or replica.tier in facts.pinned_tiers:
        return ""
    if facts.planned_next_use is not None:
        return ""
    idle = facts.now - max(facts.created, facts.last_used)
    if idle < after:
        return ""
    return f"unused for {idle:.0f} s, policy {policy.name} keeps it {after:.0f} s in {replica.kind}"


def _survives(kind: str) -> int:
    return DURABILITY.get(kind, -1)


def _is_covered(replica: ReplicaFacts, others: Sequence[ReplicaFacts]) -> bool:
    """Whether the bytes of *replica* have another place among *others*, at least as durable."""
    wanted = max(_survives(replica.kind), 0)
    return any(other.tier != replica.tier and _survives(other.kind) >= wanted for other in others)


def _drops(policy: Policy, facts: BlobFacts) -> list[Drop]:
    """Copies that may go together: each is covered by what stays."""
    staying = list(facts.replicas)
    drops: list[Drop] = []
    for replica in sorted(facts.replicas, key=lambda one: _survives(one.kind)):
        reason = _reason_to_drop(policy, facts, replica)
        rest = [one for one in staying if one.tier != replica.tier]
        if reason and _is_covered(replica, rest):
            staying = rest
            drops.append(Drop(replica.tier, reason))
    return drops
