"""The whole of an origin in order, its ranges read several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final

from forebay_server.tier.buffers import BufferPool
from forebay_server.tier.origin import OriginFile
from forebay_wire.limits import MAX_SEGMENT_BYTES

RANGE_BYTES: Final = 2 * MAX_SEGMENT_BYTES
AT_ONCE: Final = 4
"""Ranges of one file that are on their way: a store gives one connection less than the link."""

_BUFFERS: Final = BufferPool(4 * AT_ONCE, RANGE_BYTES)
"""Of all files that are read at once."""


@dataclass(frozen=True)
class _Range:
    buffer: memoryview
    view: memoryview
    read: Future[None]


@contextmanager
def in_order(file: OriginFile) -> Iterator[Iterator[memoryview]]:
    """A ``with`` block whose value iterates over all bytes of *file*, in pieces of RANGE_BYTES but
    for the last; each is good until the next one. Blocks; errors are those of
    :meth:`OriginFile.read_into`."""
    with ThreadPoolExecutor(AT_ONCE, "origin") as threads, closing(_pieces(file, threads)) as found:
        yield found


def _pieces(file: OriginFile, threads: ThreadPoolExecutor) -> Generator[memoryview, None, None]:
    starts = deque(range(0, file.num_bytes, RANGE_BYTES))
    coming: deque[_Range] = deque()
    try:
        while starts or coming:
            while starts and len(coming) < AT_ONCE:
                # Who holds one buffer must not wait for a second.
                buffer = _BUFFERS.take_if_free() if coming else _BUFFERS.take()
                if buffer is None:
                    break
                start = starts.popleft()
                view = buffer[: min(RANGE_BYTES, file.num_bytes - start)]
                coming.append(_Range(buffer, view, threads.submit(file.read_into, start, view)))
            coming[0].read.result()
            yield coming[0].view
            _BUFFERS.give_back(coming.popleft().buffer)
    finally:
        for one in coming:
            if not one.read.cancel():
                one.read.exception()  # it writes into the buffer until it has ended
            _BUFFERS.give_back(one.buffer)
