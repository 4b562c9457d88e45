"""A whole trainer in a process of its own, all ranks of it, for the kit to kill."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import traceback
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from forebay.testing.conformance.subject import Shape, Subject
from forebay.testing.conformance.team import Broken, GlobalBatch, Hang, Team


@dataclass(frozen=True)
class Told:
    """What the trainer wrote down after a step, and what the kit found out."""

    batch: GlobalBatch
    """Of this step; before the first one, nothing."""
    states: list[Any]
    workers: list[int]
    """Process ids."""


class Trainer:
    """A child of fork that reads an epoch and tells of every step. A context manager: the child is
    dead at its end."""

    def __init__(self, subject: Subject, shape: Shape) -> None:
        self._seconds = subject.deadline_seconds
        ours, theirs = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(ours)
            _live(subject, shape, theirs)
        os.close(theirs)
        self._lines = _lines(ours, self._seconds)

    def told(self) -> Told | None:
        """What it says next: first before any step. None: the epoch is over."""
        line = next(self._lines, None)
        if line is None:
            raise Broken("the process that reads has ended by itself")
        if "error" in line:
            raise Broken(f"it raised {line['error']}")
        if line["batch"] is None:
            return None
        batch = tuple(tuple(part) for part in line["batch"])
        return Told(batch, line["states"], line["workers"])

    def kill(self) -> None:
        """SIGKILL, and wait for its end; that of its workers comes later. Idempotent."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        self._lines.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def _live(subject: Subject, shape: Shape, pipe: int) -> None:
    """The life of the child; never returns."""
    warnings.simplefilter("ignore")  # of forks
    try:
        with os.fdopen(pipe, "w") as out:
            try:
                with Team(subject, shape) as team:
                    _tell_all(team, lambda line: print(json.dumps(line), file=out, flush=True))
            except Exception as error:  # noqa: BLE001 - goes to the kit
                line = f"{type(error).__name__}: {error}"
                print(json.dumps({"error": line}), file=out, flush=True)
    except BaseException:  # noqa: BLE001 - there is nobody left to tell
        traceback.print_exc()
    finally:
        os._exit(0)


def _tell_all(team: Team, tell: Callable[[Any], None]) -> None:
    batch: GlobalBatch | None = ()
    while batch is not None:
        tell({"batch": batch, "states": team.states(), "workers": team.workers()})
        batch = team.step()
    tell({"batch": None})


def _lines(pipe: int, seconds: float) -> Generator[Any, None, None]:
    """What comes, each within *seconds*."""
    rest = b""
    try:
        while True:
            line, newline, after = rest.partition(b"\n")
            if newline:
                rest = after
                yield json.loads(line)
                continue
            if not select.select([pipe], [], [], seconds)[0]:
                raise Hang(f"a step of another process did not come in {seconds:g} s")
            data = os.read(pipe, 65536)
            if not data:
                return
            rest += data
    finally:
        os.close(pipe)
