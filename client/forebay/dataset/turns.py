"""Which epoch an iteration reads, agreed on by workers that only share a little memory.

Each iteration is an epoch of its own, like in torch, where each one shuffles anew. With workers the
parent's part of the dataset is never asked, so they have to find out: worker 0 takes the next place
and writes it down under the name of the iteration, the others look there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import torch

from forebay_wire.errors import DeadlineExceeded

_EPOCH, _POSITION, _IS_TAKEN, _SERIAL, _ROWS = range(5)
NUM_ROWS: Final = 64
"""Iterations that may begin at once."""

_NAME, _ROW_EPOCH, _ROW_POSITION, _CHECK = range(4)
WAIT_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.001


class Turns:
    """Where the next iteration begins: shared memory, seen by the parent and all workers.

    What the dataset was told last is where the next iteration begins; each further one is the
    next whole epoch, even if those before it were left early. Pickled to a worker it stays shared.
    """

    def __init__(self) -> None:
        self._shared = torch.zeros(_ROWS + 4 * NUM_ROWS, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._begun = (0, 0)
        """Process and number of iterations that it began: workers may be persistent."""

    def stand(self, epoch: int, position: int) -> None:
        """The next iteration begins here."""
        self._shared[_SERIAL] += 1
        self._shared[_IS_TAKEN] = 0
        self._shared[_EPOCH] = epoch
        self._shared[_POSITION] = position

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, position) that the dataset was told, or where the last iteration began."""
        return int(self._shared[_EPOCH]), int(self._shared[_POSITION])

    def went(self, epoch: int) -> None:
        """An iteration that has begun reads *epoch*."""
        self._shared[_EPOCH] = epoch
        self._shared[_IS_TAKEN] = 1

    def take(self, has_rest: Callable[[int], bool]) -> tuple[int, int]:
        """(epoch, position) where an iteration begins that begins now.

        *has_rest* says whether there is anything left of an epoch from a position on.
        """
        epoch, position = self.place
        if int(self._shared[_IS_TAKEN]) or not has_rest(position):
            epoch, position = epoch + 1, 0
        self._shared[_POSITION] = position
        self.went(epoch)
        return epoch, position

    def agree(
        self, worker: int, base_seed: int, has_rest: Callable[[int], bool]
    ) -> tuple[int, int]:
        """:meth:`take` for the *worker* of an iteration whose workers all call it.

        torch draws *base_seed* for each iteration. Who seeds torch alike before each one, with
        workers that do not persist, gets the same epoch again, like with a seeded sampler.
        """
        pid = os.getpid()
        count = self._begun[1] + 1 if self._begun[0] == pid else 1
        self._begun = (pid, count)
        serial = int(self._shared[_SERIAL])
        name = hash((base_seed, count, serial)) % 2**62 + 1  # of integers: alike everywhere
        row = _ROWS + 4 * (name % NUM_ROWS)
        if worker == 0 and self._read(row, name) is None:
            epoch, position = self.take(has_rest)
            self._shared[row + _NAME] = 0
            self._shared[row + _ROW_EPOCH] = epoch
            self._shared[row + _ROW_POSITION] = position
            self._shared[row + _CHECK] = _check(name, epoch, position)
            self._shared[row + _NAME] = name
        deadline = time.monotonic() + WAIT_SECONDS
        while (place := self._read(row, name)) is None:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"worker 0 of this iteration did not say in {WAIT_SECONDS:.0f} s which epoch "
                    "it reads: it is dead, or a state was loaded while workers were starting; "
                    "start the iteration again"
                )
            time.sleep(POLL_SECONDS)
        return place

    def _read(self, row: int, name: int) -> tuple[int, int] | None:
        found, epoch, position, check = self._shared[row : row + 4].tolist()
        is_whole = found == name and check == _check(name, epoch, position)
        return (epoch, position) if is_whole else None


def _check(name: int, epoch: int, position: int) -> int:
    """Tells a row that is only half there from a whole one, whatever the order of writes."""
    return name ^ (epoch << 40) ^ position ^ 0x5BD1E995
