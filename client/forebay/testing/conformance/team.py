"""All ranks of one reading in lockstep, each call with a deadline."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from forebay.testing.conformance.subject import Setting, Shape, Subject, payload

GlobalBatch = tuple[tuple[int, ...], ...]
"""The numbers of the samples of one step, rank by rank."""


class Broken(Exception):
    """A promise was not kept; the message says how."""


class Hang(Broken):
    """A call took longer than it may."""


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise :class:`Hang` in this thread, if it is the main one, after *seconds*."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"{what} did not return in {seconds:g} s")

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    others, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left = max(0.001, others - (time.monotonic() - began)) if others else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


class Team:
    """The adapters of all ranks. A context manager: it closes them."""

    def __init__(self, subject: Subject, shape: Shape, states: Sequence[Any] | None = None) -> None:
        self.shape = shape
        self._seconds = subject.deadline_seconds
        self._adapters = [subject.make_adapter() for _ in range(shape.world_size)]
        self._states = states

    def __enter__(self) -> Self:
        try:
            for rank, adapter in enumerate(self._adapters):
                with deadline(self._seconds, "open()"):
                    adapter.open(Setting(rank, self.shape, self._states))
        except BaseException:
            self.abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abandon()
        while self._adapters:
            with deadline(self._seconds, "close()"):
                self._adapters.pop().close()

    def abandon(self) -> None:
        """Close the adapters after an error, which may well make that fail, too."""
        while self._adapters:
            with contextlib.suppress(Exception), deadline(self._seconds, "close()"):
                self._adapters.pop().close()

    def step(self) -> GlobalBatch | None:
        """The next batch of every rank; None if the epoch is over on all."""
        parts = []
        for adapter in self._adapters:
            with deadline(self._seconds, "next()"):
                parts.append(adapter.next())
        over = [rank for rank, part in enumerate(parts) if part is None]
        if over and len(over) < len(parts):
            raise Broken(
                f"ranks have other numbers of steps: {over} of {len(parts)} ended before the "
                "others, which would wait for them for ever in the next all-reduce"
            )
        numbers = []
        for part in parts:
            if part is None:
                return None
            wrong = [number for number, data in part if bytes(data) != payload(number)]
            if wrong:
                raise Broken(f"wrong bytes came for {_some(wrong)}, without an error")
            numbers.append(tuple(number for number, _ in part))
        return tuple(numbers)

    @property
    def shuffles(self) -> bool:
        """Whether the adapters say that epochs differ; they do unless they say so."""
        return all(getattr(adapter, "shuffles", True) for adapter in self._adapters)

    def states(self) -> list[Any]:
        """The states of all ranks, as they come out of a checkpoint."""
        states = []
        for adapter in self._adapters:
            with deadline(self._seconds, "state()"):
                state = adapter.state()
            try:
                states.append(json.loads(json.dumps(state)))
            except (TypeError, ValueError) as error:
                raise Broken(f"state() is no JSON: {error}") from error
        return states

    def workers(self) -> list[int]:
        """The workers of all ranks."""
        return [pid for adapter in self._adapters for pid in adapter.workers()]

    def rest(self) -> list[GlobalBatch]:
        """What is left of the epoch."""
        batches: list[GlobalBatch] = []
        while (batch := self.step()) is not None:
            batches.append(batch)
        return batches

    def some(self, num_steps: int) -> list[GlobalBatch]:
        """At most so many steps of the epoch."""
        batches: list[GlobalBatch] = []
        while len(batches) < num_steps and (batch := self.step()) is not None:
            batches.append(batch)
        return batches


def joined(batches: Sequence[GlobalBatch]) -> list[tuple[int, ...]]:
    """Each global batch as one sequence, whoever read its parts."""
    return [tuple(number for part in batch for number in part) for batch in batches]


def check_exactly_once(batches: Sequence[GlobalBatch], num_samples: int, what: str) -> None:
    """Raise Broken unless *batches* hold each of the samples once."""
    counts = Counter(number for batch in joined(batches) for number in batch)
    lost = [number for number in range(num_samples) if number not in counts]
    repeated = [number for number, count in counts.items() if count > 1]
    unknown = [number for number in counts if not 0 <= number < num_samples]
    problems = [
        f"{verb} {_some(numbers)}"
        for verb, numbers in (("lost", lost), ("repeated", repeated), ("invented", unknown))
        if numbers
    ]
    if problems:
        raise Broken(f"{what}: {', '.join(problems)} (of {num_samples})")


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:5]))
    return f"{len(numbers)} samples ({shown}{', …' if len(numbers) > 5 else ''})"
