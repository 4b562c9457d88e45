"""How bytes may lie in a tier, and which way pays for a blob.

Names, numbers and the choice only; the codecs are in ``forebay_server.tier.codecs``. The numbers
are part of the formats in ``docs/formats/encoding.md`` and ``docs/formats/blob-extents.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

RAW: Final = "raw"
"""As they are: the only ones that can be mapped."""
LZ4: Final = "lz4"
SHUFFLE_LZ4: Final = "shuffle-lz4"
PIECES: Final = "pieces"
"""Not in a file of its own: an extent list says which pieces of which files make up the blob."""
AUTO: Final = "auto"
"""A setting, not an encoding: whatever pays most for the blob."""

CODES: Final[dict[str, int]] = {RAW: 0, LZ4: 1, SHUFFLE_LZ4: 2}
"""Encoding of a file to its number."""
NUMBERS: Final[dict[str, int]] = {**CODES, PIECES: 3}
"""The same of a replica."""
SETTINGS: Final = (AUTO, *CODES)
"""What a tier may be told."""

LARGEST_SHARE: Final = 15 / 16
"""A blob stays raw unless its samples shrink to this share or less: below that, decoding at every
fetch costs more than the room and the transfer that it saves."""


class Method(IntEnum):
    """What was done to one segment."""

    RAW = 0
    LZ4 = 1
    SHUFFLE_BYTES = 2
    """The first bytes of all elements, then the second ones, and so on; then LZ4."""
    SHUFFLE_BITS = 3
    """The same with bits."""


@dataclass(frozen=True)
class Way:
    """A method with the width of the elements that it shuffles, in bytes."""

    method: Method
    width: int = 1


RAW_WAY: Final = Way(Method.RAW)

_LZ4_WAYS: Final = (Way(Method.LZ4),)
_SHUFFLE_WAYS: Final = (
    *(Way(Method.SHUFFLE_BITS, width) for width in (1, 2, 4, 8)),
    *(Way(Method.SHUFFLE_BYTES, width) for width in (2, 4, 8)),
)

_WAYS: Final[dict[str, tuple[Way, ...]]] = {
    RAW: (),
    LZ4: _LZ4_WAYS,
    SHUFFLE_LZ4: _SHUFFLE_WAYS,
    AUTO: (*_LZ4_WAYS, *_SHUFFLE_WAYS),
}


def ways_to_try(setting: str) -> tuple[Way, ...]:
    """What a tier with *setting* may do to a blob, beside leaving it raw."""
    return _WAYS[setting]


def best_way(encoded_bytes: Mapping[Way, int]) -> Way:
    """That with the smallest result, of equal ones the first."""
    return min(encoded_bytes, key=lambda way: encoded_bytes[way])


def choose_ways(plain_bytes: int, samples: Sequence[Mapping[Way, int]]) -> tuple[Way, ...]:
    """The ways for a blob of whose *samples*, *plain_bytes* together, each became so many bytes in
    each way: those that are the best of some sample, or none if it does not pay.

    A pack has tensors of several types, and each wants a way of its own.
    """
    found = [sample for sample in samples if sample]
    best = [best_way(sample) for sample in found]
    encoded_bytes = sum(sample[way] for sample, way in zip(found, best, strict=True))
    if not found or encoded_bytes > plain_bytes * LARGEST_SHARE:
        return ()
    return tuple(dict.fromkeys(best))


def encoding_of(ways: Collection[Way]) -> str:
    """The encoding of a blob whose segments are treated in one of *ways* each."""
    if not ways:
        return RAW
    return LZ4 if all(way.method is Method.LZ4 for way in ways) else SHUFFLE_LZ4


def name_of(code: int) -> str | None:
    """The encoding with the number *code*, None if this version knows none."""
    return next((name for name, number in NUMBERS.items() if number == code), None)
