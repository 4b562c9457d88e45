"""The ``ram`` tier: shared memory that the daemon owns and lends, as slots and as windows."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Literal

from forebay_server.tier.buffers import populate
from forebay_server.tier.space import Reservation, SpaceLedger, free_memory, in_blocks
from forebay_server.tier.store import TierSpace
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound, ResourceExhausted
from forebay_wire.ids import new_random_name
from forebay_wire.limits import GIB, MAX_UPLOAD_SLOT_BYTES, check_limit

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

DEFAULT_RESERVE_BYTES: Final = GIB // 2
"""Memory kept free for trainers and page cache."""

_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _sized_memfd(name: str, num_bytes: int, seals: int) -> int:
    """A memfd whose size nobody can change: a reader of its mapping never meets SIGBUS."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Slot:
    """Shared memory into which one client writes what it uploads; faulted in once.

    Made and closed by :class:`SlotPool`. The client writes while the daemon reads: who needs the
    bytes to stay as they are copies them first (:meth:`read_into`).
    """

    def __init__(self, owner: str, num_bytes: int, reservation: Reservation) -> None:
        """Takes *reservation* over. Use :meth:`create`."""
        self.slot_id = new_random_name()
        self.owner = owner
        self.capacity_bytes = num_bytes
        self.fd = -1
        self.num_uses = 0
        """How often it has been lent: what it holds is what the last one left."""
        self.view = memoryview(b"")
        self._map: mmap.mmap | None = None
        self._reservation = reservation
        self._closing = threading.Lock()

    @classmethod
    def create(cls, owner: str, num_bytes: int, reservation: Reservation) -> Slot:
        """A populated slot of *num_bytes*. :class:`ResourceExhausted` if memory is not there."""
        slot = cls(owner, num_bytes, reservation)
        try:
            slot.fd = _sized_memfd("forebay-slot", num_bytes, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
            slot._map = mmap.mmap(slot.fd, num_bytes)
            slot.view = memoryview(slot._map)
            populate(slot.view, "a slot")
        except OSError as error:
            slot.close()
            raise ResourceExhausted(
                f"no slot of {num_bytes} bytes ({error.strerror}): raise the daemon's limits of "
                "memory and open files"
            ) from error
        except BaseException:
            slot.close()
            raise
        reservation.allocated()
        return slot

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        """Copy the bytes from *offset* into all of *buffer*, without the GIL."""
        view = memoryview(buffer).cast("B")
        if offset < 0 or offset + view.nbytes > self.capacity_bytes:
            raise InvalidRequest(
                f"bytes [{offset}, {offset + view.nbytes}) are outside a slot of "
                f"{self.capacity_bytes} bytes"
            )
        while view.nbytes:
            count = os.preadv(self.fd, [view], offset)
            if count == 0:
                raise IntegrityError(f"slot {self.slot_id} ended before its {self.capacity_bytes}")
            view, offset = view[count:], offset + count

    def duplicate(self) -> int:
        """A writable descriptor to hand over, which the caller closes. Thread-safe: never one of
        another file, even if the slot is closed meanwhile. :class:`NotFound` if it was."""
        with self._closing:
            if self.fd < 0:
                raise NotFound(f"slot {self.slot_id} is closed: its upload session has ended")
            return os.dup(self.fd)

    def open_read_only(self) -> int:
        """A descriptor of its own (position and all) to hand over, which the caller closes.

        Thread-safe; :class:`NotFound` if the slot is closed.
        """
        with self._closing:
            if self.fd < 0:
                raise NotFound(f"slot {self.slot_id} is closed: its upload session has ended")
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)

    def close(self) -> None:
        """Unmap, and give memory and reservation back. Clients' mappings live on. Idempotent."""
        self.view.release()
        if self._map is not None:
            with contextlib.suppress(BufferError):  # somebody's view keeps it until it is dropped
                self._map.close()
            self._map = None
        with self._closing:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
        self._reservation.release()


