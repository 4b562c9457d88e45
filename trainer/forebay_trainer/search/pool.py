"""Runs as processes: started, so many at a time, followed while they train, and waited for."""

from __future__ import annotations

import fcntl
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Protocol

import torch

from forebay_trainer.metrics.follow import Event, MetricsTail
from forebay_trainer.processes import Child, start_leashed
from forebay_trainer.search.job import End, Job, Slot, end_of
from forebay_trainer.stop import StopSignal
from forebay_wire.errors import AlreadyRunning

FOLLOW_SECONDS: Final = 0.25
"""How often the metrics of running trials are read; the end of a process is noticed at once."""

LEAVE_SECONDS: Final = 120.0
"""A run whose last parent was killed saves and leaves within so long."""

Start = Callable[[Sequence[str], IO[bytes], Mapping[str, str]], Any]
"""Starts a command with its output and what is added to its environment; answers what
`subprocess.Popen` is."""


def leashed(command: Sequence[str], output: IO[bytes], environment: Mapping[str, str]) -> Any:
    return start_leashed(command, output, extra_environment=environment)


def locked(path: Path, seconds: float, what: str) -> IO[bytes]:
    """The file, open to be appended to, and locked for as long as it, or a copy of its descriptor
    in any process, is open. AlreadyRunning, saying *what*, if somebody else keeps it so long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise AlreadyRunning(what) from None
            time.sleep(0.05)
        else:
            return file


@contextmanager
def folder_of_one(folder: Path) -> Iterator[None]:
    """While it lasts no other process searches in the folder."""
    busy = f"another process searches in {folder}: wait for it, or give output.folder=…"
    with locked(folder / "lock", 0.0, busy):
        yield


@dataclass
class Running:
    """A run whose process has been started, or was at its end before."""

    job: Job
    slot: int
    tail: MetricsTail
    child: Child | None = None
    log_start: int = 0
    events: list[Event] = field(default_factory=list)
    """Of all its attempts, as far as they have been read."""
    num_before: int = 0
    """Events that were there before the process was started."""
    num_seen: int = 0
    is_told: bool = False

    def read(self) -> None:
        self.events += self.tail.read()

    def new(self) -> list[Event]:
        """The events that this has not answered before."""
        self.read()
        found = self.events[self.num_seen :]
        self.num_seen = len(self.events)
        return found

    def tell(self) -> None:
        """SIGTERM: it saves at the next step, and leaves. Once: a second one ends it at once."""
        if self.child is not None and not self.is_told:
            self.is_told = True
            with suppress(ProcessLookupError):
                self.child.process.send_signal(signal.SIGTERM)

    def end(self) -> End:
        """How its last attempt ended; all of `events` must have been read."""
        if self.child is None:
            return end_of(self.events, None, "")
        with self.job.log.open("rb") as file:
            file.seek(self.log_start)
            log = file.read().decode(errors="replace")
        found = end_of(self.events[self.num_before :], self.child.process.returncode, log)
        if found.state == "failed" and self.is_told:  # before it could save, say
            return End("left", "told to end")
        return found


class Handler(Protocol):
    """What is done with the runs; called from one thread."""

    def next(self, slot: Slot) -> Job | None:
        """The next run to be started; None: there is nothing to do until another one has ended."""
        ...

    def progress(self, running: Running, events: Sequence[Event]) -> None:
        """*events* are new; it may `Running.tell` the run to end."""
        ...

    def ended(self, running: Running) -> None: ...


class Pool:
    """Up to *num_slots* runs at a time, each a process. A context manager: at its end none is left.

    Belongs to one thread, which must live as long as the runs do.
    """

    def __init__(self, num_slots: int, *, start: Start = leashed) -> None:
        self._num_slots = num_slots
        self._start = start
        self._running: list[Running] = []
        self._stack = ExitStack()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for running in self._running:
            if running.child is not None:
                running.child.kill_all()

    def work(self, handler: Handler, stop: StopSignal) -> None:
        """Until the handler has nothing to do and all have ended. After *stop* is requested no run
        is started, and those that train save and leave."""
        while True:
            while not stop.requested and (slot := self._free_slot()) is not None:
                job = handler.next(slot)
                if job is None:
                    break
                self._begin(job, slot.number)
            if not self._running:
                return
            self._wait()
            for running in list(self._running):
                self._look(running, handler)
                if stop.requested:
                    running.tell()

    def _free_slot(self) -> Slot | None:
        taken = {running.slot for running in self._running}
        free = [number for number in range(self._num_slots) if number not in taken]
        if not free:
            return None
        return Slot(free[0], self._num_slots, os.cpu_count() or 1, gpus())

    def _begin(self, job: Job, slot: int) -> None:
        running = Running(job, slot, MetricsTail(job.metrics))
        # All processes of the run keep the lock, by their output: also if we are killed.
        busy = f"processes of run {job.run} are still there: end them, and start this again"
        with locked(job.log, LEAVE_SECONDS, busy) as log:
            running.log_start = job.log.stat().st_size
            running.read()
            running.num_before = len(running.events)
            if end_of(running.events, None, "").state != "done":
                given = {name for name in os.environ if name != "CUDA_VISIBLE_DEVICES"}
                more = {name: job.environment[name] for name in job.environment.keys() - given}
                process = self._start(job.command, log, more)
                running.child = Child(f"run {job.run}", process, job.log)
        self._running.append(running)

    def _wait(self) -> None:
        with ExitStack() as stack:
            descriptors = []
            for running in self._running:
                if running.child is None or running.child.process.poll() is not None:
                    return
                descriptor = os.pidfd_open(running.child.pid)
                stack.callback(os.close, descriptor)
                descriptors.append(descriptor)
            multiprocessing.connection.wait(descriptors, FOLLOW_SECONDS)

    def _look(self, running: Running, handler: Handler) -> None:
        has_ended = running.child is None or running.child.process.poll() is not None
        if new := running.new():
            handler.progress(running, new)
        if has_ended:
            self._running.remove(running)
            handler.ended(running)


def gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]
