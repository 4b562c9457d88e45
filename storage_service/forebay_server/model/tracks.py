"""Where the columns that a loader reads lie: one row of shards for each place, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forebay_wire.blocks import starts_of
from forebay_wire.manifest import DatasetManifest

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Track:
    """Shards that have one row for each row of the version."""

    starts: Numbers
    """The first row of each of them and, last, the number of rows."""
    numbers: Numbers
    """Which of the version's shards each of them is, those of layers counted on."""

    def at(self, rows: Numbers) -> Numbers:
        """The numbers of the shards that hold *rows*."""
        return self.numbers[np.searchsorted(self.starts, rows, side="right") - 1]


@dataclass(frozen=True)
class Tracks:
    """What a loader of some columns reads of a version."""

    reads_base: bool
    """Whether some of the columns lie with the version's own shards."""
    beside: tuple[Track, ...]
    """Of the layers that it reads."""

    def shards(self, num_base_shards: int, counts: Sequence[int] | None) -> list[int]:
        """The numbers of the shards that are read, of *counts* samples in each of the version's
        own (None: all)."""
        own = range(num_base_shards) if self.reads_base else ()
        found = {number for number in own if counts is None or counts[number]}
        for track in self.beside:
            found.update(track.numbers.tolist())
        return sorted(found)


def tracks_of(version: DatasetManifest, columns: Iterable[str]) -> Tracks:
    """Where *columns* lie; without any: all that the version has."""
    wanted = list(columns)
    layers = version.layers_of(wanted) if wanted else [None, *range(len(version.layers))]
    firsts = np.cumsum([len(version.shards), *(len(one.shards) for one in version.layers)])
    tracks = []
    for layer in layers:
        if layer is None:
            continue
        found = version.column_shards(layer)
        own = firsts[layer] + np.arange(found.num_own, dtype=np.int64)
        rest = np.arange(version.layers[layer].num_base_shards, len(version.shards), dtype=np.int64)
        rows = [shard.num_rows for shard in found.shards]
        tracks.append(Track(starts_of(rows), np.concatenate([own, rest])))
    return Tracks(None in layers, tuple(tracks))
