"""Proves from the ranks' records that every epoch used every sample exactly once. Pure.

Each attempt names the generation it started from, so the attempts form a tree, and the way from
the last attempt back to the first start is the run's history: of each attempt on it those steps
count that led to the generation which the next one restored. All other steps were rolled back;
what they did to the model is gone, and their samples have to be used again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from forebay_trainer.records import RankRecord, StepRecord

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class RolledBack:
    """The steps of one attempt whose effect was lost."""

    attempt: int
    num_ranks: int
    first_step: int
    last_step: int
    num_samples: int


@dataclass(frozen=True)
class Proof:
    """What the records show; ``violations`` is empty exactly if the claim holds."""

    num_epochs: int
    num_samples: int
    num_used: int
    """Samples used by the steps of the history, over all epochs."""
    num_attempts: int
    rolled_back: tuple[RolledBack, ...]
    violations: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.violations

    @property
    def num_read_again(self) -> int:
        return sum(each.num_samples for each in self.rolled_back)

    def sentence(self) -> str:
        """The claim with its numbers, or what is wrong with it."""
        if not self.holds:
            return "NOT exactly once: " + "; ".join(self.violations)
        again = "; ".join(
            f"attempt {each.attempt} ({each.num_ranks} ranks) lost its steps "
            f"{each.first_step}-{each.last_step}, whose {each.num_samples} samples were read again"
            for each in self.rolled_back
        )
        return (
            f"exactly once: {self.num_epochs} epochs x {self.num_samples:,} samples = "
            f"{self.num_used:,} uses, every sample once in every epoch, over "
            f"{self.num_attempts} attempts ({again or 'no step was rolled back'}, nothing else was)"
        )


@dataclass(frozen=True)
class _Step:
    """One step of one attempt, put together from what its ranks wrote."""

    attempt: int
    step: int
    num_ranks: int
    parts: tuple[StepRecord, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(each for part in self.parts for each in part.ids)

    @property
    def places(self) -> set[tuple[int, int]]:
        """(epoch, position) of its ranks: one place, unless the ranks disagree."""
        return {(part.epoch, part.position) for part in self.parts}


def prove(records: Sequence[RankRecord], samples: Collection[int], num_epochs: int) -> Proof:
    """Checks the records of all attempts against the ``samples`` that each epoch must hold.

    The claim: in each of the epochs 0 to ``num_epochs`` - 1 the steps of the history used each of
    the samples exactly once, and no other sample; and what the rolled-back steps used was used
    again by the history's step of the same number.
    """
    attempts: dict[int, list[RankRecord]] = defaultdict(list)
    for record in records:
        attempts[record.attempt].append(record)
    if not attempts:
        return Proof(num_epochs, len(samples), 0, 0, (), ("there are no records",))
    spans, violations = _history(attempts)
    steps = [step for ranks in attempts.values() for step in _steps(ranks)]
    kept = {step.step: step for step in steps if step.step in spans.get(step.attempt, ())}
    lost = [step for step in steps if step.step not in spans.get(step.attempt, ())]
    for ranks in attempts.values():
        violations += _check_attempt(ranks)
    violations += _check_steps(kept)
    violations += _check_epochs(kept.values(), frozenset(samples), num_epochs)
    violations += _check_lost(lost, kept)
    return Proof(
        num_epochs=num_epochs,
        num_samples=len(samples),
        num_used=sum(len(step.ids) for step in kept.values()),
        num_attempts=len(attempts),
        rolled_back=tuple(_summarise(lost)),
        violations=tuple(violations),
    )


def _history(attempts: Mapping[int, Sequence[RankRecord]]) -> tuple[dict[int, range], list[str]]:
    """Which steps of which attempt count: from the last attempt back to the first start."""
    number = max(attempts)
    stop = max((part.step for rank in attempts[number] for part in rank.steps), default=0)
    spans: dict[int, range] = {}
    while True:
        start = attempts[number][0]
        spans[number] = range(start.parent_step + 1, stop + 1)
        if start.parent_attempt == 0:
            return spans, []
        if start.parent_attempt not in attempts or start.parent_attempt >= number:
            problem = f"attempt {number} started from attempt {start.parent_attempt}"
            return spans, [f"{problem}, which left no records"]
        number, stop = start.parent_attempt, start.parent_step


def _steps(ranks: Sequence[RankRecord]) -> Iterator[_Step]:
    """The steps of one attempt."""
    parts: dict[int, list[StepRecord]] = defaultdict(list)
    for rank in ranks:
        for part in rank.steps:
            parts[part.step].append(part)
    for step, found in sorted(parts.items()):
        yield _Step(ranks[0].attempt, step, ranks[0].num_ranks, tuple(found))


def _check_attempt(ranks: Sequence[RankRecord]) -> Iterator[str]:
    """The ranks of an attempt agree on where it started, and each one's steps go up by one."""
    name = f"attempt {ranks[0].attempt}"
    if len({(each.num_ranks, each.parent_attempt, each.parent_step) for each in ranks}) > 1:
        yield f"the ranks of {name} disagree on where it started"
    if len({each.rank for each in ranks}) < len(ranks):
        yield f"a rank of {name} left two records"
    for rank in ranks:
        expected = range(rank.parent_step + 1, rank.parent_step + 1 + len(rank.steps))
        if [part.step for part in rank.steps] != list(expected):
            yield f"the steps of rank {rank.rank} of {name} do not go up by one"


