"""Keyed permutations of [0, n) in O(1) of memory, forwards and backwards.

The generalised Feistel network on Z_a x Z_b with a·b barely above n, and cycle walking for the few
values in between (J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002,
methods 2 and 3; M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom
functions", 1988). It shuffles, it is no cipher: the round function is a fast mixer.
Byte-exact definition: ``docs/formats/order.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from forebay_wire.errors import InvalidRequest

Numbers: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]
_Word: TypeAlias = np.uint64 | NDArray[np.uint64]
"""The same for all values, or one for each."""

ORDER_KEY: Final = blake3(b"forebay order, domain key, version 1").digest()
MAX_SAMPLES: Final = 1 << 62
"""Positions fit 64 bits, and each half of a position fits 32."""

NUM_ROUNDS: Final = 8
_MIX_FIRST: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_SECOND: Final = np.uint64(0xD6E8FEB86659FD93)
_HALF: Final = np.uint64(32)

_TWEAK_STEPS: Final = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_TWEAK_LAST: Final = np.uint64(31)


def derive_key(purpose: str, *parts: str | int) -> bytes:
    """32 bytes that depend on *purpose* and every one of *parts*, and on nothing else."""
    text = json.dumps([purpose, *parts], separators=(",", ":"), ensure_ascii=True)
    return blake3(text.encode(), key=ORDER_KEY).digest()


def permute(key: bytes, n: int, positions: Numbers) -> Numbers:
    """Where the permutation of [0, *n*) named by *key* (32 bytes) sends each of *positions*.

    Costs O(len(positions)) time and memory, whatever *n* is. Raises :class:`InvalidRequest` for a
    position outside [0, *n*).
    """
    if _is_checked_empty(n, positions):
        return np.empty(0, dtype=np.int64)
    halves = _halves(n)
    values = _encipher(_round_keys(key), halves, positions.astype(np.uint64))
    outside = np.flatnonzero(values >= np.uint64(n))
    while len(outside):  # cycle walking: less than sqrt(n) of all values are outside
        walked = _encipher(_round_keys(key), halves, values[outside])
        values[outside] = walked
        outside = outside[walked >= np.uint64(n)]
    return values.astype(np.int64)


def unpermute(key: bytes, n: int, values: Numbers) -> Numbers:
    """What :func:`permute` sends to each of *values*: its inverse, at the same cost."""
    if _is_checked_empty(n, values):
        return np.empty(0, dtype=np.int64)
    halves = _halves(n)
    found = _decipher(_round_keys(key), halves, values.astype(np.uint64))
    outside = np.flatnonzero(found >= np.uint64(n))
    while len(outside):
        walked = _decipher(_round_keys(key), halves, found[outside])
        found[outside] = walked
        outside = outside[walked >= np.uint64(n)]
    return found.astype(np.int64)


def permute_each(key: bytes, tweaks: Numbers, sizes: Numbers, positions: Numbers) -> Numbers:
    """:func:`permute` of each position by a permutation of its own: that of [0, its size) which
    *key* and its tweak (at least 0) name. All at the cost of one call."""
    if len(positions) == 0:
        return np.empty(0, dtype=np.int64)
    limits = sizes.astype(np.uint64)
    tweak = _mix_tweaks(tweaks.astype(np.uint64))
    left = _ceil_roots(sizes)
    halves = left.astype(np.uint64), (-(-sizes // left)).astype(np.uint64)
    round_keys = _round_keys(key)
    tweaked: list[_Word] = [round_key ^ tweak for round_key in round_keys]
    values = _encipher(tweaked, halves, positions.astype(np.uint64))
    outside = np.flatnonzero(values >= limits)
    while len(outside):
        tweaked = [round_key ^ tweak[outside] for round_key in round_keys]
        some = halves[0][outside], halves[1][outside]
        walked = _encipher(tweaked, some, values[outside])
        values[outside] = walked
        outside = outside[walked >= limits[outside]]
    return values.astype(np.int64)


def _is_checked_empty(n: int, positions: Numbers) -> bool:
    if not 0 <= n <= MAX_SAMPLES:
        raise InvalidRequest(f"an order of {n} samples; allowed: 0 to {MAX_SAMPLES}")
    if len(positions) == 0:
        return True
    if int(positions.min()) < 0 or int(positions.max()) >= n:
        raise InvalidRequest(
            f"positions {positions.min()} to {positions.max()} are outside [0, {n})"
        )
    return False


def _round_keys(key: bytes) -> Sequence[_Word]:
    return list(np.frombuffer(blake3(key).digest(length=8 * NUM_ROUNDS), dtype="<u8"))


def _halves(n: int) -> tuple[np.uint64, np.uint64]:
    """a = ceil(sqrt(n)), b = ceil(n / a)."""
    num_left = math.isqrt(n - 1) + 1
    return np.uint64(num_left), np.uint64(-(-n // num_left))


def _ceil_roots(sizes: Numbers) -> Numbers:
    """The first of :func:`_halves` of each size."""
    below = sizes - 1
    roots = np.sqrt(below.astype(np.float64)).astype(np.int64)  # at most one off
    roots -= roots * roots > below
    roots += (roots + 1) * (roots + 1) <= below
    return roots + 1


def _mix_tweaks(tweaks: _Words) -> _Words:
    """Neighbouring tweaks become words that have nothing in common."""
    for shift, factor in _TWEAK_STEPS:
        tweaks = (tweaks ^ (tweaks >> shift)) * factor
    return tweaks ^ (tweaks >> _TWEAK_LAST)


def _encipher(round_keys: Sequence[_Word], sizes: tuple[_Word, _Word], values: _Words) -> _Words:
    """One pass of the network over Z_a x Z_b."""
    halves = _split(values, sizes[1])
    scratch = np.empty_like(values)
    for index, round_key in enumerate(round_keys):
        target, source, size = halves[index % 2], halves[1 - index % 2], sizes[index % 2]
        _mix(source, round_key, size, scratch)
        np.add(target, scratch, out=target)
        # Less *size* where that is not negative, which in whole numbers without a sign is huge: a
        # condition for each of them would cost four times as much, since nobody can predict it.
        np.subtract(target, size, out=scratch)
        np.minimum(target, scratch, out=target)
    return halves[0] * sizes[1] + halves[1]


def _decipher(round_keys: Sequence[_Word], sizes: tuple[_Word, _Word], values: _Words) -> _Words:
    """The inverse of :func:`_encipher`: the rounds backwards."""
    halves = _split(values, sizes[1])
    scratch = np.empty_like(values)
    for index in range(len(round_keys) - 1, -1, -1):
        target, source, size = halves[index % 2], halves[1 - index % 2], sizes[index % 2]
        _mix(source, round_keys[index], size, scratch)
        np.subtract(target, scratch, out=target)
        np.add(target, size, out=scratch)
        np.minimum(target, scratch, out=target)
    return halves[0] * sizes[1] + halves[1]


def _split(values: _Words, size: _Word) -> tuple[_Words, _Words]:
    """Quotient and rest: a multiplication is cheaper than a second division."""
    quotient = values // size
    return quotient, values - quotient * size


def _mix(source: _Words, round_key: _Word, size: _Word, out: _Words) -> None:
    """The round function, into *out*: from [0, 2^32) to [0, *size*)."""
    np.bitwise_xor(source, round_key, out=out)
    np.multiply(out, _MIX_FIRST, out=out)
    np.bitwise_xor(out, out >> _HALF, out=out)
    np.multiply(out, _MIX_SECOND, out=out)
    # The upper 32 bits, scaled down to [0, size) by a multiplication instead of a division.
    np.right_shift(out, _HALF, out=out)
    np.multiply(out, size, out=out)
    np.right_shift(out, _HALF, out=out)