class Window:
    """Bytes of a blob in memory, for clients of a blob that no local tier has room for.

    Filled once with :meth:`write`, then sealed: from then on nobody can change it, whoever holds a
    descriptor. One thread at a time while it is filled.
    """

    def __init__(self, num_bytes: int, reservation: Reservation) -> None:
        """Takes *reservation* over. :class:`ResourceExhausted` without descriptors."""
        self.size_bytes = num_bytes
        self.num_bytes = 0
        self._reservation = reservation
        try:
            self.fd = _sized_memfd("forebay-window", num_bytes, _SIZE_SEALS)
        except OSError as error:
            reservation.release()
            raise ResourceExhausted(
                f"no window of {num_bytes} bytes ({error.strerror}): raise the daemon's limits of "
                "memory and open files"
            ) from error

    def write(self, buffer: ReadableBuffer) -> None:
        """Append all of *buffer*. :class:`ResourceExhausted` if memory is not there."""
        view = memoryview(buffer).cast("B")
        while view.nbytes:
            try:
                count = os.pwrite(self.fd, view, self.num_bytes)
            except OSError as error:
                raise ResourceExhausted(
                    f"no memory for a window of {self.size_bytes} bytes ({error.strerror})"
                ) from error
            self.num_bytes += count
            view = view[count:]

    def seal(self) -> None:
        """Make it read-only for everybody, for ever."""
        self._reservation.allocated()
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)

    def open_read_only(self) -> int:
        """A descriptor of its own (position and all) to hand over, which the caller closes.

        Kernels before 6.7 map a sealed file shared only through a read-only descriptor.
        """
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)

    def close(self) -> None:
        """Give the daemon's descriptor and the reservation back. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._reservation.release()


class SlotPool:
    """Lends slots and windows, counted in one ledger. Thread-safe; ``close`` ends all.

    A released slot stays warm for its owner, and goes away when somebody else needs the memory. It
    never goes to another owner: the owner's name contains the uid. One that its client may still
    write to is discarded instead. A pinned one is taken back when its last pin goes: until then
    nobody else gets it, and it counts.
    """

    name: Final = "ram"
    kind: Final[Literal["ram"]] = "ram"
    location: Final = "memory"

    def __init__(
        self,
        limit_bytes: int,
        reserve_bytes: int = DEFAULT_RESERVE_BYTES,
        measure: Callable[[], int] = free_memory,
    ) -> None:
        """*limit_bytes* for all slots and windows; *reserve_bytes* of the machine stay free."""
        self._ledger = SpaceLedger(
            "tier ram",
            limit_bytes,
            reserve_bytes,
            measure,
            advice="have fewer writers at a time, write smaller shards, or raise ram-bytes",
        )
        self._lock = threading.Lock()
        self._warm: dict[str, list[Slot]] = {}
        self._lent: dict[str, Slot] = {}
        self._dropped: set[str] = set()
        self._pins: Counter[str] = Counter()
        self._given_back: dict[str, Callable[[Slot], None]] = {}  # pinned: what to do after the pin

    def acquire(
        self, owner: str, num_bytes: int, minimum_bytes: int, *, keeps_last: bool = False
    ) -> Slot:
        """A slot of at least *num_bytes*, or, where memory is short, of at least *minimum_bytes*.

        *owner* names the uid and what the slot is for (an attempt's rank, a writer): a slot that it
        released before is reused, that which was released first; with *keeps_last* the one that it
        released last only where memory is short, for what it holds may be read again.
        :class:`ResourceExhausted` with the numbers otherwise. Blocks while pages are faulted in
        (about 1 GB/s).
        """
        check_limit("slot bytes", num_bytes, MAX_UPLOAD_SLOT_BYTES, "send it in pieces")
        wanted = in_blocks(max(num_bytes, 1))
        minimum = min(wanted, in_blocks(max(minimum_bytes, 1)))
        slot = None
        if keeps_last and self._is_last(owner, wanted):
            with contextlib.suppress(ResourceExhausted):
                slot = Slot.create(owner, wanted, self._ledger.reserve(wanted))
        slot = slot or self._take_warm(owner, wanted) or self._make(owner, wanted, minimum)
        slot.num_uses += 1
        with self._lock:
            self._lent[slot.slot_id] = slot
        return slot

    def pin_warm(self, slot: Slot, num_uses: int) -> bool:
        """:meth:`pin` a *slot* that lies warm, as it was left after so many uses; False if it does
        not, or not any more. Its owner gets another one until :meth:`unpin`."""
        with self._lock:
            warm = self._warm.get(slot.owner, [])
            if slot.num_uses != num_uses:
                return False
            if slot in warm:
                warm.remove(slot)
                if not warm:
                    del self._warm[slot.owner]
                self._lent[slot.slot_id] = slot
                self._given_back[slot.slot_id] = self.release
            elif slot.slot_id not in self._given_back:
                return False
            self._pins[slot.slot_id] += 1
            return True

    def release(self, slot: Slot) -> None:
        """Take *slot* back and keep it warm for its owner. Idempotent."""
        with self._lock:
            if slot.slot_id in self._pins:
                self._given_back.setdefault(slot.slot_id, self.release)
                return
            if self._lent.pop(slot.slot_id, None) is None:
                return
            if slot.slot_id not in self._dropped:
                self._warm.setdefault(slot.owner, []).append(slot)
                return
            self._dropped.discard(slot.slot_id)
        slot.close()

    def discard(self, slot: Slot) -> None:
        """Take *slot* back and close it, so that nobody gets it again. Idempotent."""
        with self._lock:
            if slot.slot_id in self._pins:
                self._given_back[slot.slot_id] = self.discard
                return
            if self._lent.pop(slot.slot_id, None) is None:
                return
            self._dropped.discard(slot.slot_id)
        slot.close()

    def pin(self, slot: Slot) -> None:
        """Keep *slot*, which is lent, from being lent again or closed until :meth:`unpin`.

        Pins count. :class:`NotFound` if the slot has been taken back.
        """
        with self._lock:
            if slot.slot_id not in self._lent:
                raise NotFound(f"slot {slot.slot_id} is taken back: its upload session has ended")
            self._pins[slot.slot_id] += 1

    def unpin(self, slot: Slot) -> None:
        """End one :meth:`pin`; after the last one the slot goes where it was given back to."""
        with self._lock:
            self._pins[slot.slot_id] -= 1
            if self._pins[slot.slot_id]:
                return
            del self._pins[slot.slot_id]
            take_back = self._given_back.pop(slot.slot_id, None)
        if take_back is not None:
            take_back(slot)

    @contextlib.contextmanager
    def pinned(self, slot: Slot) -> Iterator[None]:
        """Inside, *slot* is pinned."""
        self.pin(slot)
        try:
            yield
        finally:
            self.unpin(slot)

    def drop_owner(self, owner: str) -> None:
        """Free what *owner* has warm, and what it still has on loan as soon as it is released."""
        with self._lock:
            idle = self._warm.pop(owner, [])
            self._dropped.update(key for key, slot in self._lent.items() if slot.owner == owner)
        for slot in idle:
            slot.close()

    def window(self, num_bytes: int) -> Window:
        """An empty window of *num_bytes*; its caller closes it."""
        wanted = max(num_bytes, 1)
        try:
            return Window(wanted, self._ledger.reserve(wanted))
        except ResourceExhausted:
            self._free_warm()
            return Window(wanted, self._ledger.reserve(wanted))

    def space(self) -> TierSpace:
        """Lent and warm slots and windows are *used*; nothing is published in this tier."""
        space = self._ledger.space()
        with self._lock:
            num_slots = len(self._lent) + sum(map(len, self._warm.values()))
        return TierSpace(
            limit_bytes=space.limit_bytes,
            used_bytes=space.used_bytes + space.reserved_bytes,
            reserved_bytes=0,
            free_bytes=space.free_bytes,
            num_files=num_slots,
        )

    @property
    def num_lent(self) -> int:
        """Slots that somebody has."""
        with self._lock:
            return len(self._lent)

    def num_lent_to(self, owner: str) -> int:
        """Slots that *owner* has, those held for it included; not what is only still read."""
        with self._lock:
            return sum(
                slot.owner == owner and key not in self._given_back
                for key, slot in self._lent.items()
            )

    def close(self) -> None:
        """Give all memory back; clients' mappings live on. Idempotent."""
        self._free_warm()
        with self._lock:
            lent, self._lent = list(self._lent.values()), {}
        for slot in lent:
            slot.close()

    def has_room(self, owner: str, num_bytes: int) -> bool:
        """Whether :meth:`acquire` has a slot of *num_bytes* for *owner*, as things stand."""
        wanted = in_blocks(max(num_bytes, 1))
        free_bytes = self._ledger.space().free_bytes
        with self._lock:
            own = self._warm.get(owner, [])
            warm_bytes = sum(one.capacity_bytes for idle in self._warm.values() for one in idle)
            has_fitting = any(one.capacity_bytes >= wanted for one in own)
        return has_fitting or free_bytes + warm_bytes >= wanted

    def _is_last(self, owner: str, wanted: int) -> bool:
        """Whether *owner* would get the slot that it released last."""
        with self._lock:
            warm = self._warm.get(owner, [])
            return not any(slot.capacity_bytes >= wanted for slot in warm[:-1])

    def _take_warm(self, owner: str, minimum: int) -> Slot | None:
        """The owner's smallest warm slot of at least *minimum* bytes."""
        with self._lock:
            warm = self._warm.get(owner, [])
            fitting = [slot for slot in warm if slot.capacity_bytes >= minimum]
            if not fitting:
                return None
            slot = min(fitting, key=lambda slot: slot.capacity_bytes)
            warm.remove(slot)
            if not warm:
                del self._warm[owner]
            return slot

    def _make(self, owner: str, wanted: int, minimum: int) -> Slot:
        """A new slot; warm ones make room for it: first others', then the owner's smaller ones."""
        try:
            reservation = self._ledger.reserve(wanted)
        except ResourceExhausted:
            self._free_warm(keep_owner=owner)
            room = self._ledger.space().free_bytes
            if room < wanted and (slot := self._take_warm(owner, max(minimum, room))):
                return slot
            self._free_warm()
            reservation = self._ledger.reserve_between(minimum, wanted)
        return Slot.create(owner, reservation.num_bytes, reservation)

    def _free_warm(self, keep_owner: str | None = None) -> None:
        with self._lock:
            idle = [
                slot for owner in self._warm if owner != keep_owner for slot in self._warm[owner]
            ]
            kept = self._warm.get(keep_owner) if keep_owner is not None else None
            self._warm = {keep_owner: kept} if keep_owner is not None and kept else {}
        for slot in idle:
            slot.close()
