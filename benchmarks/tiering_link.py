"""A daemon whose object tier lies behind one link of a set latency and bandwidth.

``python tiering_link.py LATENCY_SECONDS BYTES_PER_SECOND COUNT_FILE serve ...``: all reads share
the link, as over a network; COUNT_FILE holds how many bytes came over it. Bandwidth 0: no limit.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forebay_server import cli, daemon
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.wrap import TierWrapper

COUNT = struct.Struct("<Q")


class Link:
    """Gives bytes their turn, one read after the other, each a latency after it was asked for."""

    def __init__(self, latency_seconds: float, bytes_per_second: float, count: Path) -> None:
        self._latency_seconds = latency_seconds
        self._bytes_per_second = bytes_per_second
        self._count = count.open("r+b", buffering=0)
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._num_bytes = 0

    def wait(self, num_bytes: int, asked_at: float) -> None:
        """Return when so many bytes would have arrived."""
        with self._lock:
            self._num_bytes += num_bytes
            self._count.seek(0)
            self._count.write(COUNT.pack(self._num_bytes))
            if not self._bytes_per_second:
                return
            starts_at = max(self._free_at, asked_at + self._latency_seconds)
            self._free_at = starts_at + num_bytes / self._bytes_per_second
            due = self._free_at
        time.sleep(max(0.0, due - time.monotonic()))


class LinkedTier(TierWrapper):
    """Any tier, at the other end of the link."""

    def __init__(self, inner: Tier, link: Link) -> None:
        super().__init__(inner)
        self._link = link

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        asked_at = time.monotonic()
        yield
        if operation == "read_into":
            self._link.wait(num_bytes, asked_at)


def main() -> int:
    latency, rate, count, *arguments = sys.argv[1:]
    link = Link(float(latency), float(rate), Path(count))
    open_tiers = daemon.open_tiers

    def open_linked(*args: object) -> Tiers:
        tiers = open_tiers(*args)  # type: ignore[arg-type]  # passed on as they came
        linked = [LinkedTier(one, link) if one.kind == "object" else one for one in tiers.all]
        return Tiers(linked, tiers.slots)

    daemon.open_tiers = open_linked
    sys.argv = ["forebay_server", *arguments]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
