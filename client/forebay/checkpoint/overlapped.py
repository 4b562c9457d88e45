"""Saves whose large tensors are copied while forward and backward go on."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from forebay.checkpoint.components import Component
from forebay.checkpoint.handle import Saved
from forebay.checkpoint.hooks import StepNet
from forebay.checkpoint.overlap import Snapshot, Watch, copy_quietly, may_wait, owned_memory
from forebay.checkpoint.overlap_cuda import RegisteredMemory, StreamCopies
from forebay.checkpoint.save import Saver, SaveRequest, SaveWork, seal_work
from forebay.checkpoint.snapshot import Source
from forebay.waiting import Deadline
from forebay_wire.durability import Durability
from forebay_wire.errors import Conflict, ForebayError

_log = logging.getLogger(__name__)

KEPT_WAITS: Final = 10_000


@dataclass
class _Copy:
    """What one overlapped save has left to copy."""

    here: list[Source] = field(default_factory=list)
    """On the CPU."""
    watch: Watch = field(default_factory=lambda: Watch(()))
    """Of those."""
    streams: StreamCopies | None = None
    stream_watch: Watch = field(default_factory=lambda: Watch(()))
    is_released: bool = False
    error: Exception | None = None
    staged: memoryview = field(default_factory=lambda: memoryview(b""))
    num_bytes: int = 0

    def release(self, streams: StreamCopies) -> None:
        """What is on GPUs may change from here on, if it has not changed so far."""
        try:
            self.stream_watch.check()
        except Conflict as error:
            self.error = error
            raise
        finally:
            self.is_released = True
            streams.release()

    def finish_streams(self, streams: StreamCopies) -> None:
        """On another thread: return when the bytes are there, as they were at the begin."""
        streams.wait()
        if not self.is_released:
            self.stream_watch.check()
        if self.error is not None:
            raise self.error


class Overlap:
    """The overlapped saves of one Checkpointer: one at a time. Used by the training's thread."""

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = components
        self._registered = RegisteredMemory()
        self._net = StepNet(self._wait_in_step)
        self._deadline: Callable[[], Deadline] = lambda: Deadline(0.0)
        self._current: tuple[Snapshot, _Copy] | None = None
        self.num_bytes = 0
        """Copied in the background so far."""
        self._waits: deque[float] = deque(maxlen=KEPT_WAITS)

    @property
    def is_running(self) -> bool:
        return self._current is not None

    def start(
        self,
        saver: Saver,
        request: SaveRequest,
        on_sealed: Callable[[SaveWork], None],
        deadline: Callable[[], Deadline],
    ) -> tuple[SaveWork, Snapshot] | None:
        """Begin a save; on return all is copied that an optimizer does not own.

        *on_sealed* is called on another thread when all ranks have sealed. None if all ranks skip
        it. The next :meth:`wait` is bounded by *deadline*.
        """
        assert self._current is None
        copies: list[_Copy] = []
        begun = saver.begin_overlapped(
            request,
            lambda work: copies.append(self._start_copy(saver, work)),
            lambda work: _finish(work, copies[-1]),
        )
        if begun is None:
            return None
        work, rest = begun

        def go_on() -> None:
            rest()
            on_sealed(work)

        snapshot = Snapshot.start(go_on)
        self._current = snapshot, copies[-1]
        self._deadline = deadline
        self.num_bytes += copies[-1].num_bytes
        self._net.spread()
        return work, snapshot

    def wait(self) -> None:
        """From here on the state may change. Raises what made the copy fail, once.

        For what lies on a GPU the compute stream waits and the host does not.
        """
        if self._current is None:
            return
        snapshot, copy = self._current
        if copy.streams is not None and not copy.is_released:
            copy.release(copy.streams)
        if copy.streams is None or copy.here or snapshot.is_done:
            self._settle()

    def waited(self, percent: float) -> float:
        """Seconds that the training was held up after overlapped saves began, this percentile."""
        return float(np.percentile(self._waits or [0.0], percent))

    def settle(self) -> None:
        """Wait for the outcome on all ranks, too. Raises what made it fail, once."""
        if self._current is not None:
            self.wait()
            self._settle()

    def close(self) -> None:
        """Wait for a copy that is under way, and let registered memory go. Idempotent.

        What made the copy fail is not raised here: the save's own object does that.
        """
        try:
            self.settle()
        except ForebayError:
            _log.debug("the last overlapped save failed", exc_info=True)
        finally:
            self._net.remove()
            self._registered.close()

    def _settle(self) -> None:
        if self._current is None:
            return
        snapshot, _ = self._current
        started = time.monotonic()
        try:
            snapshot.wait(self._deadline())
        finally:
            self._waits.append(time.monotonic() - started)
            if snapshot.is_done:
                self._current = None

    def _wait_in_step(self) -> None:
        self.wait()

    def _start_copy(self, saver: Saver, work: SaveWork) -> _Copy:
        assert work.pack is not None
        if not work.upload.fits_slot:
            saver.copy(work)  # piece by piece, which is said there
            return _Copy()
        owned = owned_memory(self._components)
        later = [source for source in work.pack.sources if may_wait(source, owned)]
        skipped = set(map(id, later))
        now = [source for source in work.pack.sources if id(source) not in skipped]
        staged = work.upload.copy_some(now)
        here = [source for source in later if _is_here(source)]
        there = [source for source in later if not _is_here(source)]
        copy = _Copy(here, Watch(here), None, Watch(there), staged=staged)
        copy.num_bytes = sum(source.num_bytes for source in later)
        if there:
            self._registered.register(staged)
            copy.streams = StreamCopies.start(there, staged)
        return copy


def _is_here(source: Source) -> bool:
    return isinstance(source.data, torch.Tensor) and source.data.device.type != "cuda"


def _finish(work: SaveWork, copy: _Copy) -> None:
    """On another thread: copy the rest, look whether it has stayed as it was, and seal."""
    if copy.num_bytes or copy.staged.nbytes:
        copy_quietly(copy.here, copy.staged)
        copy.watch.check(copy.staged)
        if copy.streams is not None:
            copy.finish_streams(copy.streams)
        work.upload.finish()
    seal_work(work)


class SavedBehind(Saved):
    """A generation whose copy may still be under way: it is ``ram`` when all ranks have sealed."""

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)
        self._reached = Durability.NONE
        self._snapshot: Snapshot | None = None

    def follow(self, snapshot: Snapshot) -> None:
        """Wait for *snapshot* before anything else."""
        self._snapshot = snapshot

    def sealed(self) -> None:
        """All ranks have sealed."""
        self._note("ram")

    @property
    def durability(self) -> Durability:
        return super().durability if self._is_settled() else self._reached

    def reached(self, durability: str) -> bool:
        return super().reached(durability) if self._is_settled() or not durability else False

    def wait(self, durability: str = "local", timeout: float | None = None) -> None:
        deadline = Deadline(self._timeout if timeout is None else timeout)
        if self._snapshot is not None:
            self._snapshot.wait(deadline)
        super().wait(durability, deadline.remaining)

    def _is_settled(self) -> bool:
        """Raises what made the copy fail."""
        if self._snapshot is None or not self._snapshot.is_done:
            return False
        self._snapshot.wait(Deadline(0.0))
        return True
