"""The virtual order of samples: which sample stands where, and who reads it, from any position.

An order is a pure function of (dataset version, selection, shuffle kind, seed, epoch): nothing of
the epoch is ever stored, so starting at a position of 10^10 samples costs what starting at 0 costs.
Global batch k is the positions [k·B, (k+1)·B) of it; ranks and workers only cut that.
Byte-exact definition: ``docs/formats/order.md``.

The shuffle is a keyed permutation of [0, n): the generalised Feistel network on Z_a x Z_b with
a·b barely above n, and cycle walking for the few values in between (J. Black, P. Rogaway, "Ciphers
with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3; M. Luby, C. Rackoff, "How to
construct pseudorandom permutations from pseudorandom functions", 1988). It shuffles, it is no
cipher: the round function is a fast mixer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy

Shuffle = Literal["none", "full"]
LastBatch = Literal["keep", "pad", "drop"]

ORDER_KEY: Final = blake3(b"forebay order, domain key, version 1").digest()
STATE_FORMAT: Final = 1
MAX_SAMPLES: Final = 1 << 62
"""Positions fit 64 bits, and each half of a position fits 32."""

NUM_ROUNDS: Final = 8
_MIX_FIRST: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_SECOND: Final = np.uint64(0xD6E8FEB86659FD93)
_HALF: Final = np.uint64(32)


def derive_key(purpose: str, *parts: str | int) -> bytes:
    """32 bytes that depend on *purpose* and every one of *parts*, and on nothing else."""
    text = json.dumps([purpose, *parts], separators=(",", ":"), ensure_ascii=True)
    return blake3(text.encode(), key=ORDER_KEY).digest()


def permute(key: bytes, n: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the permutation of [0, *n*) named by *key* (32 bytes) sends each of *positions*.

    Costs O(len(positions)) time and memory, whatever *n* is. Raises :class:`InvalidRequest` for a
    position outside [0, *n*).
    """
    if not 0 <= n <= MAX_SAMPLES:
        raise InvalidRequest(f"an order of {n} samples; allowed: 0 to {MAX_SAMPLES}")
    if len(positions) == 0:
        return np.empty(0, dtype=np.int64)
    if int(positions.min()) < 0 or int(positions.max()) >= n:
        raise InvalidRequest(
            f"positions {positions.min()} to {positions.max()} are outside [0, {n})"
        )
    round_keys = np.frombuffer(blake3(key).digest(length=8 * NUM_ROUNDS), dtype="<u8")
    values = _encipher(round_keys, n, positions.astype(np.uint64))
    outside = np.flatnonzero(values >= np.uint64(n))
    while len(outside):  # cycle walking: less than sqrt(n) of all values are outside
        walked = _encipher(round_keys, n, values[outside])
        values[outside] = walked
        outside = outside[walked >= np.uint64(n)]
    return values.astype(np.int64)


