"""What is remembered of a part of a tensor without its bytes: counts, norm, extremes, a sketch.

The daemon computes them, clients compare them; see ``docs/formats/fingerprint.md``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from forebay_wire.errors import IntegrityError
from forebay_wire.segments import xxh3

NUM_BUCKETS: Final = 64
"""Numbers of a sketch."""
RELATIVE_ERROR: Final = math.sqrt(2 / NUM_BUCKETS) / 2
"""Standard deviation, relative and at most, of the norm of a difference by sketches: 8.8 %."""

MAGIC: Final = b"FBFP"
VERSION: Final = 1
HEAD: Final = struct.Struct("<4sHHI")
"""Magic, version, zero, number of records."""
RECORD: Final = struct.Struct("<16s16sQQQdddI")
"""``key``, ``digest``, ``num_values``, ``num_nan``, ``num_inf``, ``norm``, ``min``, ``max``, flags;
behind it the sketch, if the flags say so."""
CHECK: Final = struct.Struct("<Q")
"""XXH3-64 of all before it."""
_HAS_FIGURES: Final = 1
_HAS_SKETCH: Final = 2


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Figures of one part of a tensor, or (:func:`combine`) of all its parts.

    A complex number counts as two values, so does a byte of two 4-bit numbers.
    """

    key: bytes
    """16 bytes: of the segments that the part lies in, and where; equal ones, equal parts."""
    digest: bytes
    """16 bytes of BLAKE3 over the part's bytes."""
    num_values: int
    num_nan: int
    num_inf: int
    norm: float
    """Euclidean, of the finite values."""
    min: float
    """Of the finite values, rounded to float64; NaN if there is none. So is ``max``."""
    max: float
    has_figures: bool = True
    """False: of a dtype whose values are not known here; only ``key`` and ``digest`` count."""
    sketch: NDArray[np.float32] | None = None
    """``NUM_BUCKETS`` sums of the finite values under random signs, divided by ``norm``. None of
    parts of at most one value, which ``min`` says all of, and of values beyond 1e290."""

    def encode(self) -> bytes:
        flags = (_HAS_FIGURES if self.has_figures else 0) | (
            _HAS_SKETCH if self.sketch is not None else 0
        )
        fixed = RECORD.pack(
            self.key,
            self.digest,
            self.num_values,
            self.num_nan,
            self.num_inf,
            self.norm,
            self.min,
            self.max,
            flags,
        )
        return fixed if self.sketch is None else fixed + self.sketch.astype("<f4").tobytes()


def encode_fingerprints(found: Sequence[Fingerprint]) -> bytes:
    """One pack's fingerprints, in the order of its description's tensors."""
    body = HEAD.pack(MAGIC, VERSION, 0, len(found)) + b"".join(one.encode() for one in found)
    return body + CHECK.pack(xxh3(body))


def decode_fingerprints(data: bytes, where: str) -> list[Fingerprint]:
    """The inverse of :func:`encode_fingerprints`; :class:`IntegrityError` naming *where*."""
    if len(data) < HEAD.size + CHECK.size:
        raise IntegrityError(f"fingerprints are cut short ({where})")
    body = data[: -CHECK.size]
    magic, version, _, count = HEAD.unpack_from(body)
    if magic != MAGIC or version != VERSION:
        raise IntegrityError(f"no fingerprints of version {VERSION} ({where})")
    if CHECK.unpack_from(data, len(body))[0] != xxh3(body):
        raise IntegrityError(f"fingerprints do not match their digest ({where})")
    found, at = [], HEAD.size
    try:
        for _ in range(count):
            key, digest, values, nan, inf, norm, least, most, flags = RECORD.unpack_from(body, at)
            at += RECORD.size
            sketch = None
            if flags & _HAS_SKETCH:
                sketch = np.frombuffer(body, "<f4", NUM_BUCKETS, at)
                at += sketch.nbytes
            figures = (key, digest, values, nan, inf, norm, least, most)
            found.append(Fingerprint(*figures, bool(flags & _HAS_FIGURES), sketch))
    except (struct.error, ValueError) as error:
        raise IntegrityError(f"fingerprints are cut short ({where})") from error
    return found


@dataclass(frozen=True)
class Change:
    """How far one tensor is from another."""

    norm: float
    """Of the difference; infinite if NaN or infinities came or went."""
    relative: float
    """``norm`` over the norm of the first; infinite from zero to something."""
    is_exact: bool
    """False: an estimate, off by :data:`RELATIVE_ERROR` (one standard deviation)."""


UNCHANGED: Final = Change(0.0, 0.0, True)


def change(before: Sequence[Fingerprint], after: Sequence[Fingerprint]) -> Change | None:
    """How far *after* is from *before*: the parts of two tensors, of the same boxes in the same
    order. None where the sketches cannot tell.

    The norm of a difference is estimated by the norm of the difference of the sketches (see
    ``forebay_server/model/fingerprint.py``), part by part; equal digests are exactly no change.
    """
    pairs = list(zip(before, after, strict=True))
    changes = [_change(one, other) for one, other in pairs]
    if any(found is None for found in changes):
        return None
    known = [found for found in changes if found is not None]
    norm = math.hypot(*(found.norm for found in known))
    base = math.hypot(*(one.norm for one in before))
    return Change(norm, relative(norm, base), all(found.is_exact for found in known))


def relative(norm: float, base: float) -> float:
    """*norm* over *base*: 0 over 0 is 0."""
    if norm == 0:
        return 0.0
    return norm / base if base else math.inf


def _change(before: Fingerprint, after: Fingerprint) -> Change | None:
    if before.digest == after.digest and before.num_values == after.num_values:
        return UNCHANGED
    if not (before.has_figures and after.has_figures):
        return None
    if (before.num_nan, before.num_inf) != (after.num_nan, after.num_inf):
        return Change(math.inf, math.inf, True)
    finite = [one.num_values - one.num_nan - one.num_inf for one in (before, after)]
    if finite == [0, 0]:
        return UNCHANGED  # other NaNs, or infinities at other places: no finite value differs
    if before.num_values == after.num_values == 1:
        return Change(abs(after.min - before.min), 0.0, True)
    if before.sketch is None or after.sketch is None:
        return None
    difference = _scaled(after) - _scaled(before)
    return Change(float(np.linalg.norm(difference)), 0.0, False)


def _scaled(one: Fingerprint) -> NDArray[np.float64]:
    assert one.sketch is not None
    return one.sketch.astype(np.float64) * one.norm


def combine(parts: Iterable[Fingerprint]) -> Fingerprint:
    """The figures of a whole tensor from those of its parts; without digest and sketch.

    Parts that overlap count twice: each box once is the caller's business.
    """
    found = list(parts)
    if len(found) == 1:
        return found[0]
    smallest = [one.min for one in found if not math.isnan(one.min)]
    largest = [one.max for one in found if not math.isnan(one.max)]
    return Fingerprint(
        b"",
        b"",
        sum(one.num_values for one in found),
        sum(one.num_nan for one in found),
        sum(one.num_inf for one in found),
        math.hypot(*(one.norm for one in found)),
        min(smallest, default=math.nan),
        max(largest, default=math.nan),
        all(one.has_figures for one in found),
    )
