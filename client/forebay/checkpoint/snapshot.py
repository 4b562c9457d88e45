"""A rank's pack: which bytes of which tensors go where, and the one copy that brings them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from forebay.checkpoint.layout import Extent, Layout, padded, place
from forebay.checkpoint.manifest import Description, TensorEntry
from forebay.checkpoint.objects import EncodedObject, Path
from forebay_wire.limits import MIB

PARALLEL_BYTES: Final = 8 * MIB
"""From here on a copy is worth torch's threads: waking them costs milliseconds on a busy machine,
and one core copies this much in less."""


@dataclass(frozen=True)
class Part:
    """A tensor, or this rank's part of one, that goes into the pack."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    tensor: torch.Tensor
    """Plain; any device, any strides."""
    frozen: bool = False

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.dtype.itemsize

    @property
    def memory(self) -> tuple[object, ...]:
        """Equal for two names of one tensor (tied weights), which then is saved once."""
        tensor = self.tensor
        if not tensor.numel():
            return (self.name, self.offsets)
        where = (str(tensor.device), tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
        return (*where, tensor.dtype, tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True)
class Source:
    """Bytes with their place in the pack."""

    offset: int
    num_bytes: int
    data: torch.Tensor | memoryview


@dataclass(frozen=True)
class Pack:
    """A rank's pack before it is copied: nothing here holds a copy of the state."""

    layout: Layout
    sources: Sequence[Source]
    """In pack order."""
    description: bytes

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    def copy_into(self, target: memoryview, start: int, stop: int) -> None:
        """Write the pack's bytes [start, stop) to the start of *target*, padding as zeros.

        One copy straight from each tensor, without holding the GIL.
        """
        if start == stop:
            return
        view = torch.frombuffer(target, dtype=torch.uint8, count=stop - start)
        clean = start
        for source in self.sources:
            end = source.offset + source.num_bytes
            if end <= start or source.offset >= stop:
                continue
            first, last = max(source.offset, start), min(end, stop)
            if first > clean:
                view[clean - start : first - start].zero_()
            part = view[first - start : last - start]
            _copy(part, source, first - source.offset, last - source.offset)
            clean = last
        view[clean - start :].zero_()


def build_pack(
    parts: Sequence[Part],
    objects: Mapping[str, EncodedObject],
    structure: Mapping[str, Path],
) -> Pack:
    """Lay out *parts* and the bytes of *objects*, and describe them."""
    owners = _owners(parts)
    attachments = [
        (name, number, attachment)
        for name, encoded in objects.items()
        for number, attachment in enumerate(encoded.attachments)
    ]
    extents = [Extent((0, p.name, p.offsets), p.num_bytes, p.frozen) for p in owners.values()]
    extents += [Extent((1, name, number), a.data.nbytes) for name, number, a in attachments]
    layout = place(extents)
    for (_, _, attachment), offset in zip(attachments, layout.offsets[len(owners) :], strict=True):
        attachment.reference[0] = offset
    places = dict(zip(owners, layout.offsets, strict=False))
    sources = [
        Source(places[memory], part.num_bytes, part.tensor) for memory, part in owners.items()
    ] + [Source(a.reference[0], a.data.nbytes, a.data) for _, _, a in attachments]
    entries = [
        TensorEntry(
            part.name,
            part.tensor.dtype,
            part.shape,
            part.offsets,
            tuple(part.tensor.shape),
            places[part.memory],
        )
        for part in parts
    ]
    encoded = {name: item.json for name, item in objects.items()}
    description = Description(entries, encoded, structure).encode()
    filled = sorted((s for s in sources if s.num_bytes), key=lambda source: source.offset)
    return Pack(layout, filled, description)


def packed_bytes(parts: Iterable[Part]) -> int:
    """Bytes that *parts* take in a pack, padding included."""
    return sum(padded(part.num_bytes) for part in parts)


def _owners(parts: Sequence[Part]) -> dict[tuple[object, ...], Part]:
    """The part that is stored for each piece of memory: of several names, the first by name."""
    owners: dict[tuple[object, ...], Part] = {}
    for part in sorted(parts, key=lambda part: (part.name, part.offsets)):
        owners.setdefault(part.memory, part)
    return owners


def _copy(target: torch.Tensor, source: Source, start: int, stop: int) -> None:
    """Copy the bytes [start, stop) of *source* into *target*."""
    if isinstance(source.data, memoryview):
        target.numpy()[:] = source.data[start:stop]
        return
    tensor = source.data.detach()
    bent = tensor.is_conj() or tensor.is_neg()
    if stop - start == source.num_bytes and (bent or not tensor.is_contiguous()):
        # The kernel gathers the strides on its way: still one copy.
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return
    # A piece of a tensor (chunked save) is addressed by bytes, which needs them in a row.
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu" and stop - start < PARALLEL_BYTES:
        np.copyto(target.numpy(), flat.numpy()[start:stop])
    else:
        target.copy_(flat[start:stop])
