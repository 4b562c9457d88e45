"""Holds a daemon in a process of its own up at a failpoint, for as long as a test wants."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from forebay_wire.failpoints import VARIABLE


class Stall:
    """A FIFO that a daemon's failpoint waits at. A context manager: it ends the stall."""

    def __init__(self, path: Path, failpoint: str) -> None:
        """*path* does not exist yet; the daemon gets :attr:`environment`."""
        self.path = path
        self.environment = {VARIABLE: f"{failpoint}@{path}"}
        self._descriptor = -1

    def begin(self) -> None:
        """From here on nobody passes."""
        os.mkfifo(self.path)
        self._descriptor = os.open(self.path, os.O_RDWR)

    def end(self) -> None:
        """Let all go on. Idempotent."""
        if self._descriptor >= 0:
            self.path.unlink()  # first: who comes from here on does not wait
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
