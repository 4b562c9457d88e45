"""What a loader promises, each promise as a function that raises Broken if it is not kept."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from forebay.testing.conformance.subject import NotSupported, Shape, Subject
from forebay.testing.conformance.team import (
    Broken,
    GlobalBatch,
    Team,
    check_exactly_once,
    joined,
)
from forebay.testing.conformance.trainer import Trainer

Promise = Callable[[Subject, random.Random], None]

Blocks = tuple[int, Sequence[Sequence[int]]]
"""Samples of a block, and those of each block of an epoch in turn."""


def _epoch(subject: Subject, shape: Shape) -> list[GlobalBatch]:
    with Team(subject, shape) as team:
        return team.rest()


def _shapes(subject: Subject) -> list[Shape]:
    """Every world size and every number of workers, though not all pairs."""
    size = subject.batch_sizes[0]
    first = [Shape(subject.world_sizes[0], workers, size) for workers in subject.num_workers]
    others = [
        Shape(ranks, subject.num_workers[position % len(subject.num_workers)], size)
        for position, ranks in enumerate(subject.world_sizes[1:], start=1)
    ]
    return first + others


def _some_shape(subject: Subject, chance: random.Random, **fixed: int) -> Shape:
    return Shape(
        fixed.get("world_size", chance.choice(subject.world_sizes)),
        fixed.get("num_workers", chance.choice(subject.num_workers)),
        fixed.get("global_batch_size", chance.choice(subject.batch_sizes)),
    )


def _whole(subject: Subject, shape: Shape) -> Blocks:
    """The epoch as *shape* reads it uninterrupted: which samples stand at the positions
    [k·B, (k+1)·B)."""
    return shape.global_batch_size, joined(_epoch(subject, shape))


def _chain(subject: Subject, shapes: Sequence[Shape], chance: random.Random, whole: Blocks) -> None:
    """One epoch read by each of *shapes* in turn, interrupted at random; then exactly once, and at
    each step the samples that stand there in the *whole* epoch."""
    num_samples = subject.environment.num_samples
    found: list[GlobalBatch] = []
    states: list[Any] | None = None
    log = []
    for position, shape in enumerate(shapes):
        with Team(subject, shape, states) as team:
            left = num_samples - sum(map(len, joined(found)))
            most = max(0, (left - 1) // shape.global_batch_size)  # something stays for the next
            if position == len(shapes) - 1:
                found += team.rest()
            else:
                steps = chance.randint(0, min(most, 1 + most // 2))
                found += team.some(steps)
                states = team.states()
                log.append(f"{steps} steps of {shape}")
    log.append(f"the rest by {shapes[-1]}")
    check_exactly_once(found, num_samples, "; then ".join(log))
    _check_places(found, whole, "; then ".join(log))


def _check_places(found: Sequence[GlobalBatch], whole: Blocks, what: str) -> None:
    """Raise Broken unless each batch of *found*, which are a whole epoch, holds what stands at its
    positions. All but the last have to end where a block does."""
    size, blocks = whole
    position = 0
    for step, batch in enumerate(joined(found)):
        here = blocks[position // size : -(-(position + len(batch)) // size)]
        if sorted(batch) != sorted(number for block in here for number in block):
            raise Broken(
                f"{what}: from step {step} on, position {position}, it reads other global batches "
                "than uninterrupted"
            )
        position += len(batch)


def epoch_is_whole(subject: Subject, chance: random.Random) -> None:
    """An epoch holds each sample once, whoever reads it; all ranks have as many steps."""
    for shape in _shapes(subject):
        check_exactly_once(_epoch(subject, shape), subject.environment.num_samples, str(shape))


def further_epochs_are_whole(subject: Subject, chance: random.Random) -> None:
    """So does each further one of the same loader."""
    for workers in {subject.num_workers[0], subject.num_workers[-1]}:
        shape = Shape(subject.world_sizes[-1], workers, subject.batch_sizes[0])
        with Team(subject, shape) as team:
            for epoch in range(3):
                what = f"epoch {epoch}, {shape}"
                check_exactly_once(team.rest(), subject.environment.num_samples, what)


def epochs_are_shuffled_anew(subject: Subject, chance: random.Random) -> None:
    """Each epoch has another order than those before it; the same, if the adapter says
    ``shuffles = False``."""
    shape = _some_shape(subject, chance)
    with Team(subject, shape) as team:
        orders = [joined(team.rest()) for _ in range(3)]
        shuffles = team.shuffles
    for (first, one), (second, other) in itertools.combinations(enumerate(orders), 2):
        if (one == other) == shuffles:
            verb = "have the same order" if shuffles else "have other orders, and are not shuffled"
            raise Broken(f"epochs {first} and {second} {verb}, {shape}")


def workers_do_not_matter(subject: Subject, chance: random.Random) -> None:
    """The global batches are the same for every number of workers."""
    size = subject.batch_sizes[0]
    shapes = [Shape(subject.world_sizes[0], workers, size) for workers in subject.num_workers]
    _check_same(subject, shapes)


def ranks_do_not_matter(subject: Subject, chance: random.Random) -> None:
    """The global batches are the same for every number of ranks."""
    size = subject.batch_sizes[0]
    shapes = [Shape(ranks, subject.num_workers[0], size) for ranks in subject.world_sizes]
    _check_same(subject, shapes)


def _check_same(subject: Subject, shapes: Sequence[Shape]) -> None:
    first, *others = shapes
    expected = [sorted(batch) for batch in joined(_epoch(subject, first))]
    for shape in others:
        found = [sorted(batch) for batch in joined(_epoch(subject, shape))]
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=False))
            step = next((k for k, (a, b) in pairs if a != b), min(len(found), len(expected)))
            raise Broken(f"from step {step} on, {shape} reads other global batches than {first}")


def same_again(subject: Subject, chance: random.Random) -> None:
    """A loader opened anew reads the same order."""
    shape = _some_shape(subject, chance)
    _check_same(subject, [shape, shape])


def resumes_at_every_step(subject: Subject, chance: random.Random) -> None:
    """From the state before the first batch, after each one, and after the last, it goes on."""
    num_samples = subject.environment.num_samples
    shape = Shape(subject.world_sizes[0], subject.num_workers[0], subject.batch_sizes[0])
    with Team(subject, shape) as team:
        states, found = [team.states()], []
        while (batch := team.step()) is not None:
            found.append(batch)
            states.append(team.states())
        states.append(team.states())
        following = team.rest()
    size = shape.global_batch_size
    for steps, state in enumerate(states):
        with Team(subject, shape, state) as team:
            rest = team.rest()
            if steps >= len(found) and not rest:  # that was the end of this one
                rest = team.rest()
        what = f"after step {min(steps, len(found))} of {len(found)}, {shape}"
        _check_both(found[:steps], rest, num_samples, what)
        if steps < len(found):
            _check_places([*found[:steps], *rest], (size, joined(found)), what)
        else:
            _check_places(rest, (size, joined(following)), f"the epoch after {what}")


def resumes_with_other_workers(subject: Subject, chance: random.Random) -> None:
    """Interrupted, it goes on with another number of workers."""
    ranks, size = chance.choice(subject.world_sizes), subject.batch_sizes[0]
    whole = _whole(subject, Shape(ranks, subject.num_workers[0], size))
    for workers in subject.num_workers:
        other = subject.num_workers[0] if workers else subject.num_workers[-1]
        _chain(subject, [Shape(ranks, workers, size), Shape(ranks, other, size)], chance, whole)


def resumes_with_other_ranks(subject: Subject, chance: random.Random) -> None:
    """Interrupted, it goes on with another number of ranks."""
    workers, size = subject.num_workers[0], subject.batch_sizes[0]
    around = [*subject.world_sizes, subject.world_sizes[0]]
    whole = _whole(subject, Shape(around[0], workers, size))
    for before, after in itertools.pairwise(around):
        shapes = [Shape(before, workers, size), Shape(after, workers, size)]
        _chain(subject, shapes, chance, whole)


def resumes_with_another_batch_size(subject: Subject, chance: random.Random) -> None:
    """Interrupted, it goes on with another batch size."""
    workers, ranks = subject.num_workers[0], subject.world_sizes[0]
    around = [*subject.batch_sizes, subject.batch_sizes[0]]
    whole = _whole(subject, Shape(ranks, workers, math.gcd(*subject.batch_sizes)))
    for before, after in itertools.pairwise(around):
        shapes = [Shape(ranks, workers, before), Shape(ranks, workers, after)]
        _chain(subject, shapes, chance, whole)


def resumes_again_and_again(subject: Subject, chance: random.Random) -> None:
    """Interrupted several times at random, with everything changing, it goes on."""
    size = math.gcd(*subject.batch_sizes)
    whole = _whole(subject, Shape(subject.world_sizes[0], subject.num_workers[0], size))
    for _ in range(3):
        _chain(subject, [_some_shape(subject, chance) for _ in range(4)], chance, whole)


def asking_for_the_state_changes_nothing(subject: Subject, chance: random.Random) -> None:
    """A loader whose state is asked for at every step reads the same."""
    shape = _some_shape(subject, chance)
    expected = _epoch(subject, shape)
    with Team(subject, shape) as team:
        found = []
        team.states()
        while (batch := team.step()) is not None:
            found.append(batch)
            team.states()
    if found != expected:
        raise Broken(f"it reads something else once its state is asked for, {shape}")


def left_early_it_ends(subject: Subject, chance: random.Random) -> None:
    """Closed in the middle of an epoch, it ends its workers; opened anew, the epoch is whole."""
    shape = _some_shape(subject, chance, num_workers=subject.num_workers[-1])
    with Team(subject, shape) as team:
        team.some(2)
        workers = team.workers()
    alive = [pid for pid in workers if _is_alive(pid)]
    if alive:
        raise Broken(f"{len(alive)} of {len(workers)} workers run on after close()")
    check_exactly_once(_epoch(subject, shape), subject.environment.num_samples, str(shape))


def two_at_once(subject: Subject, chance: random.Random) -> None:
    """Two loaders over the same samples at once do not disturb each other."""
    shape = _some_shape(subject, chance)
    expected = _epoch(subject, shape)
    with Team(subject, shape) as one, Team(subject, shape) as other:
        found: tuple[list[GlobalBatch], list[GlobalBatch]] = ([], [])
        for _ in range(len(expected) + 1):
            for team, batches in zip((one, other), found, strict=True):
                batches += team.some(1) if len(batches) < len(expected) else []
    for batches in found:
        if batches != expected:
            raise Broken(f"one of two at once reads something else than alone, {shape}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# What goes wrong while it reads.


def a_killed_worker_is_not_silent(subject: Subject, chance: random.Random) -> None:
    """After a SIGKILL of a worker, reading goes on whole or ends with an error, at once; from the
    last state it goes on."""
    counts = [workers for workers in subject.num_workers if workers]
    if not counts:
        raise NotSupported("the loader has no workers")
    for workers in counts:
        shape = _some_shape(subject, chance, num_workers=workers)

        def kill(team: Team) -> None:
            pids = team.workers()
            if not pids:
                raise NotSupported("the loader's workers are no processes")
            _kill(chance.choice(pids), subject.deadline_seconds)

        _trouble(subject, chance, shape, kill, contextlib.nullcontext())


def _kill(pid: int, seconds: float) -> None:
    """SIGKILL, and wait until the process is gone: then the loader can know."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    limit = time.monotonic() + seconds
    while _is_alive(pid) and time.monotonic() < limit:
        time.sleep(0.001)


