"""Processes that import parts side by side: one that dies is replaced, and its part done again."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from forebay_wire.errors import ForebayError, StorageError

MAX_TRIES: Final = 3
"""Of one part, if each time the process that has it dies."""

JOIN_SECONDS: Final = 10.0

Work = Callable[[int, Callable[[int], None]], None]
"""``work(number, report)`` does one part, and reports how many bytes of it are done."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    part: int | None = None


class Crew:
    """Workers, started as new interpreters. Used by one thread; :meth:`run` ends them."""

    def __init__(self, work: Work, num_workers: int, num_parts: int) -> None:
        """*work* is pickled."""
        self._work = work
        self._num_workers = min(num_workers, num_parts)
        self._context = multiprocessing.get_context("spawn")
        self._done: Any = self._context.RawArray("Q", num_parts)
        self._workers: list[_Worker] = []
        self._tries: dict[int, int] = {}

    @property
    def done_bytes(self) -> int:
        """What all parts have reported, those of this run."""
        return sum(self._done)

    def run(self, parts: Sequence[int], pause_seconds: float = 0.2) -> Iterator[int | None]:
        """Have *parts* done; yields the number of each that is, and None now and then.

        A part's error ends it all and is raised; so does a part whose process died three times.
        """
        waiting = deque(parts)
        with self._at_work():
            while waiting or any(worker.part is not None for worker in self._workers):
                while waiting and (worker := self._idle(waiting)) is not None:
                    worker.part = waiting.popleft()
                    self._tries[worker.part] = self._tries.get(worker.part, 0) + 1
                    with suppress(OSError):  # it died: what follows finds out
                        worker.pipe.send(worker.part)
                busy = {w.pipe: w for w in self._workers if w.part is not None}
                ready: list[Any] = wait(list(busy), pause_seconds)
                for pipe in ready:
                    finished = self._hear(busy[pipe], waiting)
                    if finished is not None:
                        yield finished
                yield None

    def _hear(self, worker: _Worker, waiting: deque[int]) -> int | None:
        """The part that *worker* has finished; None if it died, and its part waits again."""
        part, worker.part = worker.part, None
        assert part is not None, "only those at work are listened to"
        try:
            error = worker.pipe.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            worker.process.join(JOIN_SECONDS)
            if self._tries[part] >= MAX_TRIES:
                raise StorageError(
                    f"the process that imports part {part} died {MAX_TRIES} times, at last with "
                    f"exit status {worker.process.exitcode}: is there enough memory?"
                ) from None
            waiting.appendleft(part)
            return None
        if error is not None:
            raise error
        return part

    def _idle(self, waiting: deque[int]) -> _Worker | None:
        for worker in self._workers:
            if worker.part is None:
                return worker
        if len(self._workers) == self._num_workers:
            return None
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._work, self._done), name="forebay-import", daemon=True
        )
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for worker in self._workers:
                worker.process.kill()
            raise
        finally:
            for worker in self._workers:
                worker.pipe.close()  # that ends it
            for worker in self._workers:
                worker.process.join(JOIN_SECONDS)
                if worker.process.is_alive():
                    worker.process.kill()
                    worker.process.join()
            self._workers.clear()


def _serve(pipe: Connection, work: Work, done: Any) -> None:
    """In a worker: do what comes until the pipe ends, which it does with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    while True:
        try:
            part = pipe.recv()
        except (EOFError, OSError):
            return

        def report(num_bytes: int, part: int = part) -> None:
            done[part] = num_bytes

        error: BaseException | None = None
        try:
            work(part, report)
        except ForebayError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001  whatever it is, the parent raises it
            error = StorageError(f"{type(raised).__name__}: {raised}")
        with suppress(OSError):
            pipe.send(error)
