"""SIGTERM as a wish to end at the next step: the handler only sets a flag."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignal:
    """A context manager of the main thread; ``requested`` turns true at the first SIGTERM.

    A second one ends the process at once, as without the handler.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def wait(self, seconds: float) -> bool:
        """Whether the signal has come, or comes within so long."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.requested

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, self._before)
