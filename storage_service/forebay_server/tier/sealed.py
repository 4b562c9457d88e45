"""Blobs that still lie in the slots they were sealed in, and can be read there while they land."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.memory import Slot, SlotPool, Window
from forebay_wire.errors import IntegrityError, NotFound, ResourceExhausted
from forebay_wire.segments import SegmentTable, SegmentTableBuilder


@dataclass(frozen=True)
class OpenedSlot:
    """A blob in a slot, opened: whoever gets it closes both descriptors and calls ``release``."""

    num_bytes: int
    data: int
    """Read-only; the blob's bytes from its start."""
    table: int
    """Read-only; the segment table from its start."""
    table_bytes: int
    release: Callable[[], None]
    """Until then the slot is pinned. To be called once."""


@dataclass(frozen=True, eq=False)
class _Sealed:
    """A blob from the start of a slot, which it has pinned, and its table in memory of its own."""

    slot: Slot
    table: SegmentTable
    window: Window


@dataclass(frozen=True, eq=False)
class _Kept:
    """A blob from the start of a warm slot, as it was left after so many uses."""

    slot: Slot
    num_uses: int
    table: SegmentTable


class SealedBlobs:
    """Which blobs lie in which slots. Thread-safe.

    Those that are landing, and those that have: as long as their slots lie warm, and nobody else
    has used these since, they are the fastest copies.

    A client that sealed a slot may still map it writable. So whoever reads one checks what it read
    against the table, as with any replica; the daemon's own copy for the disk is made elsewhere.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._blobs: dict[str, dict[str, _Sealed]] = {}  # by blob, then by session
        self._sessions: dict[str, _Sealed] = {}
        self._kept: dict[str, _Kept] = {}  # by slot

    def add(self, session: str, slot: Slot, table: SegmentTable) -> None:
        """From here on the blob of *table* is read from the start of *slot*, which is lent.

        The slot stays pinned until :meth:`forget`. :class:`ResourceExhausted` without memory for
        the table.
        """
        window = self._pool.window(len(table.encoded))
        try:
            window.write(table.encoded)
            window.seal()
            self._pool.pin(slot)
        except BaseException:
            window.close()
            raise
        made = _Sealed(slot, table, window)
        with self._lock:
            self._sessions[session] = made
            self._blobs.setdefault(table.blob_id, {})[session] = made

    def table(self, session: str) -> SegmentTable | None:
        """The table of the blob that is read from the slot of *session*, None if none is."""
        with self._lock:
            found = self._sessions.get(session)
        return found.table if found is not None else None

    def forget(self, session: str) -> None:
        """No more opens of the blob in the slot of *session*; those that there are go on.

        Idempotent, also for unknown sessions.
        """
        with self._lock:
            found = self._sessions.pop(session, None)
            if found is None:
                return
            same = self._blobs[found.table.blob_id]
            del same[session]
            if not same:
                del self._blobs[found.table.blob_id]
        found.window.close()
        self._pool.unpin(found.slot)

    def keep(self, slot: Slot, table: SegmentTable) -> None:
        """The blob of *table* has landed from the start of *slot*, which is warm now, or is about
        to be: it is read from there until the slot is lent again, or goes."""
        made = _Kept(slot, slot.num_uses, table)
        with self._lock:
            self._kept = {
                key: one
                for key, one in self._kept.items()
                if one.num_uses == one.slot.num_uses and one.slot.fd >= 0
            }
            self._kept[slot.slot_id] = made

    def _forget_kept(self, found: _Kept) -> None:
        with self._lock:
            if self._kept.get(found.slot.slot_id) is found:
                del self._kept[found.slot.slot_id]

    def close(self) -> None:
        """Forget all. Idempotent."""
        for session in list(self._sessions):
            self.forget(session)
        self._kept.clear()

    def open(self, blob: str) -> OpenedSlot | None:
        """Open *blob* in one of the slots that hold it; None if none does."""
        with self._lock:
            found = next(iter(self._blobs.get(blob, {}).values()), None)
            if found is None:
                return self._open_kept(blob)
            self._pool.pin(found.slot)
            release = partial(self._pool.unpin, found.slot)
            return _opened(found.slot, found.table, found.window, release)

    def _open_kept(self, blob: str) -> OpenedSlot | None:
        """The same of one that has landed; its table has memory only while it is open."""
        kept = (one for one in self._kept.values() if one.table.blob_id == blob)
        found = next((one for one in kept if self._pool.pin_warm(one.slot, one.num_uses)), None)
        if found is None:
            return None
        with contextlib.ExitStack() as undo:
            undo.callback(self._pool.unpin, found.slot)
            try:
                window = self._pool.window(len(found.table.encoded))
            except ResourceExhausted:
                return None  # there are other copies
            undo.callback(window.close)
            window.write(found.table.encoded)
            window.seal()
            release = undo.pop_all().close
        return _opened(found.slot, found.table, window, release)

    def check(self, blob: str) -> bool:
        """Read *blob* in all slots that hold it; whether one is good. Bad ones are forgotten.

        Blocks.
        """
        with self._lock:
            held = list(self._blobs.get(blob, {}).items())
            kept = [one for one in self._kept.values() if one.table.blob_id == blob]
        is_good = False
        for one in kept:
            if not self._pool.pin_warm(one.slot, one.num_uses):
                continue
            try:
                check_slot(one.slot, one.table)
                is_good = True
            except (IntegrityError, NotFound):
                self._forget_kept(one)
            finally:
                self._pool.unpin(one.slot)
        for session, found in held:
            try:
                with self._pool.pinned(found.slot):
                    check_slot(found.slot, found.table)
            except (IntegrityError, NotFound):
                self.forget(session)
            else:
                is_good = True
        return is_good


def _opened(
    slot: Slot, table: SegmentTable, window: Window, release: Callable[[], None]
) -> OpenedSlot:
    """Takes *release* over: it is called if that fails."""
    with contextlib.ExitStack() as undo:
        undo.callback(release)
        data = slot.open_read_only()
        undo.callback(os.close, data)
        descriptor = window.open_read_only()
        undo.pop_all()
    return OpenedSlot(table.total_bytes, data, descriptor, len(table.encoded), release)


def digest_slot(slot: Slot, cuts: Sequence[int]) -> SegmentTable:
    """The table of what lies at the start of *slot*, cut as *cuts* say; blocks.

    The caller has the slot pinned.
    """
    builder = SegmentTableBuilder()
    offset = 0
    with SEGMENT_BUFFERS.borrow() as buffer:
        for length in cuts:
            # Both digests have to be of the same bytes, whatever the client does to the slot.
            piece = buffer[:length]
            slot.read_into(offset, piece)
            builder.add(piece)
            offset += length
    return builder.build()


def check_slot(slot: Slot, table: SegmentTable) -> None:
    """Read all of the blob at the start of *slot*; :class:`IntegrityError` if it has changed."""
    borders = table.offsets.tolist()
    with SEGMENT_BUFFERS.borrow() as buffer:
        for index, (start, stop) in enumerate(pairwise(borders)):
            piece = buffer[: stop - start]
            slot.read_into(start, piece)
            table.check_identity(index, piece, f"slot {slot.slot_id}")
