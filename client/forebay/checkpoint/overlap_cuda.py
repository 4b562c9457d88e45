"""Copies from a GPU into the daemon's memory on a stream of their own: the host never waits.

The slot's memory is registered with CUDA once, as long as it stays mapped, so that copies run by
DMA. The compute stream waits for a copy's event where the state is about to change, and no sooner.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from forebay.checkpoint.objects import byte_view
from forebay.checkpoint.snapshot import Source

_log = logging.getLogger(__name__)

MAX_REGISTERED: Final = 2
"""Slots of one attempt; each is registered memory that cannot be swapped out."""


class RegisteredMemory:
    """Slots that CUDA may copy to by itself. Not thread-safe; ``close`` before they are unmapped.

    Holds the memory of what it has registered: that may not be unmapped before.
    """

    def __init__(self, runtime: Any = None) -> None:
        """*runtime*: CUDA's, as ``torch.cuda.cudart()`` answers it."""
        self._runtime = runtime
        self._known: OrderedDict[tuple[int, int], memoryview] = OrderedDict()

    def register(self, memory: memoryview) -> bool:
        """Whether copies to *memory* run by DMA from here on; else they hold the host up."""
        if self._runtime is None:
            self._runtime = torch.cuda.cudart()
        whole = memoryview(memory.obj).cast("B")
        array = np.frombuffer(whole, np.uint8)
        key = int(array.ctypes.data), whole.nbytes
        if key in self._known:
            self._known.move_to_end(key)
            return True
        while len(self._known) >= MAX_REGISTERED:
            self._forget(next(iter(self._known)))
        status = int(self._runtime.cudaHostRegister(*key, 0))
        if status:
            _log.warning(
                "CUDA cannot register %d bytes of the daemon's memory (error %d): copies from the "
                "GPU hold the training up (is the locked memory limited, ulimit -l?)",
                whole.nbytes,
                status,
            )
            return False
        self._known[key] = whole
        return True

    def close(self) -> None:
        """Let all memory go. Idempotent."""
        for key in list(self._known):
            self._forget(key)

    def _forget(self, key: tuple[int, int]) -> None:
        self._runtime.cudaHostUnregister(key[0])
        del self._known[key]


class StreamCopies:
    """Copies of one snapshot from one or more GPUs. Begun and released by the training's thread."""

    def __init__(self, events: Sequence[tuple[torch.device, Any]]) -> None:
        self._events = events

    @classmethod
    def start(cls, sources: Sequence[Source], staged: memoryview) -> StreamCopies:
        """Enqueue the copies behind what the compute streams have been given so far."""
        events = []
        for device in dict.fromkeys(_device(source) for source in sources):
            side = _side_stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for source in sources:
                    if _device(source) == device:
                        _enqueue(source, staged, side)
                event = torch.cuda.Event()
                event.record(side)
            events.append((device, event))
        return cls(events)

    def release(self) -> None:
        """From here on the state may change: what the compute streams are given next waits for the
        copies there, not here."""
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Return when the bytes are there. For a thread that has time."""
        for _, event in self._events:
            event.synchronize()


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    """One for each GPU, for the life of the process: torch's allocator keeps memory by stream."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device=device)
    return _streams[device]


def _device(source: Source) -> torch.device:
    assert isinstance(source.data, torch.Tensor)
    return source.data.device


def _enqueue(source: Source, staged: memoryview, side: Any) -> None:
    tensor = source.data
    assert isinstance(tensor, torch.Tensor)
    tensor = tensor.detach()
    target = torch.frombuffer(
        staged, dtype=torch.uint8, offset=source.offset, count=source.num_bytes
    )
    # What is gathered first is written to memory of the side stream.
    flat = byte_view(tensor.resolve_conj().resolve_neg().contiguous())
    target.copy_(flat, non_blocking=True)
    flat.record_stream(side)
