"""SIGTERM as a wish to end at the next step: the handler only sets a flag."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Final, Self

TOGETHER_SECONDS: Final = 0.5
"""Signals that come within so long are one: a scheduler signals the group and the launcher passes
that on; of a parent that is killed, the kernel sends one for the death of each thread."""


class StopSignal:
    """A context manager of the main thread; ``requested`` turns true at the first SIGTERM (or
    other signal of *signals*).

    A second one, later than `TOGETHER_SECONDS`, ends the process at once, as without the handler.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self.requested = False
        self._signals = signals or (signal.SIGTERM,)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {each: signal.signal(each, self._handle) for each in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def wait(self, seconds: float) -> bool:
        """Whether the signal has come, or comes within so long."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.requested

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        self.requested = True
        time.sleep(TOGETHER_SECONDS)  # what comes meanwhile is handled within
        self._restore()

    def _restore(self) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)
