"""Reading the parts of saved tensors that a rank needs, and not much more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from forebay.checkpoint.flatten import local_part
from forebay.checkpoint.manifest import SavedState, StoredTensor
from forebay.transfer import Blob, Transfer
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


def spans(sizes: Sequence[int], box: Box, item_bytes: int) -> Iterator[Span]:
    """Cut *box* of a row-major part of *sizes* into byte ranges worth reading.

    A box that is one run of bytes stays whole. One with gaps is cut until it is read within
    :data:`WINDOW_BYTES`, and gaps above a segment (the least that can be verified) are left out.
    """
    offsets, lengths = box
    if 0 in lengths:
        return
    strides = _strides(sizes)
    start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    last = sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
    needed, covered = math.prod(lengths) * item_bytes, (last + 1) * item_bytes
    dense = needed == covered
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
        yield from spans(sizes, (tuple(part_offsets), tuple(part_lengths)), item_bytes)


class PackReader:
    """Reads from the packs of one generation, verified. Not thread-safe; a context manager."""

    def __init__(self, transfer: Transfer, saved: SavedState) -> None:
        self._transfer = transfer
        self.saved = saved
        self._blobs: dict[str, Blob] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.bytes_read = 0
        """Bytes asked of the packs so far."""

    def read(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Fill the tensors that *planner* resolves for *items*.

        Raises :class:`IntegrityError` for damage that no replica makes good.
        """
        by_pack: dict[int, list[tuple[ReadItem, StoredTensor]]] = {}
        for item in items:
            stored = self.saved.parts[item.storage_index]
            by_pack.setdefault(stored.pack.rank, []).append((item, stored))
        ranks = sorted(by_pack)
        for first in range(0, len(ranks), PACKS_AT_ONCE):
            some = ranks[first : first + PACKS_AT_ONCE]
            self._open([by_pack[rank][0][1].pack for rank in some])
            for rank in some:
                # In pack order, so that reads run ahead and each segment is checked once.
                for item, stored in sorted(by_pack[rank], key=lambda p: p[1].entry.pack_offset):
                    self._read_item(item, stored, planner)
            self._close_blobs()

    def read_bytes(self, pack: PackRef, offset: int, num_bytes: int) -> bytes:
        """Bytes of a pack: what did not fit into an object's JSON."""
        self._open([pack])
        data = bytearray(num_bytes)
        self._read_into(pack, offset, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Release the packs. Idempotent."""
        self._close_blobs()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_item(self, item: ReadItem, stored: StoredTensor, planner: LoadPlanner) -> None:
        entry = stored.entry
        if 0 in item.lengths:
            return
        target = local_part(planner.resolve_tensor(item)).detach()
        box = (tuple(item.storage_offsets), tuple(item.lengths))
        for span in spans(entry.sizes, box, entry.dtype.itemsize):
            place = target
            for dimension, (offset, length) in enumerate(
                zip(span.offsets, span.lengths, strict=True)
            ):
                begin = offset - item.storage_offsets[dimension]
                place = place.narrow(dimension, begin, length)
            self._read_span(stored, span, place)
        planner.commit_tensor(item, target)

    def _read_span(self, stored: StoredTensor, span: Span, place: torch.Tensor) -> None:
        entry = stored.entry
        offset = entry.pack_offset + span.start
        dense = span.num_bytes == place.numel() * entry.dtype.itemsize
        straight = dense and place.dtype == entry.dtype and place.is_contiguous()
        if straight and place.device.type == "cpu" and not (place.is_conj() or place.is_neg()):
            memory = place.reshape(-1).view(torch.uint8).numpy()
            self._read_into(stored.pack, offset, memory.data)
            return
        scratch = self._warm(span.num_bytes)
        self._read_into(stored.pack, offset, scratch.numpy().data)
        box = scratch.view(entry.dtype).as_strided(span.lengths, _strides(entry.sizes))
        place.copy_(box)

    def _read_into(self, pack: PackRef, offset: int, target: memoryview) -> None:
        self._blobs[pack.blob].read_into(offset, target)
        self.bytes_read += target.nbytes

    def _warm(self, num_bytes: int) -> torch.Tensor:
        """Memory used before, if there is enough: fresh pages cost more than the copy."""
        if self._scratch.numel() < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch[:num_bytes]

    def _open(self, packs: Sequence[PackRef]) -> None:
        """Open what is not open yet, all in one exchange with the daemon."""
        missing = list(dict.fromkeys(p.blob for p in packs if p.blob not in self._blobs))
        if missing:
            manifest = self.saved.manifest
            name = f"generation {manifest.run}@{manifest.attempt}/{manifest.step}"
            self._blobs.update(zip(missing, self._transfer.open(missing, name), strict=True))

    def _close_blobs(self) -> None:
        blobs, self._blobs = self._blobs, {}
        for blob in blobs.values():
            blob.close()


def _strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides = [1] * len(sizes)
    for dimension in range(len(sizes) - 2, -1, -1):
        strides[dimension] = strides[dimension + 1] * max(1, sizes[dimension + 1])
    return tuple(strides)
