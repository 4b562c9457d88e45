"""Reading the parts of saved tensors that a rank needs, and not much more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch.distributed.checkpoint.planner import ReadItem

from forebay.checkpoint.flatten import local_part
from forebay.checkpoint.manifest import SavedState, StoredTensor
from forebay.checkpoint.objects import byte_view
from forebay.checkpoint.reading import PIECE_BYTES, Reading, Warm, run
from forebay.transfer import Blob, Transfer
from forebay_wire.closing import Closing
from forebay_wire.limits import MAX_OPEN_BLOBS_PER_CLIENT, MAX_SEGMENT_BYTES
from forebay_wire.manifest import PackRef

WINDOW_BYTES: Final = 8 * MAX_SEGMENT_BYTES
"""Most bytes that are read at once for a box with gaps."""

PACKS_AT_ONCE: Final = MAX_OPEN_BLOBS_PER_CLIENT // 4
"""Other readers of this process (loaders) keep the rest of the open blobs."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths, in elements."""


@dataclass(frozen=True)
class Span:
    """A box of a saved part, and the bytes of the part that hold all of it."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    start: int
    num_bytes: int


def spans(
    sizes: Sequence[int], box: Box, item_bytes: int, most: int | None = None
) -> Iterator[Span]:
    """Cut *box* of a row-major part of *sizes* into byte ranges worth reading.

    A box that is one run of bytes stays whole, unless it has more than *most* bytes. One with gaps
    is cut until it is read within :data:`WINDOW_BYTES`, and gaps above a segment (the least that
    can be verified) are left out.
    """
    offsets, lengths = box
    if 0 in lengths:
        return
    strides = _strides(sizes)
    start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    last = sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
    needed, covered = math.prod(lengths) * item_bytes, (last + 1) * item_bytes
    dense = needed == covered and (most is None or covered <= max(most, item_bytes))
    small = covered <= WINDOW_BYTES and covered - needed <= max(needed, MAX_SEGMENT_BYTES)
    if dense or small:
        yield Span(tuple(offsets), tuple(lengths), start * item_bytes, covered)
        return
    dimension = next(index for index, length in enumerate(lengths) if length > 1)
    half = lengths[dimension] // 2
    for first, count in ((0, half), (half, lengths[dimension] - half)):
        part_offsets, part_lengths = list(offsets), list(lengths)
        part_offsets[dimension] += first
        part_lengths[dimension] = count
        yield from spans(sizes, (tuple(part_offsets), tuple(part_lengths)), item_bytes, most)


class Planner(Protocol):
    """What is needed of torch's ``LoadPlanner``."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor: ...

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


