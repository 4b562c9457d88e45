"""A copy that goes on while the training computes, and fails rather than copy what has changed.

Only tensors that belong to the registered optimizers are left to it: nothing else writes to them
between two steps. That they have not changed is looked at in the end all the same: by their version
counters, by where they lie, and, for what bypasses both (``p.data``), by samples of their bytes.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import torch

from forebay.checkpoint.components import Component, OptimizerComponent
from forebay.checkpoint.samples import Samples, is_run
from forebay.checkpoint.snapshot import Source, copy_bytes
from forebay.checkpoint.wrappers import plain_parts
from forebay.waiting import Deadline
from forebay_wire.errors import Conflict, DeadlineExceeded
from forebay_wire.limits import MIB

_log = logging.getLogger(__name__)

BACKGROUND_BYTES: Final = 1 * MIB
"""Smaller ones are copied at once: looking after them would cost more."""

PIECE_BYTES: Final = 64 * MIB
"""Copied without looking up: small enough that a copy nobody wants any more ends soon."""


def owned_memory(components: Iterable[Component]) -> set[tuple[object, ...]]:
    """Where the parameters and the state of all registered optimizers lie."""
    found: set[tuple[object, ...]] = set()
    for component in components:
        if not isinstance(component, OptimizerComponent):
            continue
        for group in component.optimizer.param_groups:
            found.update(map(_place, chain.from_iterable(map(plain_parts, group["params"]))))
        for held in component.optimizer.state.values():
            for value in held.values() if isinstance(held, dict) else ():
                if isinstance(value, torch.Tensor):
                    found.update(map(_place, plain_parts(value)))
    return found


def may_wait(source: Source, owned: set[tuple[object, ...]]) -> bool:
    """Whether *source* may be copied in the background."""
    return (
        source.num_bytes >= BACKGROUND_BYTES
        and bool(source.tensors)
        and all(_place(t) in owned and not t.is_inference() for t in source.tensors)
    )


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return str(tensor.device), tensor.data_ptr(), tensor.dtype, tensor.numel()


def _is_here(source: Source) -> bool:
    return isinstance(source.data, torch.Tensor) and source.data.device.type == "cpu"


@dataclass(frozen=True)
class _Watched:
    """A tensor as it was when the copy began."""

    tensor: torch.Tensor
    version: int
    address: int
    storage_bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Watched:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu":
            # As long as somebody copies from it, it may not be freed: from here on torch refuses
            # to resize it.
            torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        return cls(tensor, tensor._version, tensor.data_ptr(), storage.nbytes())

    def what_changed(self) -> str:
        """Empty if it is as it was."""
        tensor = self.tensor
        if tensor.untyped_storage().nbytes() != self.storage_bytes:
            return "its memory was freed or resized"
        if tensor.data_ptr() != self.address:
            return "its memory was replaced"
        if tensor._version != self.version:
            return "it was written to"
        return ""


class Watch:
    """The tensors of some sources, which must not change until :meth:`check`. Not thread-safe."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._watched = [[_Watched.of(tensor) for tensor in s.tensors] for s in sources]
        # Of a GPU's memory none: to read them the host would have to wait.
        self._samples = [
            Samples.of(source) if _is_here(source) else Samples((), ()) for source in sources
        ]

    def check(self, staged: memoryview | None = None) -> None:
        """:class:`Conflict` naming the first tensor that has changed.

        With *staged*, the pack's bytes, those have to be what the samples were.
        """
        for source, watched, samples in zip(
            self._sources, self._watched, self._samples, strict=True
        ):
            reason = next(filter(None, (one.what_changed() for one in watched)), "")
            if not reason and staged is not None and not samples.are_in(staged, source):
                reason = "what was copied is not what it held when the save began"
            if reason:
                raise Conflict(
                    f"{source.name} changed while it was saved: {reason}; call "
                    "wait_snapshot() before anything writes to parameters or optimizer state "
                    "(optimizer.step() does so by itself)"
                )


def copy_quietly(sources: Sequence[Source], staged: memoryview) -> None:
    """Copy CPU *sources* to where they lie in the pack *staged*, in this thread alone.

    The GIL is not held, and torch's other threads are left to the training.
    """
    for source in sources:
        tensor = source.data
        assert isinstance(tensor, torch.Tensor)
        target = staged[source.offset : source.offset + source.num_bytes]
        if not is_run(tensor):
            view = torch.frombuffer(target, dtype=torch.uint8)
            copy_bytes(view, source, 0, source.num_bytes)
            continue
        into = np.frombuffer(target, np.uint8).ctypes.data
        for start in range(0, source.num_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, source.num_bytes - start)
            ctypes.memmove(into + start, tensor.data_ptr() + start, size)


class Snapshot:
    """A copy under way in a thread of its own, up to the outcome on all ranks. Thread-safe."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._done = threading.Event()
        self._error: Exception | None = None
        self.seconds = 0.0
        """How long it took."""

    @classmethod
    def start(cls, act: Callable[[], None]) -> Snapshot:
        """Begin *act*, whose error :meth:`wait` raises."""
        snapshot = cls(act)
        threading.Thread(target=snapshot._run, name="forebay-snapshot", daemon=True).start()
        return snapshot

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self, deadline: Deadline) -> None:
        """Return once all ranks have copied and sealed; raises what made that fail, every time."""
        if not self._done.wait(deadline.remaining):
            raise DeadlineExceeded(
                f"the copy of the state was not done within {deadline.seconds:.0f} s; it goes on"
            )
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._act()
        except Exception as error:  # noqa: BLE001 - whoever waits hears of it
            self._error = error
            _log.warning("an overlapped save failed: %s", error)
        finally:
            self._act = _nothing  # it refers to the state
            self.seconds = time.monotonic() - started
            self._done.set()


def _nothing() -> None:
    """What is left to do afterwards."""
