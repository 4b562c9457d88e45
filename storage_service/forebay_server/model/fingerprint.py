"""Fingerprints of tensors, computed piece by piece from their bytes: numpy, no torch. Pure.

The sketch is a linear map of the n values to :data:`NUM_BUCKETS` = m numbers: every value goes
into one bucket under a random sign (Charikar, Chen, Farach-Colton: "Finding frequent items in data
streams", ICALP 2002; as an estimator of norms: Thorup, Zhang: "Tabulation based 4-universal
hashing with applications to second moment estimation", SODA 2004). With independent signs and a
chance of about 1/m that two values share a bucket, the squared norm of the m numbers has the
squared norm of the values as its mean and a variance of at most 2/(m - 1) of that squared. Being
linear, the sketch of a difference is the difference of the sketches, so that ‖B - A‖ follows from
two of them: to 8.8 % (one standard deviation) with m = 64. Sketches are kept as float32, so what is
below a millionth of the norm or so drowns in rounding.

Signs: the bits of BLAKE3's output stream under :data:`SIGN_KEY`, the first value's first, low bits
of a byte first; 1 is minus. Buckets: the values are rows of 64, the rows groups of 64. Each row is
turned by another number of places, 0 to 63, so that two values of a row never meet, and others by a
chance of at most 1/63: the row that has the t-th smallest of its group's 64 numbers (32 bits,
little-endian, of the stream under :data:`BUCKET_KEY`; the earlier row first of equal ones) is
turned by t, its value c goes into bucket (c + t) % 64. That needs no sum in scattered places.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from forebay_wire.dtypes import Floats, Kind, kind_of
from forebay_wire.fingerprint import NUM_BUCKETS, Fingerprint
from forebay_wire.segments import SegmentTable

SIGN_KEY: Final = blake3(b"forebay fingerprint signs 1").digest()
BUCKET_KEY: Final = blake3(b"forebay fingerprint buckets 1").digest()

GROUP_VALUES: Final = NUM_BUCKETS * NUM_BUCKETS
PIECE_VALUES: Final = 16 * GROUP_VALUES
"""Values that are looked at together: what is in the processor's cache."""

_SAFE: Final = 1e140
"""Squares of what lies between this and its inverse are neither infinite nor zero."""
_LARGEST_SKETCHED: Final = 1e290


def extent_key(dtype: str, offset: int, num_bytes: int, table: SegmentTable) -> bytes:
    """The key of the part at *offset* of a blob: from the digests of its segments, its place in the
    first of them and its dtype. Equal keys mean equal bytes, so equal fingerprints."""
    segments = table.covering(offset, num_bytes)
    first = int(table.offsets[segments.start]) if len(segments) else offset
    hasher = blake3(f"{dtype} {offset - first} {num_bytes} ".encode())
    hasher.update(table.entries["blake3"][segments.start : segments.stop].tobytes())
    return hasher.digest(length=16)