class PackReader(Closing):
    """Reads from the packs of one generation, verified. Not thread-safe; a context manager."""

    def __init__(self, transfer: Transfer, saved: SavedState, *, keeps_open: bool = False) -> None:
        """*keeps_open*: packs stay open for the next read, which need not check them again."""
        self._transfer = transfer
        self._keeps_open = keeps_open
        self.saved = saved
        self._blobs: dict[str, Blob] = {}
        self.bytes_read = 0
        """Bytes asked of the packs so far."""

    def read(self, items: Sequence[ReadItem], planner: Planner) -> None:
        """Fill the tensors that *planner* resolves for *items*.

        *planner* is called from this thread alone; the bytes are read and checked by several.
        Raises :class:`IntegrityError` for damage that no replica makes good; then the tensors hold
        some of it.
        """
        by_pack: dict[int, list[tuple[ReadItem, StoredTensor]]] = {}
        for item in items:
            stored = self.saved.parts[item.storage_index]
            by_pack.setdefault(stored.pack.rank, []).append((item, stored))
        ranks = sorted(by_pack)
        for first in range(0, len(ranks), PACKS_AT_ONCE):
            some = ranks[first : first + PACKS_AT_ONCE]
            self._open([by_pack[rank][0][1].pack for rank in some])
            readings: list[Reading] = []
            targets: list[tuple[ReadItem, torch.Tensor]] = []
            for rank in some:
                # In pack order, so that reads run ahead and each segment is checked once.
                for item, stored in sorted(by_pack[rank], key=lambda p: p[1].entry.pack_offset):
                    if 0 in item.lengths:
                        continue
                    target = local_part(planner.resolve_tensor(item)).detach()
                    readings += self._readings(item, stored, target)
                    targets.append((item, target))
            run(readings)
            self.bytes_read += sum(reading.num_bytes for reading in readings)
            for item, target in targets:
                planner.commit_tensor(item, target)
            if not self._keeps_open:
                self._close_blobs()

    def read_bytes(self, pack: PackRef, offset: int, num_bytes: int) -> bytes:
        """Bytes of a pack: what did not fit into an object's JSON."""
        self._open([pack])
        data = bytearray(num_bytes)
        self._blobs[pack.blob].read_into(offset, data)
        self.bytes_read += num_bytes
        return bytes(data)

    def close(self) -> None:
        """Release the packs. Idempotent."""
        self._close_blobs()

    def _readings(
        self, item: ReadItem, stored: StoredTensor, target: torch.Tensor
    ) -> Iterator[Reading]:
        entry, blob = stored.entry, self._blobs[stored.pack.blob]
        box = (tuple(item.storage_offsets), tuple(item.lengths))
        straight = _is_plain(target, entry.dtype) and target.is_contiguous()
        most = None if straight else WINDOW_BYTES
        for span in spans(entry.sizes, box, entry.dtype.itemsize, most):
            place = target
            for dimension, (offset, length) in enumerate(
                zip(span.offsets, span.lengths, strict=True)
            ):
                begin = offset - item.storage_offsets[dimension]
                place = place.narrow(dimension, begin, length)
            offset = entry.pack_offset + span.start
            dense = span.num_bytes == place.numel() * entry.dtype.itemsize
            if dense and _is_plain(place, entry.dtype) and place.is_contiguous():
                memory = byte_view(place).numpy().data
                for start, stop in _whole_segments(blob, offset, span.num_bytes):
                    part = memory[start - offset : stop - offset]
                    yield Reading(blob, start, stop - start, _Straight(blob, start, part))
            else:
                through = _Through(blob, offset, span, place, entry.dtype, _strides(entry.sizes))
                yield Reading(blob, offset, span.num_bytes, through)

    def _open(self, packs: Sequence[PackRef]) -> None:
        """Open what is not open yet, all in one exchange with the daemon."""
        missing = list(dict.fromkeys(p.blob for p in packs if p.blob not in self._blobs))
        if missing:
            if len(self._blobs) + len(missing) > PACKS_AT_ONCE:
                self._close_blobs()
                missing = list(dict.fromkeys(p.blob for p in packs))
            manifest = self.saved.manifest
            name = f"generation {manifest.run}@{manifest.attempt}/{manifest.step}"
            self._blobs.update(zip(missing, self._transfer.open(missing, name), strict=True))

    def _close_blobs(self) -> None:
        blobs, self._blobs = self._blobs, {}
        for blob in blobs.values():
            blob.close()


@dataclass(frozen=True)
class _Straight:
    """Into the tensor's own memory."""

    blob: Blob
    offset: int
    memory: memoryview

    def __call__(self, warm: Warm) -> None:
        self.blob.read_into(self.offset, self.memory)


@dataclass(frozen=True)
class _Through:
    """By way of warm memory: with gaps, into other strides, or onto a device."""

    blob: Blob
    offset: int
    span: Span
    place: torch.Tensor
    dtype: torch.dtype
    strides: tuple[int, ...]

    def __call__(self, warm: Warm) -> None:
        scratch = warm.lend(self.span.num_bytes, self.place.device)
        self.blob.read_into(self.offset, scratch.numpy().data)
        box = scratch.view(self.dtype).as_strided(self.span.lengths, self.strides)
        warm.copy(self.place, box)


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of *tensor*, if contiguous, are those of *dtype* in memory here."""
    is_here = tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())
    return is_here and tensor.dtype == dtype


def _whole_segments(blob: Blob, offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """The range in pieces of about :data:`PIECE_BYTES` that end where segments do."""
    stop, borders = offset + num_bytes, blob.table.offsets
    while offset < stop:
        index = int(np.searchsorted(borders, offset + PIECE_BYTES))
        end = min(stop, int(borders[index]) if index < len(borders) else stop)
        yield offset, end
        offset = end


def _strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides = [1] * len(sizes)
    for dimension in range(len(sizes) - 2, -1, -1):
        strides[dimension] = strides[dimension + 1] * max(1, sizes[dimension + 1])
    return tuple(strides)
