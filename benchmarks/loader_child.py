"""One contender of the loaders' benchmark, in a process of its own; see ``children.py``."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from loader_data import Case, Place, cases


class Contender(Protocol):
    """What each has to be able to do. ``folder`` is its own."""

    def __init__(self, folder: Path) -> None: ...

    def prepare(self, case: Case) -> None:
        """Write the samples in its own format."""

    def open(self, case: Case, workers: int) -> Any:
        """A loader of batches of 256 in its strongest shuffle; each iteration is an epoch."""

    def publish(self, case: Case, place: Place) -> None:
        """Bring what was prepared into an S3 bucket, and have nothing of it nearer."""

    def open_cold(self, case: Case, workers: int) -> Any:
        """As :meth:`open`, over what was published."""

    def rows(self, batch: Any) -> int: ...

    def labels(self, batch: Any) -> np.ndarray:
        """The column ``y``."""

    def items(self, case: Case) -> Any:
        """What ``[i]`` gives single samples of."""

    def facts(self) -> dict[str, Any]:
        """Versions, and processes whose work counts as its own."""


class Child:
    """Answers the lines."""

    def __init__(self, make: Callable[[Path], Contender], folder: Path, *, quick: bool) -> None:
        """*folder* is for nobody else."""
        folder.mkdir(parents=True, exist_ok=True)
        self.contender = make(folder)
        self.cases = cases(quick=quick)
        self.loaders: dict[tuple[str, int], Any] = {}

    def prepare(self, case: str) -> dict[str, Any]:
        start = time.perf_counter()
        self.contender.prepare(self.cases[case])
        return {"seconds": time.perf_counter() - start, **self.contender.facts()}

    def publish(self, case: str, place: dict[str, str]) -> dict[str, Any]:
        start = time.perf_counter()
        self.contender.publish(self.cases[case], Place(**place))
        return {"seconds": time.perf_counter() - start, **self.contender.facts()}

    def open(
        self, case: str, workers: int, *, cold: bool = False, order: bool = False
    ) -> dict[str, Any]:
        """A loader, and its first epoch: then files are in the page cache and workers there.

        With *order* also the samples of this epoch, as they come.
        """
        start = time.perf_counter()
        make = self.contender.open_cold if cold else self.contender.open
        loader = make(self.cases[case], workers)
        self.loaders[case, workers] = loader
        first, seen, found = 0.0, 0, []
        for batch in loader:
            first = first or time.perf_counter() - start
            seen += self.contender.rows(batch)
            if order:
                found += self.contender.labels(batch).tolist()
        taken = time.perf_counter() - start
        assert seen >= self.cases[case].num_samples - 2 * 256, f"{seen} samples in an epoch"
        return {
            "first_batch_seconds": first,
            "samples": seen,
            "seconds": taken,
            **({"order": found} if order else {}),
        }

    def run(self, case: str, workers: int, seconds: float) -> dict[str, Any]:
        """Whole epochs, for *seconds* at least."""
        loader, waits, seen = self.loaders[case, workers], [], 0
        start = time.perf_counter()
        while True:
            asked = time.perf_counter()
            for batch in loader:
                got = time.perf_counter()
                waits.append(got - asked)
                seen += self.contender.rows(batch)
                asked = time.perf_counter()
            taken = time.perf_counter() - start
            if taken >= seconds:
                break
        waits.sort()
        return {
            "samples": seen,
            "seconds": taken,
            "wait_p50_ms": statistics.median(waits) * 1e3,
            "wait_p99_ms": waits[int(len(waits) * 0.99)] * 1e3,
        }

    def close(self, case: str, workers: int) -> dict[str, Any]:
        """End a loader and its workers now: when they are collected some time, torch waits for
        five seconds for each that does not end by itself, in the middle of what is measured then.
        """
        loader = self.loaders.pop((case, workers))
        if hasattr(loader, "close"):
            loader.close()
            return {}
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1
        del loader
        gc.collect()
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 5.0
        return {}

    def items(self, case: str, count: int) -> dict[str, Any]:
        """Single samples at random."""
        samples = self.contender.items(self.cases[case])
        wanted = np.random.default_rng().integers(0, self.cases[case].num_samples, count).tolist()
        found = samples[wanted[0]]
        assert int(found["y"]) == wanted[0], "another sample"
        start = time.perf_counter()
        for index in wanted:
            samples[index]
        return {"samples": count, "seconds": time.perf_counter() - start}
