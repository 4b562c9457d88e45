"""What a first epoch costs whose samples lie in an S3 store alone, and what the next one does.

The store is a server on the loopback, which counts: GETs, and bytes that it sent, of each
contender's bucket. A contender starts with an empty cache of its own, where it has one.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from harness import Report
from loader_data import Place

from forebay_server.testing.s3 import make_bucket
from forebay_server.testing.seaweed import KEY, SECRET, SeaweedFS

CASE = "peers3k"
WORKERS = 1
"""Mosaic Streaming's workers share the parent's connection to the store: two at once mix their
answers up, and wait for a minute until they try again."""
SETTLED_SECONDS = 0.1
"""Counters lag behind the answers by less."""


class Contender(Protocol):
    """A process that answers questions; see ``children.py``."""

    def send(self, do: str, **what: Any) -> None: ...

    def answer(self) -> dict[str, Any]: ...

    def ask(self, do: str, **what: Any) -> dict[str, Any]: ...


class CountingStore:
    """An S3 server with a bucket for each name."""

    def __init__(self, folder: Path) -> None:
        self._server = SeaweedFS(folder)
        self.places: dict[str, Place] = {}

    def start(self, names: Sequence[str]) -> None:
        self._server.start()
        for name in names:
            bucket = make_bucket(self._server.endpoint, KEY, SECRET).bucket
            self.places[name] = Place(self._server.endpoint, KEY, SECRET, bucket)

    def close(self) -> None:
        self._server.kill()

    def counts(self, name: str) -> tuple[float, float]:
        """GETs so far, and bytes sent."""
        time.sleep(SETTLED_SECONDS)
        url = self._server.metrics_url
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own address
            lines = answer.read().decode().splitlines()
        gets = num_bytes = 0.0
        mine = f'bucket="{self.places[name].bucket}"'
        for line in lines:
            if mine not in line:
                continue
            kind, number = re.split(r"[{ ]", line, maxsplit=1)[0], float(line.rsplit(" ", 1)[1])
            if kind == "SeaweedFS_s3_request_total" and 'type="GET"' in line:
                gets += number
            elif kind == "SeaweedFS_s3_bucket_traffic_sent_bytes_total":
                num_bytes += number
        return gets, num_bytes


def publish(store: CountingStore, found: Mapping[str, Contender]) -> None:
    """Have each contender bring its samples into the store, all at once."""
    for name, contender in found.items():
        contender.send("publish", case=CASE, place=asdict(store.places[name]))
    for contender in found.values():
        contender.answer()


def measure_cold(report: Report, store: CountingStore, found: Mapping[str, Contender]) -> None:
    """The figures of a first and a second epoch, of each contender by itself."""
    for name, contender in found.items():
        before = store.counts(name)
        ran = contender.ask("open", case=CASE, workers=WORKERS, cold=True)
        between = store.counts(name)
        again = contender.ask("run", case=CASE, workers=WORKERS, seconds=0)
        after = store.counts(name)
        contender.ask("close", case=CASE, workers=WORKERS)
        assert ran["samples"] == again["samples"], "an epoch has other samples than the next"
        report.value(f"{name}_first_batch_cold_ms", [ran["first_batch_seconds"] * 1e3])
        report.value(f"{name}_cold_epoch_s", [ran["seconds"]])
        report.value(f"{name}_gets_first_epoch", [between[0] - before[0]])
        report.value(f"{name}_gets_second_epoch", [after[0] - between[0]])
        report.value(f"{name}_origin_mb_first_epoch", [(between[1] - before[1]) / 1e6])
        report.value(f"{name}_origin_mb_second_epoch", [(after[1] - between[1]) / 1e6])
