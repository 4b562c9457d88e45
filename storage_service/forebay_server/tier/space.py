"""The space ledger: room is reserved before anything is accepted."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from forebay_server.tier.store import TierSpace
from forebay_wire.errors import ResourceExhausted, StorageError

BLOCK_BYTES: Final = 4096
"""Allocation is counted in these; file systems round up to them or to less."""

UNBOUNDED: Final = 1 << 62
"""Bytes free where nobody can say: an object store without a quota."""


def in_blocks(num_bytes: int) -> int:
    """*num_bytes* rounded up to whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def free_in_folder(folder: str | os.PathLike[str]) -> int:
    """Bytes that the file system of *folder* still gives to this user; StorageError if it is
    gone."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise StorageError(
            f"the room in folder {os.fspath(folder)} cannot be measured ({error.strerror}): was it "
            "removed, or is its disk not mounted?"
        ) from OSError(errno.ENODEV if error.errno == errno.ENOENT else error.errno, str(error))
    return found.f_bavail * found.f_frsize


def free_memory() -> int:
    """Bytes of memory that this process may still take: the machine's and its cgroup's."""
    free = UNBOUNDED
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        current = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return free  # no cgroup version 2, or its root, which has no limit
    return free if limit == "max" else min(free, max(0, int(limit) - current))


class Device:
    """What all ledgers on one file system have promised and not allocated. Thread-safe.

    Without it two tiers on one disk would each promise its last bytes.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held by whoever promises on this device, from measuring to promising."""
        self.pending_bytes = 0


_devices: Final[WeakValueDictionary[int, Device]] = WeakValueDictionary()
_devices_lock: Final = threading.Lock()


def device_of(folder: str | os.PathLike[str]) -> Device:
    """The device on which *folder* lies, the same object for all who have it; OSError."""
    number = os.stat(folder).st_dev
    with _devices_lock:
        found = _devices.get(number)
        if found is None:
            found = _devices[number] = Device()
        return found


class SpaceLedger:
    """Allocated bytes of one tier, kept in memory. Thread-safe.

    Room = min(limit - ledger, what the device has left - what is kept back for others). The ledger
    counts published files and reservations; bytes that a reservation has allocated already are
    missing on the device too and are not counted twice.
    """

    def __init__(
        self,
        what: str,
        limit_bytes: int,
        reserve_bytes: int,
        measure: Callable[[], int],
        *,
        advice: str = "delete datasets or generations, or raise the limit",
    ) -> None:
        """*what* names the tier in messages, *advice* says there what gives room; *limit_bytes* 0:
        none of its own; *reserve_bytes* stay free on the device; *measure* answers the bytes that
        the device has left."""
        self.what = what
        self._advice = advice
        self.limit_bytes = limit_bytes
        self.reserve_bytes = reserve_bytes
        self._measure = measure
        self._device = Device()
        self._used_bytes = 0
        self._num_files = 0
        self._reserved_bytes = 0

    def join(self, device: Device) -> None:
        """Count the promises of all others on *device*, too; before the first of its own."""
        self._device = device

    def reset(self, used_bytes: int, num_files: int) -> None:
        """Take what was found at start. Reservations stay."""
        with self._device.lock:
            self._used_bytes, self._num_files = used_bytes, num_files

    def reserve(self, num_bytes: int) -> Reservation:
        """A promise of *num_bytes*. :class:`ResourceExhausted` with the numbers if there is no
        room."""
        return self.reserve_between(num_bytes, num_bytes)

    def reserve_between(self, minimum_bytes: int, wanted_bytes: int) -> Reservation:
        """A promise of as much of *wanted_bytes* as there is room for, at least *minimum_bytes*
        (both rounded up to blocks)."""
        with self._device.lock:
            room = self._room() // BLOCK_BYTES * BLOCK_BYTES
            granted = min(room, in_blocks(wanted_bytes))
            if granted < in_blocks(minimum_bytes):
                raise self._refusal(in_blocks(minimum_bytes))
            self._reserved_bytes += granted
            self._device.pending_bytes += granted
            return Reservation(self, granted)

    def freed(self, num_bytes: int) -> None:
        """A published file of *num_bytes* allocated bytes is gone."""
        with self._device.lock:
            self._used_bytes = max(0, self._used_bytes - num_bytes)
            self._num_files = max(0, self._num_files - 1)

    def refusal(self, num_bytes: int) -> ResourceExhausted:
        """The error for *num_bytes* that the device refused although the ledger had room."""
        with self._device.lock:
            return self._refusal(num_bytes)

    def space(self) -> TierSpace:
        with self._device.lock:
            return TierSpace(
                limit_bytes=self.limit_bytes,
                used_bytes=self._used_bytes,
                reserved_bytes=self._reserved_bytes,
                free_bytes=self._room(),
                num_files=self._num_files,
            )

    def _room(self) -> int:
        room = self._measure() - self.reserve_bytes - self._device.pending_bytes
        if self.limit_bytes:
            room = min(room, self.limit_bytes - self._used_bytes - self._reserved_bytes)
        return max(0, room)

    def _refusal(self, num_bytes: int) -> ResourceExhausted:
        limit = f" of a limit of {self.limit_bytes}" if self.limit_bytes else ""
        return ResourceExhausted(
            f"{self.what} has no room: {num_bytes} bytes needed, {self._room()} free; "
            f"{self._num_files} files hold {self._used_bytes} bytes{limit}, running uploads "
            f"{self._reserved_bytes}, the device has {self._measure()} left of which "
            f"{self.reserve_bytes} stay free and {self._device.pending_bytes} are promised: "
            f"{self._advice}"
        )


class Reservation:
    """A promise of the ledger, until it is settled or released. One thread at a time."""

    def __init__(self, ledger: SpaceLedger, num_bytes: int) -> None:
        self._ledger = ledger
        self._allocated_bytes = 0
        self._open = True
        self.num_bytes = num_bytes

    def grow(self, num_bytes: int) -> None:
        """Add *num_bytes* to the promise. :class:`ResourceExhausted` leaves it as it was."""
        more = self._ledger.reserve(num_bytes)
        more._open = False
        self.num_bytes += more.num_bytes

    def allocated(self) -> None:
        """The device has given all promised bytes: its free space shows them."""
        ledger = self._ledger
        with ledger._device.lock:
            ledger._device.pending_bytes -= self.num_bytes - self._allocated_bytes
        self._allocated_bytes = self.num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Take up to *num_bytes* off a promise that nothing was allocated for."""
        ledger = self._ledger
        with ledger._device.lock:
            less = min(num_bytes, self.num_bytes - self._allocated_bytes) if self._open else 0
            self.num_bytes -= less
            ledger._reserved_bytes -= less
            ledger._device.pending_bytes -= less

    def settle(self, num_bytes: int) -> None:
        """The promise became a published file (or slot) of *num_bytes* allocated bytes."""
        self._end(num_bytes, 1)

    def release(self) -> None:
        """The promise is not needed. Idempotent; nothing after :meth:`settle`."""
        self._end(0, 0)

    def _end(self, used_bytes: int, num_files: int) -> None:
        if not self._open:
            return
        self._open = False
        ledger = self._ledger
        with ledger._device.lock:
            ledger._reserved_bytes -= self.num_bytes
            ledger._device.pending_bytes -= self.num_bytes - self._allocated_bytes
            ledger._used_bytes += used_bytes
            ledger._num_files += num_files
