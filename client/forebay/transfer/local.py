"""Bytes on the daemon's host: its files are handed over as descriptors and mapped or read here."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from forebay.forking import watch
from forebay.stopwatch import timed
from forebay.transfer.blob import NO_SEGMENT, REOPENS, Blob, Checks, Damage, Piece, UploadSlot, copy
from forebay.transfer.link import DescriptorLink, close_all, read_whole
from forebay.transfer.populate import populate_read, populate_write
from forebay.transfer.remote import RemoteTransfer
from forebay.transfer.replica import Handover, Replica
from forebay.transfer.wanted import current_plan
from forebay.transfer.window import POOL
from forebay_wire.errors import IntegrityError, StorageError, rebuild
from forebay_wire.limits import MAX_BLOBS_PER_OPEN, MIB
from forebay_wire.protocol import DataEndpoint
from forebay_wire.segments import xxh3, xxh3_running

HOT_BYTES: Final = 1 * MIB
"""A large segment is read and digested in pieces of this size, while each is in the L2 cache."""

MAX_KEPT_SLOTS: Final = 4
"""Slots that stay mapped for the next upload: one is filled while three are sealed. With fewer each
upload would fault all its pages anew."""


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


class _SlotMemory:
    """One slot of the daemon, mapped: lent to one upload after the other."""

    def __init__(self, descriptor: int, capacity: int) -> None:
        self.memory = mmap.mmap(descriptor, capacity, flags=mmap.MAP_SHARED)
        populate_write(_address(memoryview(self.memory)), capacity)
        self.num_grants = 0
        """How many uploads have got it; only the last one's bytes are sure to be in it."""


class _SlotMemories:
    """All slots that this process maps, so that whoever holds one learns of its next grant."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[tuple[int, int], _SlotMemory] = (
            weakref.WeakValueDictionary()
        )
        watch(self)

    def grant(self, descriptor: int, capacity: int) -> tuple[_SlotMemory, int]:
        """The memory behind *descriptor*, and how often it has been granted with this time."""
        found = os.fstat(descriptor)  # the mapping keeps the file, so nobody else gets its number
        key = (found.st_dev, found.st_ino)
        with self._lock:
            memory = self._known.get(key)
            if memory is None:
                memory = self._known[key] = _SlotMemory(descriptor, capacity)
            memory.num_grants += 1
            return memory, memory.num_grants

    def forget_parent(self) -> None:
        """In a child of fork: the uploads are the parent's."""
        self._lock = threading.Lock()
        self._known = weakref.WeakValueDictionary()


_slot_memories: Final = _SlotMemories()


