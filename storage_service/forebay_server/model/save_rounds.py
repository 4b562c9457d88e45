"""Whether the ranks of an attempt may save by the plan that they agreed on last. Pure.

Every save is one round, in which each rank says what its state looks like now and which plan it
holds. All ranks get the same ruling, whatever they said: so none plans while another copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """What all ranks of a round do next."""

    REUSE = "reuse"
    """Copy by the plan that they hold."""
    REPLAN = "replan"
    """Plan together; what comes of it has the ruling's number."""
    SKIP = "skip"
    """Save nothing: what was saved before is still on its way, and all would rather go on."""
    STOP = "stop"
    """Save nothing: a rank cannot, or the ranks do not save the same."""


@dataclass(frozen=True)
class Ask:
    """What one rank says in a round."""

    step: int
    structure: str
    """Digest over names, shapes, dtypes, placements, aliases, what is frozen; empty: it failed."""
    plan: int = 0
    """The number of the plan that it holds and could save by; 0: none."""
    may_skip: bool = False
    """Rather save nothing than wait for memory that an earlier save still holds."""


@dataclass(frozen=True)
class Ruling:
    """The common answer of a round."""

    verdict: Verdict
    plan: int = 0
    """The plan's number: of the one to reuse, or of the one to be made."""
    reason: str = ""


@dataclass(frozen=True)
class AgreedPlan:
    """What the ranks planned last, by what their states looked like."""

    number: int
    structures: Mapping[int, str]


def rule(
    number: int, asks: Mapping[int, Ask], num_ranks: int, agreed: AgreedPlan | None, busy: bool
) -> Ruling:
    """The ruling of round *number*; ranks that are not in *asks* did not come in time.

    *busy*: a rank has no memory free, for two earlier saves are still landing.
    """
    failed = [rank for rank, ask in sorted(asks.items()) if not ask.structure]
    if failed:
        return Ruling(Verdict.STOP, reason=f"{_ranks(failed)} cannot save")
    steps = {ask.step for ask in asks.values()}
    if len(steps) > 1:
        return Ruling(Verdict.STOP, reason=f"the ranks save different steps: {sorted(steps)}")
    missing = sorted(set(range(num_ranks)) - set(asks))
    if missing:
        return Ruling(Verdict.REPLAN, number, f"{_ranks(missing)} did not come in time")
    if busy and all(ask.may_skip for ask in asks.values()):
        return Ruling(Verdict.SKIP, reason="two earlier saves are still landing")
    if agreed is None or any(
        ask.plan != agreed.number or ask.structure != agreed.structures.get(rank)
        for rank, ask in asks.items()
    ):
        return Ruling(Verdict.REPLAN, number, "a rank's state looks different, or is new here")
    return Ruling(Verdict.REUSE, agreed.number)


@dataclass
class SaveRounds:
    """The rounds of one attempt: one is open at a time, and the last ruling is remembered.

    Knows nothing after a restart of the daemon: then all ranks plan anew.
    """

    num_ranks: int
    agreed: AgreedPlan | None = None
    number: int = 0
    """The newest round."""
    asks: dict[int, Ask] = field(default_factory=dict)
    ruling: Ruling | None = None
    """Of the newest round, once it is closed."""

    def ask(self, number: int, rank: int, ask: Ask, *, busy: bool = False) -> Ruling | None:
        """What *rank* is told in round *number*; None until the others have come.

        A repeat is answered as before. Whoever comes too late is told what the others were, which
        never is to reuse.
        """
        if number < self.number:
            return Ruling(Verdict.STOP, reason=f"the other ranks are at save {self.number}")
        if number > self.number:
            self.number, self.asks, self.ruling = number, {}, None
        if self.ruling is None:
            self.asks[rank] = ask
            if len(self.asks) == self.num_ranks or not ask.structure or self._differs(ask):
                self._close(busy)
        return self.ruling

    def give_up(self, number: int, *, busy: bool = False) -> Ruling:
        """End the wait of round *number* for those that have not come."""
        if number < self.number:
            return Ruling(Verdict.STOP, reason=f"the other ranks are at save {self.number}")
        if self.ruling is None:
            self._close(busy)
        assert self.ruling is not None
        return self.ruling

    def _differs(self, ask: Ask) -> bool:
        return any(other.step != ask.step for other in self.asks.values())

    def _close(self, busy: bool) -> None:
        self.ruling = rule(self.number, self.asks, self.num_ranks, self.agreed, busy)
        if self.ruling.verdict is not Verdict.REPLAN:
            return
        structures = {rank: ask.structure for rank, ask in self.asks.items()}
        whole = len(structures) == self.num_ranks
        self.agreed = AgreedPlan(self.number, structures) if whole else None


def _ranks(ranks: list[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"
