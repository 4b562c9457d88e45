"""Which versions an epoch reads, as numbers: in batches, and in memory that processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

_SERIAL, _EPOCH, _IS_KNOWN, _IDS = range(4)
_ID_BYTES: Final = 32
NUMBERS_EACH: Final = 2 * _ID_BYTES // 8
"""Of a version and its selection."""


class Begun:
    """What one side tells the other of an epoch. Pickled to a worker it stays shared."""

    def __init__(self, num_datasets: int) -> None:
        self._shared = torch.zeros(_IDS + num_datasets * NUMBERS_EACH, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._seen = 0

    def tell(self, epoch: int, identities: Sequence[str]) -> None:
        """*epoch* is of these versions; of none: it begins anew, on what is decided then."""
        if identities:
            self._shared[_IDS:] = torch.tensor(as_numbers(identities))
        self._shared[_IS_KNOWN] = len(identities)
        self._shared[_EPOCH] = epoch
        self._shared[_SERIAL] += 1
        self._seen = int(self._shared[_SERIAL])

    def news(self) -> tuple[int, list[str]] | None:
        """Epoch and versions, if they were told since this process looked last."""
        serial = int(self._shared[_SERIAL])
        if serial == self._seen:
            return None
        self._seen = serial
        return self.last

    @property
    def last(self) -> tuple[int, list[str]]:
        """Epoch and versions that were told last."""
        is_known = bool(self._shared[_IS_KNOWN])
        found = identities_of(self._shared[_IDS:].tolist()) if is_known else []
        return int(self._shared[_EPOCH]), found


def as_numbers(identities: Sequence[str]) -> list[int]:
    """Eight 64-bit numbers for each: its version's id and its selection's (zeros: none)."""
    data = b""
    for identity in identities:
        for name in identity.split("/"):
            data += bytes.fromhex(name).ljust(_ID_BYTES, b"\0")
    return [
        int.from_bytes(data[start : start + 8], "little", signed=True)
        for start in range(0, len(data), 8)
    ]


def identities_of(numbers: Sequence[int]) -> list[str]:
    """What :func:`as_numbers` was given."""
    data = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
    names = [data[start : start + _ID_BYTES].hex() for start in range(0, len(data), _ID_BYTES)]
    names = ["" if set(name) == {"0"} else name for name in names]
    return ["/".join(pair) for pair in zip(names[::2], names[1::2], strict=True)]
