"""Which rows are kept, and which split each belongs to: drawn from a seed, the same every time."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from forebay_trainer.preparation import GROUP, SPLIT
from forebay_wire.errors import InvalidRequest


class Splitter:
    """Takes the chunks in their order. Not thread-safe."""

    def __init__(self, shares: Mapping[str, float], seed: int) -> None:
        total = sum(shares.values())
        if not shares or min(shares.values()) <= 0 or abs(total - 1) > 1e-9:
            raise InvalidRequest(
                f"splits: shares above 0 that add up to 1 are needed, not {dict(shares)}"
            )
        self._names = list(shares)
        self._ends = np.array(list(itertools.accumulate(shares.values())))
        self._random = np.random.default_rng(seed)
        self._seed = seed

    def split(self, rows: pa.Table) -> pa.Table:
        """The rows with a column ``split``, which stays as it is where they have one."""
        if SPLIT in rows.column_names:
            return rows
        if GROUP in rows.column_names:
            encoded = rows[GROUP].combine_chunks().dictionary_encode()
            drawn = np.array([self._of_group(each) for each in encoded.dictionary.to_pylist()])
            numbers = drawn[encoded.indices.to_numpy()] if len(rows) else drawn
        else:
            numbers = self._random.random(rows.num_rows)
        places = np.searchsorted(self._ends[:-1], numbers, side="right")
        return rows.append_column(
            SPLIT, pa.array([self._names[place] for place in places], pa.string())
        )

    def _of_group(self, group: Any) -> float:
        digest = hashlib.blake2b(f"{self._seed} {group}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64


class Duplicates:
    """Drops rows whose value of a column came before, in any chunk."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._seen: set[bytes] = set()
        self.num_dropped = 0

    def add(self, values: Iterable[Any]) -> None:
        """These came before."""
        for value in values:
            self._is_new(value)

    def drop(self, rows: pa.Table) -> pa.Table:
        if self._column not in rows.column_names:
            raise InvalidRequest(
                f"unique: the rows have no column {self._column!r}, only {rows.column_names}"
            )
        kept = [self._is_new(value) for value in rows[self._column].to_pylist()]
        self.num_dropped += len(kept) - sum(kept)
        return rows.filter(pa.array(kept, pa.bool_()))

    def _is_new(self, value: Any) -> bool:
        # A digest in place of the value: a corpus of long texts would fill the memory.
        digest = hashlib.blake2b(repr(value).encode(), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True
