"""A few bytes of tensors, compared with what was staged: what a wrong copy would not have."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from forebay.checkpoint.objects import byte_view
from forebay.checkpoint.snapshot import Source
from forebay_wire.errors import IntegrityError

SAMPLE_BYTES: Final = 4096
NUM_SAMPLES: Final = 4
"""Of each tensor: its first bytes, its last, and some between."""

CHECKED_SOURCES: Final = 16
"""Of one pack, after its copy: the largest, and as many others by chance."""


def check_staged(sources: Sequence[Source], staged: memoryview) -> None:
    """:class:`IntegrityError` naming a source that the pack *staged* does not hold as it is."""
    by_size = sorted(sources, key=lambda source: -source.num_bytes)
    largest, others = by_size[: CHECKED_SOURCES // 2], by_size[CHECKED_SOURCES // 2 :]
    for source in [*largest, *random.sample(others, min(len(others), CHECKED_SOURCES // 2))]:
        if not Samples.of(source).are_in(staged, source):
            raise IntegrityError(
                f"{source.name or 'an object'}: the bytes that were copied differ from those it "
                "has; does something else write to it while it is saved, or is it a tensor "
                "subclass that keeps its values elsewhere? Nothing was saved"
            )


@dataclass(frozen=True)
class Samples:
    """Some bytes of a source, as they lie in a pack."""

    offsets: tuple[int, ...]
    data: tuple[bytes, ...]

    @classmethod
    def of(cls, source: Source) -> Samples:
        """Of its first bytes, its last and some between, as they are stored: row by row."""
        if not isinstance(source.data, torch.Tensor):
            return cls((), ())
        if not is_run(source.data):
            return cls._of_strided(source.data.detach())
        last = max(0, source.num_bytes - SAMPLE_BYTES)
        between = (random.randrange(0, last + 1, 64) for _ in range(NUM_SAMPLES - 2))
        offsets = (0, *between, last)
        raw = byte_view(source.data.detach())
        data = tuple(_read(raw[at : at + SAMPLE_BYTES]) for at in offsets)
        return cls(offsets, data)

    @classmethod
    def _of_strided(cls, tensor: torch.Tensor) -> Samples:
        """The same of one whose elements do not lie in memory in the order of its indices."""
        size = tensor.dtype.itemsize
        count = min(tensor.numel(), SAMPLE_BYTES // size)
        last = tensor.numel() - count
        firsts = (0, *(random.randint(0, last) for _ in range(NUM_SAMPLES - 2)), last)
        data = []
        for first in firsts:
            places = torch.arange(first, first + count, device=tensor.device)
            picked = tensor[torch.unravel_index(places, tensor.shape)]
            data.append(_read(byte_view(picked.resolve_conj().resolve_neg().contiguous())))
        return cls(tuple(first * size for first in firsts), tuple(data))

    def are_in(self, staged: memoryview, source: Source) -> bool:
        """Whether the pack *staged* holds these bytes of *source*."""
        start = source.offset
        return all(
            staged[start + at : start + at + len(data)] == data
            for at, data in zip(self.offsets, self.data, strict=True)
        )


def _read(raw: torch.Tensor) -> bytes:
    """The bytes of *raw*. Not by numpy(): that leaves a storage unable to be resized for ever."""
    here = raw.cpu()
    return ctypes.string_at(here.data_ptr(), here.numel())


def is_run(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
