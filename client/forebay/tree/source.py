"""The bytes of one file of the tree, wherever they lie: verified, and mapped where they can be."""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from forebay.forking import watch
from forebay.transfer import Blob, current_endpoint, local_path_is_on, make_transfer
from forebay.transfer.blob import copy
from forebay.transfer.window import POOL
from forebay.tree.nodes import Boxes, File, ManifestText, Piece, Pieces, Text
from forebay_wire.errors import ForebayError, InvalidRequest
from forebay_wire.limits import MIB
from forebay_wire.manifest import FRAME_BYTES, decode
from forebay_wire.protocol import DataEndpoint

WINDOW_BYTES: Final = 4 * MIB
"""Shorter reads of bytes that cannot be mapped keep their segments for the next one."""


Result = TypeVar("Result")


class Source(Protocol):
    """The bytes of one file. Thread-safe, fork-safe and picklable."""

    def view(self, offset: int, length: int) -> memoryview:
        """Read-only bytes from *offset*, where they lie: up to *length* of them, at least one."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill *target* from *offset*; all of that lies inside the file."""
        ...


class MemorySource:
    """A file that this process holds."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).toreadonly()

    def view(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length]

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self._data[offset : offset + len(target)]

    def __reduce__(self) -> Any:
        return MemorySource, (bytes(self._data),)


class BlobSource:
    """A file that lies in blobs. They are opened at the first read, and shared by all readers."""

    def __init__(self, endpoint: DataEndpoint, pieces: tuple[Piece, ...], context: str) -> None:
        self._endpoint = endpoint
        self._pieces = pieces
        self._context = context
        self._starts = [0, *accumulate(piece.num_bytes for piece in pieces)]
        self._blobs: dict[str, Blob] = {}
        self._window: tuple[str, int, memoryview] | None = None

    def view(self, offset: int, length: int) -> memoryview:
        piece, skip = self._at(offset)
        length = min(length, piece.num_bytes - skip)
        start = piece.offset + skip
        return self._use(piece.blob, lambda blob: self._view(blob, piece.blob, start, length))

    def read_into(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            piece, skip = self._at(offset + done)
            part = target[done : done + piece.num_bytes - skip]
            self._fill(piece.blob, piece.offset + skip, part)
            done += len(part)

    def _view(self, blob: Blob, name: str, start: int, length: int) -> memoryview:
        if blob.maps_in_place:
            return blob.map(start, length)
        if length < WINDOW_BYTES:
            return self._from_window(blob, name, start, length)
        buffer = POOL.lend(length)
        blob.read_into(start, buffer)
        return buffer.toreadonly()

    def _fill(self, name: str, start: int, target: memoryview) -> None:
        def fill(blob: Blob) -> None:
            if blob.maps_in_place or len(target) >= WINDOW_BYTES:
                blob.read_into(start, target)
            else:
                copy(target, self._from_window(blob, name, start, len(target)))

        self._use(name, fill)

    def _use(self, name: str, action: Callable[[Blob], Result]) -> Result:
        """*action* on a blob. One that failed is opened anew by the next read: it may be repaired
        by then."""
        is_again = False
        while True:
            blob = self._blob(name)
            try:
                return action(blob)
            except ForebayError as error:
                self._blobs.pop(name, None)
                _open_blobs.forget(self._endpoint, name, blob)
                # Closed: it failed under another reader, who has been told why. We find out.
                if is_again or not isinstance(error, InvalidRequest):
                    raise
                is_again = True

    def __reduce__(self) -> Any:
        return BlobSource, (current_endpoint(self._endpoint), self._pieces, self._context)

    def _at(self, offset: int) -> tuple[Piece, int]:
        index = bisect_right(self._starts, offset) - 1
        return self._pieces[index], offset - self._starts[index]

    def _blob(self, blob: str) -> Blob:
        found = self._blobs.get(blob)
        if found is None:
            found = self._blobs[blob] = _open_blobs.get(self._endpoint, blob, self._context)
        return found

    def _from_window(self, blob: Blob, name: str, start: int, length: int) -> memoryview:
        """From the segments read last: each comes whole, since only whole ones can be checked."""
        window = self._window  # read once: another thread may replace it
        if window is not None:
            of, first, data = window
            if of == name and first <= start and start + length <= first + len(data):
                return data[start - first : start - first + length]
        borders = blob.table.offsets
        low = int(borders[bisect_right(borders, start) - 1])
        high = int(borders[bisect_left(borders, start + length)])
        buffer = POOL.lend(high - low)
        blob.read_into(low, buffer)
        data = buffer.toreadonly()
        self._window = name, low, data
        return data[start - low : start - low + length]


class _OpenBlobs:
    """The blobs that this process reads files from, each open once, as long as somebody reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[tuple[DataEndpoint, bool, str], Blob] = (
            weakref.WeakValueDictionary()
        )
        watch(self)

    def get(self, endpoint: DataEndpoint, blob: str, context: str) -> Blob:
        key = (endpoint, local_path_is_on(), blob)
        with self._lock:
            found = self._known.get(key)
        if found is None:
            [opened] = make_transfer(endpoint).open([blob], context)
            with self._lock:
                found = self._known.setdefault(key, opened)  # another thread may have been faster
        return found

    def forget(self, endpoint: DataEndpoint, blob: str, opened: Blob) -> None:
        """Have *blob* opened anew for the next who reads it."""
        with self._lock:
            for is_local in (False, True):
                if self._known.get((endpoint, is_local, blob)) is opened:
                    del self._known[endpoint, is_local, blob]

    def forget_parent(self) -> None:
        """In a child of fork: what the parent opens is the parent's."""
        self._lock = threading.Lock()
        self._known = weakref.WeakValueDictionary()


_open_blobs: Final = _OpenBlobs()


def open_source(
    file: File, endpoint: DataEndpoint, read_manifest: Callable[[str], bytes], context: str
) -> Source:
    """The bytes of *file*; those of a tensor that ranks hold in interleaved parts are gathered."""
    content = file.content
    if isinstance(content, Text):
        return MemorySource(content.data)
    if isinstance(content, ManifestText):
        data = read_manifest(content.manifest)
        decode(data, context, content.manifest)
        return MemorySource(memoryview(data)[FRAME_BYTES:])
    if isinstance(content, Pieces):
        return BlobSource(endpoint, content.pieces, context)
    return MemorySource(_gather(content, endpoint, context))


def _gather(tensor: Boxes, endpoint: DataEndpoint, context: str) -> memoryview:
    item = np.dtype((np.void, tensor.item_bytes))
    whole = np.empty(tensor.shape, dtype=item)
    for box in tensor.boxes:
        part = np.empty(box.sizes, dtype=item)
        BlobSource(endpoint, (box.piece,), context).read_into(0, _bytes_of(part))
        place = tuple(
            slice(offset, offset + size)
            for offset, size in zip(box.offsets, box.sizes, strict=True)
        )
        whole[place] = part
    return _bytes_of(whole)


def _bytes_of(array: Any) -> memoryview:
    data: memoryview = array.reshape(-1).view(np.uint8).data
    return data
