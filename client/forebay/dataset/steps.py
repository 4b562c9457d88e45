"""The samples of one rank step by step, computed for many steps at a time.

A permutation of a few hundred positions costs mostly its number of array operations; of thousands
it costs per position a hundredth of that.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np

from forebay.dataset.reading import Piece, Samples, Steps
from forebay_wire.order import Cut, Part
from forebay_wire.permutation import Numbers

PAGE_SAMPLES: Final = 1 << 14
"""About so many samples of this rank are computed at a time: half a millisecond."""

MAX_PAGES: Final = 4
"""What the threads of a loader or two need."""


class StepPages:
    """Remembers the pages used last. Thread-safe; picklable, without what it remembers."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pages: OrderedDict[tuple[Any, ...], _Page] = OrderedDict()

    def at(
        self, samples: Samples, cut: Steps, step: Any, rank: int, num_ranks: int
    ) -> tuple[Piece, Numbers]:
        """The part of *rank* in *step*, and what stands at its positions (not to be written to)."""
        if not isinstance(cut, Cut):  # its steps are no numbers
            part = cut.part(step, rank, num_ranks)
            return part, samples.rows(part.positions(samples.num_samples))
        if self._pid != os.getpid():  # a thread of the parent may have held the lock
            self._start()
        size = max(1, PAGE_SAMPLES * num_ranks // cut.global_batch_size)
        key = (id(samples), cut, step // size, rank, num_ranks)
        with self._lock:
            page = self._pages.get(key)
            if page is None:
                first = step - step % size
                steps = range(first, min(first + size, cut.num_steps))
                page = self._pages[key] = _Page(samples, cut, steps, rank, num_ranks)
            self._pages.move_to_end(key)
            while len(self._pages) > MAX_PAGES:
                self._pages.popitem(last=False)
        return page.at(step)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepPages, ()


class _Page:
    """Some consecutive steps."""

    def __init__(self, samples: Samples, cut: Cut, steps: range, rank: int, num_ranks: int) -> None:
        self._samples = samples  # while it lives, no other one has its id
        self._first = steps.start
        self._parts = [cut.part(step, rank, num_ranks) for step in steps]
        found = samples.rows(_positions(self._parts, samples.num_samples))
        found.flags.writeable = False  # several readers have it
        ends = accumulate((part.num_rows for part in self._parts), initial=0)
        self._found = [found[start:end] for start, end in pairwise(ends)]

    def at(self, step: int) -> tuple[Piece, Numbers]:
        place = step - self._first
        return self._parts[place], self._found[place]


def _positions(parts: Sequence[Part], num_samples: int) -> Numbers:
    """Those of all *parts*, which are of consecutive steps, one after the other."""
    start, stop = parts[0].batch_start, parts[-1].batch_stop
    is_whole = sum(part.num_samples for part in parts) == stop - start
    if is_whole and parts[0].lanes == 1 and not parts[-1].num_padding:
        return np.arange(start, stop)  # one rank reads all of it
    return np.concatenate([part.positions(num_samples) for part in parts])
