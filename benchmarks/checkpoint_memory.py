"""How much memory processes have, beside the state that checkpoints' contenders share."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import psutil

STATE_NAME = "forebay-benchmark-state"
"""Of the state's memory, as it is seen in a process's list of mappings."""

SAMPLE_SECONDS = 0.05


def own_bytes(pid: int) -> int:
    """Memory of a process and those that it started, each page shared out among those who map it;
    the state that is saved does not count."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += proportional_bytes(Path(f"/proc/{process.pid}/smaps").read_text())
        except OSError:  # it has ended
            continue
    return total


def proportional_bytes(smaps: str) -> int:
    """The sum of ``Pss`` over all mappings but those of the state."""
    total, counts = 0, True
    for line in smaps.splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            counts = STATE_NAME not in rest
        elif counts and first == "Pss:":
            total += 1024 * int(rest.split()[0])
    return total


class PeakMemory:
    """Looks again and again how much memory some processes have. A context manager."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, sum(own_bytes(pid) for pid in self._pids))

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
