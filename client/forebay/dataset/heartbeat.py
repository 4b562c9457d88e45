"""The thread of a plan: tells the daemon what is new, now and then, and that its reader lives."""

from __future__ import annotations

import contextlib
import os
import threading
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

    Starts at once, and ends by :meth:`stop`, or when it is forgotten. Belongs to the process that
    made it.
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


def _keep_telling(shared: _Shared) -> None:
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
