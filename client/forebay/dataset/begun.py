"""Which versions a restored epoch goes on with, told to workers that live already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

_SERIAL, _EPOCH, _IDS = range(3)
_ID_BYTES: Final = 32
_NUMBERS_EACH: Final = 2 * _ID_BYTES // 8
"""Of a version and its selection."""


class Begun:
    """Shared memory, written by the process that restored a state. Pickled to a worker it stays
    shared."""

    def __init__(self, num_datasets: int) -> None:
        self._num_datasets = num_datasets
        self._shared = torch.zeros(_IDS + num_datasets * _NUMBERS_EACH, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._seen = 0

    def tell(self, epoch: int, identities: Sequence[str]) -> None:
        """Whoever looks from now on goes on with *epoch* of these versions."""
        data = b""
        for identity in identities:
            for name in identity.split("/"):
                data += bytes.fromhex(name).ljust(_ID_BYTES, b"\0")
        self._shared[_IDS:] = torch.frombuffer(bytearray(data), dtype=torch.int64)
        self._shared[_EPOCH] = epoch
        self._shared[_SERIAL] += 1
        self._seen = int(self._shared[_SERIAL])

    def news(self) -> tuple[int, list[str]] | None:
        """Epoch and versions, if they were told since this process looked last."""
        serial = int(self._shared[_SERIAL])
        if serial == self._seen:
            return None
        self._seen = serial
        data = self._shared[_IDS:].numpy().tobytes()
        names = [data[start : start + _ID_BYTES].hex() for start in range(0, len(data), _ID_BYTES)]
        names = ["" if set(name) == {"0"} else name for name in names]
        pairs = zip(names[::2], names[1::2], strict=True)
        return int(self._shared[_EPOCH]), ["/".join(pair) for pair in pairs]
