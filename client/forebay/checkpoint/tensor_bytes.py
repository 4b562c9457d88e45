"""Bytes of saved tensors, a block at a time, from packs of any sharding; needs no torch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forebay.checkpoint.contents import Contents, TensorInfo, TensorPart
from forebay.transfer import Blob, Transfer
from forebay_wire.closing import Closing
from forebay_wire.errors import IntegrityError
from forebay_wire.limits import MAX_OPEN_BLOBS_PER_CLIENT

BLOCK_BYTES: Final = 16 << 20
PACKS_AT_ONCE: Final = MAX_OPEN_BLOBS_PER_CLIENT // 4
"""Other readers of this process keep the rest of the open blobs."""


@dataclass(frozen=True)
class Block:
    """A box that is one run of elements of the row-major tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)


def blocks(
    shape: tuple[int, ...],
    item_bytes: int,
    limit: int = BLOCK_BYTES,
    rows: tuple[int, int] | None = None,
) -> Iterator[Block]:
    """Cut a tensor, in order, into blocks of at most *limit* bytes (at least one element).

    *rows*: only those [first, stop) of its first dimension.
    """
    if not shape:
        yield Block((), ())
        return
    first, stop = rows if rows is not None else (0, shape[0])
    if 0 in shape[1:] or stop <= first:
        return
    row_bytes = math.prod(shape[1:]) * item_bytes
    if row_bytes > limit and len(shape) > 1:
        for row in range(first, stop):
            for inner in blocks(shape[1:], item_bytes, limit):
                yield Block((row, *inner.offsets), (1, *inner.sizes))
        return
    step = max(1, limit // max(1, row_bytes))
    rest = (0,) * (len(shape) - 1)
    for start in range(first, stop, step):
        yield Block((start, *rest), (min(step, stop - start), *shape[1:]))


class TensorReader(Closing):
    """Reads the tensors of one generation, verified. Not thread-safe; a context manager."""

    def __init__(self, transfer: Transfer, contents: Contents) -> None:
        self._transfer = transfer
        self.contents = contents
        self._open: OrderedDict[str, Blob] = OrderedDict()
        self.bytes_read = 0

    def read(self, info: TensorInfo, block: Block) -> NDArray[np.void]:
        """The elements of *block*, each as its bytes, in the block's shape.

        Raises :class:`IntegrityError` for damage that no replica makes good.
        """
        dtype = np.dtype((np.void, max(1, info.item_bytes)))
        target = np.empty(block.sizes, dtype)
        for part in info.parts:
            common = _common(block, part)
            if common is None:
                continue
            start, count, place, shape = common
            data = self._map(
                part, part.pack_offset + start * info.item_bytes, count * info.item_bytes
            )
            target[place] = np.frombuffer(data, dtype).reshape(shape)
            self.bytes_read += count * info.item_bytes
        return target

    def stream(
        self, info: TensorInfo, limit: int = BLOCK_BYTES
    ) -> Iterator[tuple[Block, NDArray[np.void]]]:
        """All blocks of a tensor, in order."""
        for block in blocks(info.shape, info.item_bytes, limit):
            yield block, self.read(info, block)

    def read_bytes(self, rank: int, offset: int, num_bytes: int) -> bytes:
        """Bytes of a pack: what did not fit into an object's JSON."""
        return bytes(self._blob(rank).map(offset, num_bytes))

    def verify(self, rank: int, progress: Callable[[int], object]) -> dict[int, str]:
        """Read every byte of a pack and compare it with its BLAKE3: segment to what is wrong, of
        those that no other copy makes good.

        *progress* is told how many bytes more are done. Damage of the table or of all copies as a
        whole raises :class:`IntegrityError`.
        """
        blob = self._blob(rank)
        if blob.num_bytes != self.contents.packs[rank].num_bytes:
            raise IntegrityError(
                f"the pack of rank {rank} has {blob.num_bytes} bytes, its manifest says "
                f"{self.contents.packs[rank].num_bytes}"
            )
        borders = blob.table.offsets.tolist()
        suspects = []
        for segment in range(blob.table.num_segments):
            if blob.probe(segment):
                suspects.append(segment)
            progress(borders[segment + 1] - borders[segment])
        # Only now are they reported: what is quarantined cannot be looked at any further.
        bad: dict[int, str] = {}
        for segment in suspects:
            try:
                data = blob.map(borders[segment], borders[segment + 1] - borders[segment])
                blob.table.check_identity(segment, data, self.contents.name)
            except IntegrityError as error:
                bad[segment] = error.message
        return bad

    def borders(self, rank: int) -> list[int]:
        """Where the segments of a pack start, and its length."""
        found: list[int] = self._blob(rank).table.offsets.tolist()
        return found

    def close(self) -> None:
        """Release the packs. Idempotent."""
        while self._open:
            self._open.popitem()[1].close()

    def _map(self, part: TensorPart, offset: int, num_bytes: int) -> memoryview:
        return self._blob(part.rank).map(offset, num_bytes)

    def _blob(self, rank: int) -> Blob:
        name = self.contents.packs[rank].blob
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        while len(self._open) >= PACKS_AT_ONCE:
            self._open.popitem(last=False)[1].close()
        self._open[name] = self._transfer.open([name], self.contents.name)[0]
        return self._open[name]


def _common(
    block: Block, part: TensorPart
) -> tuple[int, int, tuple[slice, ...], tuple[int, ...]] | None:
    """What a part has of a block: first element and number of elements in the part's row-major
    order (they are one run, as the block is one), where they go, their shape."""
    offsets, sizes = part.box
    start, place, shape = 0, [], []
    for begin, size, at, length in zip(block.offsets, block.sizes, offsets, sizes, strict=True):
        low, high = max(begin, at), min(begin + size, at + length)
        if low >= high:
            return None
        start = start * length + (low - at)
        place.append(slice(low - begin, high - begin))
        shape.append(high - low)
    return start, math.prod(shape), tuple(place), tuple(shape)


def raw_bytes(data: NDArray[Any]) -> memoryview:
    """The bytes of a block, in row-major order."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
