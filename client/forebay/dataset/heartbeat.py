"""The thread of a plan: tells the daemon what is new, now and then, and that its reader lives."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from forebay_wire.errors import ForebayError

SEND_SECONDS: Final = 0.05
"""The daemon is told at most so often: the newest position counts."""

ALIVE_SECONDS: Final = 10.0
"""A reader that stands still says so this often: its plan's lease is longer."""

RETRY_SECONDS: Final = 1.0

JOIN_SECONDS: Final = 5.0


@dataclass
class _Shared:
    """What the reader's thread and the telling one share. Knows nothing of the heartbeat's owner,
    which may be forgotten."""

    tell: Callable[[], float | None]
    failed: Callable[[ForebayError | ValueError], None]
    end: Callable[[], None]
    pause_seconds: Callable[[], float]
    moved: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


class Heartbeat:
    """Calls *tell* in a thread of its own: soon after :meth:`beat`, and now and then without one,
    after as many seconds as it answered;
    *failed* with what it raised, before it is tried again; *end* at last. None of them may refer
    to whoever owns this object.

    Starts at once, and ends by :meth:`stop`, when it is forgotten, or with the interpreter. Belongs
    to the process that made it.
    """

    def __init__(
        self,
        name: str,
        tell: Callable[[], float | None],
        failed: Callable[[ForebayError | ValueError], None],
        end: Callable[[], None],
        pause_seconds: Callable[[], float] = lambda: SEND_SECONDS,
    ) -> None:
        """*pause_seconds*: for how long there is nothing more to tell after it was told."""
        self._pid = os.getpid()
        self._shared = shared = _Shared(tell, failed, end, pause_seconds)
        self._thread = threading.Thread(
            target=_keep_telling, args=(shared,), name=name, daemon=True
        )
        weakref.finalize(self, _stop, shared, self._pid).atexit = False
        _running[self._thread] = shared
        self._thread.start()

    @property
    def is_ours(self) -> bool:
        """Whether this is the process that made it, and not a child of fork."""
        return self._pid == os.getpid()

    @property
    def is_over(self) -> bool:
        return self._shared.over.is_set()

    def beat(self) -> None:
        """Have the daemon told soon. Never blocks."""
        if not self._shared.moved.is_set():
            self._shared.moved.set()

    def stop(self) -> None:
        """Tell no more, and wait a little for the end to be told. Idempotent."""
        _stop(self._shared, self._pid)
        if self.is_ours:
            self._thread.join(timeout=JOIN_SECONDS)


def _stop(shared: _Shared, pid: int) -> None:
    if os.getpid() != pid:  # a child of fork: the plan is the parent's, and locks may be held
        return
    shared.over.set()
    shared.moved.set()


_running: Final[dict[threading.Thread, _Shared]] = {}


@atexit.register
def _stop_all() -> None:
    """A thread that still runs when the interpreter ends is ended by it wherever it is; inside of
    an operation of torch that is the end of the process, by SIGABRT. So it ends before."""
    ours = [(one, shared) for one, shared in list(_running.items()) if one.is_alive()]
    for _, shared in ours:
        shared.over.set()
        shared.moved.set()
    deadline = time.monotonic() + JOIN_SECONDS
    for thread, _ in ours:
        thread.join(max(0.0, deadline - time.monotonic()))


def _keep_telling(shared: _Shared) -> None:
    try:
        _tell_until_over(shared)
    finally:
        _running.pop(threading.current_thread(), None)


def _tell_until_over(shared: _Shared) -> None:
    again: float | None = None
    while True:
        shared.moved.wait(ALIVE_SECONDS if again is None else min(again, ALIVE_SECONDS))
        shared.moved.clear()
        if shared.over.is_set():
            break
        try:
            again = shared.tell()
        except (ForebayError, ValueError) as error:
            shared.failed(error)
            shared.over.wait(RETRY_SECONDS)
            shared.moved.set()
        shared.over.wait(shared.pause_seconds())
    with contextlib.suppress(ForebayError, ValueError):  # or its lease ends it
        shared.end()