def a_killed_trainer_loses_nothing(subject: Subject, chance: random.Random) -> None:
    """After a SIGKILL of the whole process that reads, its workers end, and from the last state it
    goes on."""
    num_samples = subject.environment.num_samples
    for workers in {subject.num_workers[0], subject.num_workers[-1]}:
        shape = _some_shape(subject, chance, num_workers=workers)
        steps = chance.randint(1, max(1, num_samples // shape.global_batch_size // 2))
        found: list[GlobalBatch] = []
        states: list[Any] | None = None
        pids: set[int] = set()
        with Trainer(subject, shape) as trainer:
            while (told := trainer.told()) is not None:
                states = told.states
                pids.update(told.workers)
                found += [told.batch] if told.batch else []
                if len(found) == steps:
                    break
            trainer.kill()
        left = _alive_after(pids, subject.deadline_seconds)
        if left:
            raise Broken(f"{len(left)} of {len(pids)} workers outlive their trainer, {shape}")
        what = f"{steps} steps of {shape}, then SIGKILL"
        _check_both(found, _resumed(subject, chance, states), num_samples, what)


def _alive_after(pids: Collection[int], seconds: float) -> list[int]:
    """Those that still run *seconds* later; sooner if none does."""
    limit = time.monotonic() + seconds
    while (alive := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < limit:
        time.sleep(0.01)
    return alive


def damage_is_noticed(subject: Subject, chance: random.Random) -> None:
    """Bytes that are flipped in the store before they are read are healed or end in an error; they
    never reach the trainer."""
    num_samples = subject.environment.num_samples
    shape = _some_shape(subject, chance)
    found: list[GlobalBatch] = []
    states: list[Any] | None = None
    with subject.environment.fresh():
        failure = ""
        with subject.environment.damaged():  # before the loader is there: it may read ahead
            try:
                with Team(subject, shape) as team:
                    while (batch := team.step()) is not None:
                        found.append(batch)
                        states = team.states()
            except (Broken, NotSupported):
                raise
            except Exception as error:  # noqa: BLE001 - any error says that something is wrong
                failure = f", which raised {type(error).__name__}"
        rest = _resumed(subject, chance, states) if failure else []
    _check_both(found, rest, num_samples, f"damage under {shape}{failure}")


def a_slow_store_only_takes_longer(subject: Subject, chance: random.Random) -> None:
    """With a slow store every sample comes, once."""
    shape = _some_shape(subject, chance)
    fault = subject.environment.slow()
    _trouble(subject, chance, shape, None, fault, may_fail=False)


def a_full_store_loses_nothing(subject: Subject, chance: random.Random) -> None:
    """With a full store reading goes on or ends with an error; with room again, it goes on."""
    fault = subject.environment.full()
    _trouble(subject, chance, _some_shape(subject, chance), None, fault)


def a_restart_loses_nothing(subject: Subject, chance: random.Random) -> None:
    """If what serves the samples is killed and started again, every sample comes, once."""
    fault = subject.environment.restarted()
    _trouble(subject, chance, _some_shape(subject, chance), None, fault)


def _trouble(
    subject: Subject,
    chance: random.Random,
    shape: Shape,
    strike: Callable[[Team], None] | None,
    fault: contextlib.AbstractContextManager[None],
    *,
    may_fail: bool = True,
) -> None:
    """Read some, have *fault* (and *strike* the team), read on; if that ends with an error, go on
    from the last state without the fault."""
    num_samples = subject.environment.num_samples
    steps = chance.randint(1, max(1, num_samples // shape.global_batch_size // 2))
    failure = ""
    with Team(subject, shape) as team:
        found = team.some(steps)
        states = team.states()
        with fault:
            try:
                if strike is not None:
                    strike(team)
                while (batch := team.step()) is not None:
                    found.append(batch)
                    states = team.states()
            except (Broken, NotSupported):
                raise
            except Exception as error:
                if not may_fail:
                    raise Broken(f"it raised {type(error).__name__}: {error}") from error
                failure = f", which raised {type(error).__name__}"
                team.abandon()
    rest = _resumed(subject, chance, states) if failure else []
    what = f"{steps} steps of {shape}, then trouble{failure}"
    _check_both(found, rest, num_samples, what)


def _resumed(
    subject: Subject, chance: random.Random, states: list[Any] | None
) -> list[GlobalBatch]:
    with Team(subject, _some_shape(subject, chance), states) as team:
        return team.rest()


def _check_both(
    found: list[GlobalBatch], rest: list[GlobalBatch], num_samples: int, what: str
) -> None:
    """*rest* is what came after a resume: the rest of the epoch, or all of the next one if nothing
    was left of it."""
    if rest and sum(map(len, joined(found))) >= num_samples:
        check_exactly_once(rest, num_samples, f"the epoch that follows {what}")
        rest = []
    check_exactly_once([*found, *rest], num_samples, what)


def an_appended_version_waits(subject: Subject, chance: random.Random) -> None:
    """A newer version changes neither the epoch that runs nor one that is resumed."""
    num_samples = subject.environment.num_samples
    shape = _some_shape(subject, chance)
    with subject.environment.fresh(), Team(subject, shape) as team:
        found = team.some(2)
        with subject.environment.appended():
            found += team.some(1)
            states = team.states()
            running = found + team.rest()
            check_exactly_once(running, num_samples, f"running on beside it, {shape}")
            with Team(subject, _some_shape(subject, chance), states) as later:
                found += later.rest()
            check_exactly_once(found, num_samples, f"resumed after it, {shape}")


def a_deleted_data_set_is_not_silent(subject: Subject, chance: random.Random) -> None:
    """If the data set is deleted under way, the epoch ends whole or with an error."""
    shape = _some_shape(subject, chance)
    with subject.environment.fresh(), contextlib.ExitStack() as stack:
        try:
            with Team(subject, shape) as team:
                found = team.some(2)
                stack.enter_context(subject.environment.deleted())
                found += team.rest()
        except (Broken, NotSupported):
            raise
        except Exception:  # noqa: BLE001 - any error says that it is gone
            return
        check_exactly_once(found, subject.environment.num_samples, f"deleted under way, {shape}")


PROMISES: Final[tuple[Promise, ...]] = (
    epoch_is_whole,
    further_epochs_are_whole,
    epochs_are_shuffled_anew,
    same_again,
    workers_do_not_matter,
    ranks_do_not_matter,
    resumes_at_every_step,
    resumes_with_other_workers,
    resumes_with_other_ranks,
    resumes_with_another_batch_size,
    resumes_again_and_again,
    asking_for_the_state_changes_nothing,
    left_early_it_ends,
    two_at_once,
    a_killed_worker_is_not_silent,
    a_killed_trainer_loses_nothing,
    damage_is_noticed,
    a_slow_store_only_takes_longer,
    a_full_store_loses_nothing,
    a_restart_loses_nothing,
    an_appended_version_waits,
    a_deleted_data_set_is_not_silent,
)
