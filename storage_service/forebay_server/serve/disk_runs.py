"""Keeps to the runs in which disks are read ahead: see ``model/runs.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from forebay_server.model.runs import Disk, Wanted, finish_seconds, next_run
from forebay_server.serve.promote import Place
from forebay_server.tier.disk_place import disk_position
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_wire.errors import ForebayError

SEEK_SECONDS: Final = 0.012
"""To another place of a disk, with half a turn of it."""

FIRST_BYTES_PER_SECOND: Final = 100e6
"""Until something was read."""

WEIGHT: Final = 0.2
"""Of the last read in what the speed is taken to be."""

MAX_KNOWN: Final = 1 << 16

Needed = tuple[float, Place]
"""Seconds from now, and the copy that is read."""


@dataclass
class _Run:
    """What is left of a disk's run, and where its head will be before that."""

    left: list[Wanted] = field(default_factory=list)
    head: int = 0
    bytes_per_second: float = FIRST_BYTES_PER_SECOND


class DiskRuns:
    """Of all disks. Belongs to the event loop."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._runs: dict[str, _Run] = {}
        self._positions: dict[str, int] = {}
        """File to where it begins."""

    async def learn(self, sources: Sequence[Place]) -> None:
        """Find out where on their disks *sources* lie."""
        if len(self._positions) > MAX_KNOWN:
            self._positions.clear()
        for name in {source.tier for source in sources}:
            tier = self._tiers.get(name)
            files = [one.file for one in sources if one.tier == name]
            unknown = [file for file in files if file not in self._positions]
            if unknown:
                self._positions |= await self._tiers.run(tier, _positions, tier, unknown)

    def choose(self, tier: str, needed: Sequence[Needed]) -> Needed:
        """Which of *needed*, of which there is at least one, *tier* is to read next: the next one
        of its run, unless that has ended or something else came that is needed before its end."""
        run = self._runs.setdefault(tier, _Run())
        by_blob = {source.blob: (seconds, source) for seconds, source in needed}
        run.left = [one for one in run.left if one.blob in by_blob]
        last = max((by_blob[one.blob][0] for one in run.left), default=0.0)
        planned = {one.blob for one in run.left}
        is_old = all(seconds >= last or blob in planned for blob, (seconds, _) in by_blob.items())
        if not run.left or not is_old:
            run.left = next_run([self._wanted(one) for one in needed], _disk(run), run.head)
        return by_blob[run.left[0].blob]

    def seconds_left(self, tier: str) -> float:
        """How long the rest of the run of *tier* will take."""
        run = self._runs[tier]
        times = [at for _, at in finish_seconds(run.left, _disk(run), run.head)]
        return times[-1] if times else 0.0

    def begun(self, source: Place) -> None:
        """*source* is being read."""
        run = self._runs.setdefault(source.tier, _Run())
        run.left = [one for one in run.left if one.blob != source.blob]
        run.head = self._positions.get(source.file, 0) + source.num_bytes

    def ended(self, source: Place, seconds: float) -> None:
        """*source* was read in so long."""
        run = self._runs.setdefault(source.tier, _Run())
        speed = source.num_bytes / max(seconds, 1e-6)
        run.bytes_per_second += WEIGHT * (speed - run.bytes_per_second)

    def give_up(self, tier: str) -> None:
        """The run of *tier* cannot go on: there is no room for what comes next in it."""
        self._runs[tier].left = []

    def _wanted(self, needed: Needed) -> Wanted:
        seconds, source = needed
        place = self._positions.get(source.file, 0)
        return Wanted(source.blob, seconds, source.num_bytes, place)


def _disk(run: _Run) -> Disk:
    return Disk(run.bytes_per_second, SEEK_SECONDS)


def _positions(tier: Tier, files: Sequence[str]) -> dict[str, int]:
    """Where each of *files* begins; 0 for what cannot be looked at: reading it will say why."""
    return {file: _position(tier, file) for file in files}


def _position(tier: Tier, file: str) -> int:
    try:
        with tier.read(tier.blob_name(file)) as reader:
            descriptor = reader.fileno()
            return 0 if descriptor is None else disk_position(descriptor)
    except (ForebayError, OSError):
        return 0