class FingerprintBuilder:
    """Takes the bytes of one part, in order, in pieces of any length. Not thread-safe."""

    def __init__(self, key: bytes, dtype: str) -> None:
        self._key = key
        self._kind = kind_of(dtype)
        self._hasher = blake3()
        self._left = bytearray()
        self._num_values = self._num_nan = self._num_inf = 0
        self._norm = 0.0
        self._min, self._max = math.inf, -math.inf
        self._turned: NDArray[np.float64] | None = None

    def update(self, data: memoryview) -> None:
        """The part's next bytes; nothing of them is kept."""
        self._hasher.update(data)
        if self._kind is None:
            return
        unit = self._unit_bytes(self._kind)
        if self._left:
            missing = min(unit - len(self._left), len(data))
            self._left += data[:missing]
            data = data[missing:]
            if len(self._left) < unit:
                return
            whole, self._left = self._left, bytearray()
            self._look(self._kind, np.frombuffer(whole, np.uint8))
        body = len(data) - len(data) % unit
        step = unit * (PIECE_VALUES // GROUP_VALUES)
        raw = np.frombuffer(data[:body], np.uint8)
        for start in range(0, body, step):
            self._look(self._kind, raw[start : start + step])
        self._left += data[body:]

    def finish(self) -> Fingerprint:
        """After the last piece."""
        digest = self._hasher.digest(length=16)
        if self._kind is None:
            nan = math.nan
            return Fingerprint(self._key, digest, 0, 0, 0, 0.0, nan, nan, has_figures=False)
        if self._left:
            self._look(self._kind, np.frombuffer(bytes(self._left), np.uint8))
        has_finite = self._num_values > self._num_nan + self._num_inf
        return Fingerprint(
            self._key,
            digest,
            self._num_values,
            self._num_nan,
            self._num_inf,
            self._norm,
            self._min if has_finite else math.nan,
            self._max if has_finite else math.nan,
            sketch=self._sketch(),
        )

    def _sketch(self) -> NDArray[np.float32] | None:
        largest = max(abs(self._min), abs(self._max))
        if self._num_values <= 1 or (largest > _LARGEST_SKETCHED and self._norm):
            return None
        if self._turned is None:
            return np.zeros(NUM_BUCKETS, np.float32)
        bucket, turn = np.arange(NUM_BUCKETS), np.arange(NUM_BUCKETS)[:, None]
        buckets = self._turned[turn, (bucket - turn) % NUM_BUCKETS].sum(axis=0)
        found: NDArray[np.float32] = (buckets / (self._norm or 1.0)).astype(np.float32)
        return found

    @staticmethod
    def _unit_bytes(kind: Kind) -> int:
        """Pieces are whole groups."""
        return GROUP_VALUES * kind.item_bytes // kind.values_per_item

    def _look(self, kind: Kind, raw: NDArray[np.uint8]) -> None:
        """Whole groups of values, but for the last piece."""
        values = kind.decode(raw)
        finite = np.isfinite(values)
        num_finite = int(np.count_nonzero(finite))
        if num_finite != len(values):
            num_nan = int(np.count_nonzero(np.isnan(values)))
            self._num_nan += num_nan
            self._num_inf += len(values) - num_finite - num_nan
            values = np.where(finite, values, values.dtype.type(0))
        first = self._num_values
        self._num_values += len(values)
        if not num_finite:
            return
        # Zeros that stand for others are no extremes.
        looked = values if num_finite == len(finite) else values[finite]
        smallest, largest = float(looked.min()), float(looked.max())
        self._min, self._max = min(self._min, smallest), max(self._max, largest)
        self._norm = math.hypot(self._norm, _norm(values, max(-smallest, largest)))
        # One value alone has no sketch.
        if max(-smallest, largest) <= _LARGEST_SKETCHED and self._num_values > 1:
            turned = _turned(values, first)
            self._turned = turned if self._turned is None else self._turned + turned


def fingerprint(key: bytes, dtype: str, data: bytes | memoryview) -> Fingerprint:
    """Of a part whose bytes are at hand."""
    builder = FingerprintBuilder(key, dtype)
    builder.update(memoryview(data).cast("B"))
    return builder.finish()


def _norm(values: Floats, largest: float) -> float:
    """Euclidean, in float64, of finite *values* of at most this size; infinite beyond its range."""
    if largest == 0:
        return 0.0
    wide = values.astype(np.float64)
    if values.dtype == np.float32 or 1 / _SAFE < largest < _SAFE:
        return math.sqrt(float(np.square(wide, out=wide).sum()))
    exponent = math.frexp(largest)[1]
    wide = np.ldexp(wide, -exponent)
    root = math.sqrt(float(np.square(wide, out=wide).sum()))
    try:
        return math.ldexp(root, exponent)
    except OverflowError:
        return math.inf


def _turned(values: Floats, first: int) -> NDArray[np.float64]:
    """The sums of *values*, which are those from number *first* (of a group) on: 64 sums of those
    of their rows that are turned by none, by one, and so on."""
    num_groups = -(-len(values) // GROUP_VALUES)
    if missing := num_groups * GROUP_VALUES - len(values):
        values = np.concatenate([values, np.zeros(missing, values.dtype)])
    group = first // GROUP_VALUES
    bits = _stream(SIGN_KEY, group * GROUP_VALUES // 8, num_groups * GROUP_VALUES // 8)
    signed = np.take(_signs(values.dtype.str), bits, axis=0).reshape(-1)
    np.multiply(signed, values, out=signed)
    row_bytes = 4
    keys = _stream(
        BUCKET_KEY,
        group * NUM_BUCKETS * row_bytes,
        num_groups * NUM_BUCKETS * row_bytes,
    )
    rows = np.argsort(keys.view("<u4").reshape(num_groups, NUM_BUCKETS), axis=1, kind="stable")
    rows += np.arange(0, num_groups * NUM_BUCKETS, NUM_BUCKETS)[:, None]
    by_turn = np.take(signed.reshape(-1, NUM_BUCKETS), rows.reshape(-1), axis=0)
    found: NDArray[np.float64] = by_turn.reshape(num_groups, NUM_BUCKETS, NUM_BUCKETS).sum(
        axis=0, dtype=np.float64
    )
    return found


def _stream(key: bytes, start: int, num_bytes: int) -> NDArray[np.uint8]:
    """Bytes of the output stream under *key*."""
    return np.frombuffer(blake3(key=key).digest(length=num_bytes, seek=start), np.uint8)


@cache
def _signs(dtype: str) -> Floats:
    """Eight signs for each byte: 1.0 or -1.0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).astype(dtype)
