"""What an open gives to a client, and what it says of whoever asks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from forebay_server.serve.stream import Stream
from forebay_wire.errors import ForebayError, IntegrityError, StorageError


@dataclass(frozen=True)
class OpenedBlob:
    """A blob that was opened for a client; whoever gets it calls ``close``.

    It counts as open until it is released, whatever becomes of the descriptors.
    """

    blob: str
    length: int
    """Bytes of data."""
    tier: str
    fd: int
    """Read-only; data, and the segment table unless that has a file of its own. -1: none, the bytes
    come by HTTP."""
    table_offset: int
    table_length: int
    table_fd: int = -1
    """Read-only; the file that holds the segment table if it is another one."""
    let_go: Callable[[], None] | None = None
    """What ends the open, beside its count."""

    stream: Stream | None = None
    """Where its bytes come from, segment by segment, instead of a descriptor."""

    @property
    def extents(self) -> tuple[tuple[int, int, int], ...]:
        """``(blob offset, file offset, length)`` of each piece."""
        return ((0, 0, self.length),) if self.length else ()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """``fd``, and ``table_fd``, those that there are."""
        return tuple(one for one in (self.fd, self.table_fd) if one >= 0)

    def close(self) -> None:
        """Close the descriptors. Once."""
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


@dataclass
class Reading:
    """For whom blobs are opened, and what that waits for."""

    plan: str = ""
    """Name of the reader's plan, if it has one."""
    can_stream: bool = False
    """Whether it takes a :class:`~forebay_server.serve.stream.Stream`; else it is told to come back
    by HTTP."""
    waits: dict[str, float] = field(default_factory=dict)
    """Reason to the longest wait of its blobs, in seconds."""

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Inside, a blob is waited for; those of one request are waited for together."""
        started = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - started
            self.waits[reason] = max(self.waits.get(reason, 0.0), took)


NOBODY: Final = Reading()

reading: Final[ContextVar[Reading]] = ContextVar("forebay_reading", default=NOBODY)
"""For whom the current task opens blobs."""


def no_copy(blob: str, problems: Sequence[ForebayError]) -> ForebayError:
    """What to tell whoever asks for *blob*, of which *problems* left no copy that serves."""
    if problems and all(isinstance(problem, StorageError) for problem in problems):
        return problems[0]
    reasons = "; ".join(problem.message for problem in problems) or "all are quarantined"
    return IntegrityError(
        f"blob {blob} has no undamaged replica on this node ({reasons}): restore it from the "
        "object tier (forebay recover), or use another version or generation"
    )