def _encipher(
    round_keys: NDArray[np.uint64], n: int, values: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """One pass of the network over Z_a x Z_b, a = ceil(sqrt(n)), b = ceil(n / a)."""
    num_left = math.isqrt(n - 1) + 1
    num_right = -(-n // num_left)
    sizes = (np.uint64(num_left), np.uint64(num_right))
    left, right = np.divmod(values, sizes[1])
    halves = (left, right)
    scratch = np.empty_like(values)
    for index, round_key in enumerate(round_keys):
        target, source, size = halves[index % 2], halves[1 - index % 2], sizes[index % 2]
        np.bitwise_xor(source, round_key, out=scratch)
        np.multiply(scratch, _MIX_FIRST, out=scratch)
        np.bitwise_xor(scratch, scratch >> _HALF, out=scratch)
        np.multiply(scratch, _MIX_SECOND, out=scratch)
        # The upper 32 bits, scaled down to [0, size) by a multiplication instead of a division.
        np.right_shift(scratch, _HALF, out=scratch)
        np.multiply(scratch, size, out=scratch)
        np.right_shift(scratch, _HALF, out=scratch)
        np.add(target, scratch, out=target)
        np.subtract(target, size, out=target, where=target >= size)
    return left * sizes[1] + right


@dataclass(frozen=True)
class Order:
    """The order of one epoch. Thread-safe, cheap to make."""

    num_samples: int
    shuffle: Shuffle
    seed: int
    epoch: int
    identity: str
    """Manifest id of the dataset version, and of the selection if there is one."""

    def __post_init__(self) -> None:
        check_shuffle(self.shuffle)

    @lazy
    def _key(self) -> bytes:
        return derive_key("epoch", self.identity, self.seed, self.epoch)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples (indices into the selection) that stand at *positions*."""
        if self.shuffle == "none":
            return positions
        return permute(self._key, self.num_samples, positions)

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples that stand at the positions [start, stop)."""
        return self.at(np.arange(start, stop, dtype=np.int64))


def check_shuffle(shuffle: str) -> Shuffle:
    """*shuffle* unchanged if it is a kind of shuffle."""
    if shuffle not in get_args(Shuffle):
        raise InvalidRequest(f'shuffle={shuffle!r} is unknown: use "none" or "full"')
    return shuffle  # type: ignore[return-value]


def check_last_batch(last_batch: str) -> LastBatch:
    """*last_batch* unchanged if it is a way to treat the last batch."""
    if last_batch not in get_args(LastBatch):
        raise InvalidRequest(f'last_batch={last_batch!r} is unknown: use "keep", "pad" or "drop"')
    return last_batch  # type: ignore[return-value]


@dataclass(frozen=True)
class Part:
    """What one rank reads of one global batch: positions [start, stop), then padding."""

    start: int
    stop: int
    num_padding: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start + self.num_padding

    def positions(self, num_samples: int) -> NDArray[np.int64]:
        """All positions; padding repeats what follows, after the end from the start."""
        end = self.stop + self.num_padding
        return np.arange(self.start, end, dtype=np.int64) % max(num_samples, 1)

    def mask(self) -> NDArray[np.bool_]:
        """True for samples, False for padding."""
        return np.arange(self.num_rows) < self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """How an epoch is cut into global batches, from *position* on, and these over the ranks.

    Steps count from *position*: after a change of the global batch size to B' at position p, the
    batches are [p + j·B', p + (j+1)·B').
    """

    num_samples: int
    global_batch_size: int
    last_batch: LastBatch = "keep"
    position: int = 0

    def __post_init__(self) -> None:
        check_last_batch(self.last_batch)
        if self.global_batch_size < 1:
            raise InvalidRequest(f"a global batch of {self.global_batch_size} samples: at least 1")
        if not 0 <= self.position <= self.num_samples:
            raise InvalidRequest(
                f"position {self.position} is outside an epoch of {self.num_samples} samples"
            )

    @property
    def num_steps(self) -> int:
        """Steps from *position* to the end of the epoch: the same on all ranks."""
        rest = self.num_samples - self.position
        full, short = divmod(rest, self.global_batch_size)
        return full if self.last_batch == "drop" else full + (short > 0)

    def bounds(self, step: int) -> tuple[int, int]:
        """The positions [start, stop) of the global batch of *step*."""
        if not 0 <= step < self.num_steps:
            raise InvalidRequest(f"step {step} is outside [0, {self.num_steps})")
        start = self.position + step * self.global_batch_size
        return start, min(start + self.global_batch_size, self.num_samples)

    def part(self, step: int, rank: int, num_ranks: int) -> Part:
        """The part of *rank*: contiguous, sizes differ by at most one, larger ones first.

        With ``pad`` all parts of all steps have the same number of rows; with ``keep`` the parts of
        a short last batch may be empty.
        """
        start, stop = self.bounds(step)
        size, larger = divmod(stop - start, num_ranks)
        first = start + rank * size + min(rank, larger)
        last = first + size + (rank < larger)
        padding = 0
        if self.last_batch == "pad":
            padding = -(-self.global_batch_size // num_ranks) - (last - first)
        return Part(first, last, padding)


def worker_steps(num_steps: int, worker: int, num_workers: int) -> range:
    """The steps of one worker of a rank: whole batches, in turn, from the resumed step on."""
    return range(worker, num_steps, num_workers)


def split_rows(
    dataset_manifest: str, num_rows: int, seed: int, positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows of the version that stand at *positions* of the permutation that its splits share."""
    return permute(derive_key("split", dataset_manifest, seed), num_rows, positions)


@dataclass(frozen=True)
class OrderState:
    """Where reading stands: a few integers, whatever the ranks, workers and batch sizes."""

    epoch: int
    position: int
    """Samples of the epoch that were consumed, by all ranks together."""
    seed: int
    shuffle: Shuffle
    dataset: str
    version: int
    manifest: str
    """Manifest id of the dataset version."""
    selection: str
    """Manifest id of the selection, empty for the whole version."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields and ``format``."""
        return {"format": STATE_FORMAT, **self.__dict__}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OrderState:
        """The inverse of :meth:`to_json`; :class:`InvalidRequest` for anything else."""
        if value.get("format") != STATE_FORMAT:
            raise InvalidRequest(
                f"loader state of format {value.get('format')!r}; this build reads {STATE_FORMAT}: "
                "pass what state_dict() returned, or upgrade Forebay"
            )
        try:
            state = cls(**{name: value[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise InvalidRequest(f"loader state lacks {error}: it is not complete") from error
        if any(type(getattr(state, name)) is not int for name in ("epoch", "position", "seed")):
            raise InvalidRequest("loader state holds something else than integers")
        if state.epoch < 0 or state.position < 0:
            raise InvalidRequest("loader state stands before the first sample")
        check_shuffle(state.shuffle)
        return state

    def check_same_samples(self, other: OrderState) -> None:
        """Raise unless *self* (a saved state) and *other* (a loader's own) mean the same order."""
        if (self.dataset, self.manifest) != (other.dataset, other.manifest):
            raise InvalidRequest(
                f"the state was taken on dataset {self.dataset!r} version {self.version} "
                f"(manifest {self.manifest[:12]}…), this loader reads {other.dataset!r} version "
                f"{other.version}: open client.dataset({self.dataset!r}, version={self.version})"
            )
        if self.selection != other.selection:
            raise InvalidRequest(
                f"the state was taken on another split of {self.dataset!r} version {self.version} "
                f"(selection {self.selection[:12] or 'none'}, here "
                f"{other.selection[:12] or 'none'}): open the same split"
            )
        if (self.shuffle, self.seed) != (other.shuffle, other.seed):
            raise InvalidRequest(
                f"the state was taken with shuffle={self.shuffle!r}, seed={self.seed}, this loader "
                f"has shuffle={other.shuffle!r}, seed={other.seed}: make it with the same ones"
            )