def _check_steps(kept: Mapping[int, _Step]) -> Iterator[str]:
    """The history has every step from 1 to the last, each one recorded by all of its ranks."""
    missing = [step for step in range(1, max(kept, default=0) + 1) if step not in kept]
    if missing:
        yield f"no attempt of the history recorded {_count(missing, 'step')}"
    partial = [step.step for step in kept.values() if len(step.parts) != step.num_ranks]
    if partial:
        yield f"not all ranks recorded {_count(partial, 'step')}"
    split = [step.step for step in kept.values() if len(step.places) != 1]
    if split:
        yield f"the ranks stood at different places in {_count(split, 'step')}"


def _check_epochs(
    steps: Iterable[_Step], samples: frozenset[int], num_epochs: int
) -> Iterator[str]:
    """Each epoch of the history holds each sample once."""
    used: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(num_epochs)}
    for step in steps:
        for part in step.parts:
            used.setdefault(part.epoch, Counter()).update(part.ids)
    for epoch, counts in used.items():
        if epoch not in range(num_epochs):
            yield f"epoch {epoch} is not one of the {num_epochs} of the run"
            continue
        if missing := sorted(samples - counts.keys()):
            yield f"epoch {epoch} never used {_count(missing, 'sample')}"
        if repeated := sorted(each for each, times in counts.items() if times > 1):
            yield f"epoch {epoch} used more than once {_count(repeated, 'sample')}"
        if foreign := sorted(counts.keys() - samples):
            yield f"epoch {epoch} used from outside the split {_count(foreign, 'sample')}"


def _check_lost(lost: Iterable[_Step], kept: Mapping[int, _Step]) -> Iterator[str]:
    """What was rolled back came again at the same place: nothing else was read twice."""
    for step in lost:
        name = f"step {step.step}, rolled back in attempt {step.attempt},"
        again = kept.get(step.step)
        if again is None:
            yield f"{name} was never taken again"
        elif step.places != again.places:
            yield f"{name} was taken again at another place of the order"
        elif foreign := sorted((Counter(step.ids) - Counter(again.ids)).elements()):
            yield f"{name} had read {_count(foreign, 'sample')} that its repeat did not"
        elif len(step.parts) == step.num_ranks and len(step.ids) != len(again.ids):
            yield f"{name} had {len(step.ids)} samples and its repeat {len(again.ids)}"


def _count(found: Sequence[int], noun: str) -> str:
    """``3 samples (4, 8, 15)``, or the first few of many."""
    some = ", ".join(map(str, found[:MAX_EXAMPLES]))
    dots = ", …" if len(found) > MAX_EXAMPLES else ""
    return f"{len(found)} {noun}{'s' if len(found) != 1 else ''} ({some}{dots})"


def _summarise(lost: Sequence[_Step]) -> Iterator[RolledBack]:
    for attempt in sorted({step.attempt for step in lost}):
        steps = [step for step in lost if step.attempt == attempt]
        yield RolledBack(
            attempt=attempt,
            num_ranks=steps[0].num_ranks,
            first_step=min(step.step for step in steps),
            last_step=max(step.step for step in steps),
            num_samples=sum(len(step.ids) for step in steps),
        )