class LocalTransfer:
    """Bytes by descriptors and shared memory; see :class:`forebay.transfer.Transfer`."""

    def __init__(self, endpoint: DataEndpoint) -> None:
        assert endpoint.descriptor_socket, "no descriptor socket in the endpoint"
        self.endpoint = endpoint
        self._link = DescriptorLink(endpoint.descriptor_socket)
        self.wanted_back = self._link.wanted_back
        self._lock = threading.Lock()
        self._slots: list[_SlotMemory] = []
        self._remote: RemoteTransfer | None = None
        watch(self)

    def open(self, blobs: Sequence[str], context: str = "") -> list[Blob]:
        opened: list[Blob] = []
        try:
            for start in range(0, len(blobs), MAX_BLOBS_PER_OPEN):
                ids = blobs[start : start + MAX_BLOBS_PER_OPEN]
                opened.extend(self._open_some(ids, context))
        except BaseException:
            for blob_object in opened:
                blob_object.close()
            raise
        return opened

    def _open_some(self, blobs: Sequence[str], context: str) -> list[Blob]:
        found = open_replicas(self._link, blobs, context)
        opened: list[Blob | None] = [
            None
            if one is None
            else LocalBlob(
                # Of an origin this is the blob that its bytes make.
                self._link,
                self._by_http,
                one[0],
                one[1].table.blob_id,
                one[1],
                context,
            )
            for one in found
        ]
        away = [blob for blob, one in zip(blobs, opened, strict=True) if one is None]
        streamed = iter(self._by_http().open(away, context) if away else ())
        return [next(streamed) if one is None else one for one in opened]

    def _by_http(self) -> RemoteTransfer:
        """The way to blobs that cannot be mapped: on their way from a slow tier."""
        with self._lock:
            if self._remote is None:
                self._remote = RemoteTransfer(self.endpoint, self.wanted_back)
            return self._remote

    def upload_slot(
        self,
        session: str,
        slot_bytes: int,
        put_ticket: str = "",
        renew_ticket: Callable[[], str] | None = None,
    ) -> UploadSlot:
        _, answer, descriptors = self._link.request({"op": "slot", "session": session})
        try:
            capacity = int(answer["capacity"])
            if capacity < slot_bytes or os.fstat(descriptors[0]).st_size < slot_bytes:
                raise StorageError(
                    f"the slot of upload session {session} has {capacity} bytes and not the "
                    f"granted {slot_bytes}: begin the upload again"
                )
            memory, grant = self._map_slot(descriptors[0], capacity)
        finally:
            close_all(descriptors)
        return _LocalSlot(memory, grant, slot_bytes)

    def report(self, blob: str, tier: str, segment: int, message: str) -> bool:
        return report(self._link, blob, tier, segment, message)

    def plan(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        _, answer, descriptors = self._link.request({"op": operation, **body}, wait_seconds=0.0)
        close_all(descriptors)
        return answer

    def decide_version(self, question: dict[str, Any]) -> dict[str, Any]:
        _, answer, descriptors = self._link.request({"op": "decide_version", **question})
        close_all(descriptors)
        return answer

    def manifest(self, manifest: str) -> bytes:
        _, answer, descriptors = self._link.request({"op": "manifest", "manifest": manifest})
        try:
            return read_whole(descriptors[0], int(answer["num_bytes"]))
        finally:
            close_all(descriptors)

    def close(self) -> None:
        with self._lock:
            self._slots.clear()
            remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()
        self._link.drop()

    def forget_parent(self) -> None:
        """In a child of fork; the link forgets its connection by itself."""
        self._lock = threading.Lock()
        self._slots = []

    def _map_slot(self, descriptor: int, capacity: int) -> tuple[_SlotMemory, int]:
        """The slot, mapped, and the number of its grant.

        The daemon reuses slots, and so does this: mapping one anew faults each page.
        """
        memory, grant = _slot_memories.grant(descriptor, capacity)
        with self._lock:
            self._slots = [kept for kept in self._slots if kept is not memory]
            self._slots.append(memory)
            del self._slots[:-MAX_KEPT_SLOTS]
        return memory, grant


class _LocalSlot(UploadSlot):
    """The daemon's own shared memory: what is written there is there."""

    def __init__(self, memory: _SlotMemory, grant: int, slot_bytes: int) -> None:
        self.buffer = memoryview(memory.memory)[:slot_bytes]
        self._memory: _SlotMemory | None = memory
        self._grant = grant

    @property
    def is_intact(self) -> bool:
        return self._memory is not None and self._memory.num_grants == self._grant

    def flush(self, num_bytes: int, start: int = 0) -> None:
        pass

    def close(self) -> None:
        self.buffer = memoryview(bytearray())
        self._memory = None


class LocalBlob(Blob):
    """A blob whose replica was handed over: mapped at the first map, or read straight from it."""

    def __init__(
        self,
        link: DescriptorLink,
        by_http: Callable[[], RemoteTransfer],
        serial: int,
        blob: str,
        replica: Replica,
        context: str,
    ) -> None:
        super().__init__(blob, replica.table, context)
        self._by_http = by_http
        self.tier = replica.tier
        self._link = link
        self._replica: Replica | _StreamedReplica | None = replica
        self._is_lost = False
        """Whether it has no replica because none served when one was last asked for."""
        self._view: memoryview | None = None
        self._view_address = 0
        self._checks = Checks(replica.table.num_segments)
        self._lock = threading.RLock()
        self._release = self._release_at_end(serial)
        self._is_one_piece = len(replica.extents) == 1
        watch(self)

    @property
    def maps_in_place(self) -> bool:
        return self._is_one_piece

    def will_read(self, offset: int, length: int) -> None:
        replica = self._replica
        if isinstance(replica, Replica):
            replica.will_read(offset, length)

    def close(self) -> None:
        with self._lock:
            self._let_go()
            self._is_lost = False
        self._link.flush_releases()

    def forget_parent(self) -> None:
        """In a child of fork: another thread of the parent may have held it."""
        self._lock = threading.RLock()

    def _map(self, offset: int, length: int) -> memoryview:
        with self._lock:
            view, checks = self._open_view(), self._checks
            address = self._view_address
        for run in checks.missing_runs(self._covering(offset, length)):
            self._check_mapped(view, address, run, checks)
        if checks.complete:
            with self._lock:
                if view is self._view:
                    self._whole = view
        return view[offset : offset + length]

    def _open_view(self) -> memoryview:
        if self._view is None:
            replica = self._opened()
            try:
                view = replica.mapped()
            except ValueError:
                raise Damage(self.table.num_segments - 1, "is cut short") from None
            if view is None:
                window = POOL.lend(self.num_bytes)
                self._read_checked(replica, 0, window, self._checks)
                view = window.toreadonly()
            self._view, self._view_address = view, _address(view)
            # The mapping keeps the file; descriptors are scarce (soft limit often 1024).
            self._replica = None
        return self._view

    def _check_mapped(self, view: memoryview, address: int, run: range, checks: Checks) -> None:
        """Fault *run* in where a bad page is an error and not SIGBUS, then check it."""
        borders = self._borders
        start, stop = borders[run.start], borders[run.stop]
        with timed("tier"):
            is_there = populate_read(address + start, stop - start) == 0
        if not is_there:
            for segment in run:
                start, stop = borders[segment], borders[segment + 1]
                failure = populate_read(address + start, stop - start)
                # Kernels before 5.14: there a page that goes bad ends the process, as with any
                # mapped file; the file's length was checked when it was opened.
                if failure not in (0, errno.EINVAL):
                    raise Damage(segment, f"cannot be read ({os.strerror(failure)})")
        with timed("verify"):
            for segment in run:
                self._check(segment, xxh3(view[borders[segment] : borders[segment + 1]]))
                checks.mark(segment)

    def _read_into(self, offset: int, target: memoryview) -> None:
        with self._lock:
            replica, checks = (None if self._view else self._opened()), self._checks
        if replica is None:
            copy(target, self._map(offset, len(target)))
        elif checks.complete:
            self._read_piece(replica, offset, Piece(target, None))
        else:
            self._read_checked(replica, offset, target, checks)

    def _read_checked(
        self, replica: Replica | _StreamedReplica, offset: int, target: memoryview, checks: Checks
    ) -> None:
        position, pieces = self._pieces(offset, target, checks)
        for piece in pieces:
            self._read_piece(replica, position, piece)
            position += len(piece.view)
            if piece.segment is not None:
                checks.mark(piece.segment)

    def _read_piece(self, replica: Replica | _StreamedReplica, offset: int, piece: Piece) -> None:
        if piece.segment is None or len(piece.view) <= HOT_BYTES:
            self._fill(replica, offset, piece.view)
            self._arrived(piece)
            return
        digest = xxh3_running()
        for start in range(0, len(piece.view), HOT_BYTES):
            part = piece.view[start : start + HOT_BYTES]
            self._fill(replica, offset + start, part)
            with timed("verify"):
                digest.update(part)
        self._arrived(piece, digest.intdigest())

    def _fill(self, replica: Replica | _StreamedReplica, offset: int, target: memoryview) -> None:
        count = 0
        try:
            with timed("tier"):
                count = replica.read(offset, target)
        except OSError as error:
            raise Damage(self._segment_at(offset), f"cannot be read ({error.strerror})") from error
        if count < len(target):
            raise Damage(self._segment_at(offset + count), "is cut short")

    def _segment_at(self, offset: int) -> int:
        return self._covering(offset, 1).start

    def _opened(self) -> Replica | _StreamedReplica:
        if self._replica is None and self._is_lost:
            self._reopen()  # it may have been repaired
        if self._replica is None:
            raise self._closed()
        return self._replica

    def _reopen(self) -> None:
        with self._lock:
            self._let_go()
            self._is_lost = True
            [found] = open_replicas(self._link, [self.id], self.context)
            self._checks = Checks(self.table.num_segments)
            if found is None:
                [streamed] = self._by_http().open([self.id], self.context)
                self._replica, self._release = _StreamedReplica(streamed), streamed.close
                self._is_one_piece = False
            else:
                self._replica, self._release = found[1], self._release_at_end(found[0])
                self._is_one_piece = len(found[1].extents) == 1
            self.tier = self._replica.tier
            self._is_lost = False

    def _let_go(self) -> None:
        self._release()
        self._whole = self._view = self._replica = None

    def _release_at_end(self, serial: int) -> Callable[[], object]:
        release = weakref.finalize(self, self._link.release_later, serial, self.id)
        release.atexit = False
        return release

    def _report(self, damage: Damage) -> None:
        report(self._link, self.id, self.tier, damage.segment, damage.reason)


class _StreamedReplica:
    """What is left of a blob whose mapped replica was bad: its bytes over HTTP, already checked."""

    def __init__(self, blob: Blob) -> None:
        self.tier = blob.tier
        self._blob = blob

    def read(self, offset: int, target: memoryview) -> int:
        self._blob.read_into(offset, target)
        return len(target)

    def mapped(self) -> None:
        return None


def report(link: DescriptorLink, blob: str, tier: str, segment: int, message: str) -> bool:
    """Tell the daemon of damage; True if it finds that replica healthy."""
    body = {"op": "report", "blob": blob, "tier": tier, "segment": segment, "message": message}
    return bool(link.request(body)[1]["healthy"])


def open_replicas(
    link: DescriptorLink, blobs: Sequence[str], context: str
) -> list[tuple[int, Replica] | None]:
    """``(serial of the connection, replica)`` of each of up to 32 *blobs*; all or an exception.

    None stands for a blob that comes by HTTP. A replica that is damaged already in length or table
    is reported and opened anew.
    """
    found: dict[int, tuple[int, Replica] | None] = {}
    problems: dict[int, tuple[str, str, IntegrityError]] = {}
    wanted = list(range(len(blobs)))
    tries = 0
    while tries <= REOPENS:
        with timed("open") as opening:
            serial, answer, descriptors = link.request(
                {"op": "open", "blobs": [blobs[index] for index in wanted], **current_plan()}
            )
            opening.explain(answer.get("waits"))
        problems, unanswered = {}, list[int]()
        handover = Handover(descriptors)
        link.count_opens(sum("tier" in entry for entry in answer["blobs"]))
        try:
            for index, entry in zip(wanted, answer["blobs"], strict=True):
                if entry.get("again"):  # the answer had no room for all of its descriptors
                    unanswered.append(index)
                    continue
                try:
                    replica = _take(handover, entry, context)
                    found[index] = None if replica is None else (serial, replica)
                except IntegrityError as error:
                    if "error" in entry:
                        raise
                    problems[index] = str(entry["blob"]), str(entry["tier"]), error
        except BaseException:
            _release(link, serial, answer["blobs"])
            raise
        finally:
            handover.close()
        for blob, tier, problem in problems.values():
            link.release_later(serial, blob)
            report(link, blob, tier, NO_SEGMENT, problem.message)
        wanted = [*problems, *unanswered]
        tries += bool(problems)
        if not wanted:
            return [found[index] for index in range(len(blobs))]
    raise IntegrityError(
        f"blob {blobs[wanted[0]]} cannot be opened: {problems[wanted[0]][2].message}; the daemon "
        "has no undamaged replica: restore it from the object tier (forebay recover)"
    )


def _take(handover: Handover, entry: dict[str, Any], context: str) -> Replica | None:
    """The replica of one *entry*, None if it comes by HTTP, or the exception that it stands for."""
    if "error" in entry:
        note = f" ({context})" if context else ""
        raise rebuild(str(entry["error"]), "UNKNOWN", f"{entry['message']}{note}")
    if entry.get("by_http"):
        return None
    where = f"{context}, tier {entry['tier']}" if context else f"tier {entry['tier']}"
    return handover.replica(entry, where)


def _release(link: DescriptorLink, serial: int, entries: Sequence[dict[str, Any]]) -> None:
    for entry in entries:
        if "tier" in entry:
            link.release_later(serial, entry["blob"])
