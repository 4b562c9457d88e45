"""Tiers that fail or stall on demand."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from forebay_server.tier.store import Tier, from_os_error, from_read_error
from forebay_server.tier.wrap import TierWrapper

READS: Final = frozenset({"read", "read_into"})


class FaultyTier(TierWrapper):
    """Fails the calls that :meth:`fail` names, before they reach the tier inside."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        """How often each operation was asked for, failed ones too."""
        self._faults: dict[str, list[int]] = {}

    def fail(self, operation: str, times: int = 1, code: int = errno.EIO) -> None:
        """The next *times* calls of *operation* (``write``, ``publish``, ...) end with *code*."""
        self._faults.setdefault(operation, []).extend([code] * times)

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        self.calls[operation] += 1
        codes = self._faults.get(operation)
        if codes:
            code = codes.pop(0)
            error = OSError(code, os.strerror(code))
            convert = from_read_error if operation in READS else from_os_error
            raise convert(error, f"{operation} of file {name}", f"tier {self.name}") from error
        yield


class StallingTier(FaultyTier):
    """Holds up the calls of *operation* while *gate* is closed, and fails them as told."""

    def __init__(self, inner: Tier, operation: str, gate: threading.Event) -> None:
        """*gate* is open while it is set."""
        super().__init__(inner)
        self._operation = operation
        self._gate = gate

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        if operation == self._operation:
            self._gate.wait()
        with super().around(operation, name, num_bytes):
            yield
