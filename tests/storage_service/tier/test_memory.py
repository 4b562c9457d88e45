"""Slots: shared memory whose size is fixed, whose owner is fixed, and that is counted."""

from __future__ import annotations

import mmap
import os

import pytest

from forebay_server.tier.memory import SlotPool
from forebay_wire.errors import InvalidRequest, LimitExceeded, NotFound, ResourceExhausted

MIB = 1 << 20


@pytest.fixture
def pool() -> SlotPool:
    return SlotPool(16 * MIB, reserve_bytes=0)


def test_daemon_and_client_see_the_same_bytes(pool: SlotPool) -> None:
    slot = pool.acquire("0:run", 3 * MIB, MIB)
    descriptor = slot.duplicate()
    with mmap.mmap(descriptor, slot.capacity_bytes) as memory:
        memory[MIB : MIB + 5] = b"hello"
        slot.view[:3] = b"abc"
        assert memory[:3] == b"abc"
    os.close(descriptor)
    buffer = bytearray(5)
    slot.read_into(MIB, buffer)
    assert buffer == b"hello"
    pool.close()


def test_nobody_can_change_a_slots_size(pool: SlotPool) -> None:
    slot = pool.acquire("0:run", MIB, MIB)
    for size in (0, 2 * MIB):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(slot.fd, size)
    pool.close()


def test_a_slot_is_faulted_in_from_birth(pool: SlotPool) -> None:
    slot = pool.acquire("0:run", 8 * MIB, MIB)
    assert os.fstat(slot.fd).st_blocks * 512 == 8 * MIB
    pool.close()


def test_reading_outside_a_slot_is_refused(pool: SlotPool) -> None:
    slot = pool.acquire("0:run", MIB, MIB)
    for offset in (-1, MIB - 3, 1 << 40):
        with pytest.raises(InvalidRequest, match="outside"):
            slot.read_into(offset, bytearray(4))
    pool.close()


def test_a_released_slot_stays_warm_for_its_owner_only(pool: SlotPool) -> None:
    slot = pool.acquire("0:one", 4 * MIB, MIB)
    pool.release(slot)
    pool.release(slot)  # idempotent
    assert pool.acquire("0:two", 4 * MIB, MIB) is not slot
    assert pool.acquire("0:one", 2 * MIB, MIB) is slot
    assert pool.acquire("0:one", 2 * MIB, MIB) is not slot
    pool.close()


def test_short_memory_grants_less_but_never_less_than_the_minimum(pool: SlotPool) -> None:
    first = pool.acquire("0:one", 12 * MIB, MIB)
    second = pool.acquire("0:two", 12 * MIB, MIB)
    assert second.capacity_bytes == 4 * MIB
    with pytest.raises(ResourceExhausted, match=rf"{MIB} bytes needed, 0 free"):
        pool.acquire("0:three", 12 * MIB, MIB)
    pool.release(first)  # warm memory goes to who needs it
    assert pool.acquire("0:three", 12 * MIB, MIB).capacity_bytes == 12 * MIB
    with pytest.raises(NotFound):
        first.duplicate()
    pool.close()


def test_a_smaller_warm_slot_of_the_owner_is_better_than_none(pool: SlotPool) -> None:
    small = pool.acquire("0:one", 4 * MIB, MIB)
    pool.acquire("0:two", 12 * MIB, MIB)
    pool.release(small)
    assert pool.acquire("0:one", 8 * MIB, MIB) is small
    pool.close()


def test_a_dropped_owner_gives_everything_back(pool: SlotPool) -> None:
    warm = pool.acquire("0:one", 4 * MIB, MIB)
    lent = pool.acquire("0:one", 4 * MIB, MIB)
    pool.release(warm)
    pool.drop_owner("0:one")
    assert pool.space().used_bytes == 4 * MIB
    pool.release(lent)
    assert (pool.space().used_bytes, pool.space().num_files) == (0, 0)


def test_the_machines_memory_is_a_limit_too() -> None:
    pool = SlotPool(1 << 40, reserve_bytes=MIB, measure=lambda: 3 * MIB)
    assert pool.acquire("0:one", 100 * MIB, MIB).capacity_bytes == 2 * MIB
    pool.close()


def test_a_slot_larger_than_any_machine_is_refused(pool: SlotPool) -> None:
    with pytest.raises(LimitExceeded):
        pool.acquire("0:one", 1 << 50, MIB)


def test_a_window_is_read_only_for_ever_once_sealed(pool: SlotPool) -> None:
    window = pool.window(2 * MIB)
    window.write(b"a" * MIB)
    window.write(b"b" * MIB)
    window.seal()
    descriptor = window.open_read_only()
    with mmap.mmap(descriptor, 2 * MIB, prot=mmap.PROT_READ) as memory:
        assert memory[MIB - 1 : MIB + 1] == b"ab"
    with pytest.raises(PermissionError):
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_TRUNC))
    writable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # same user: the seal holds
    with pytest.raises(PermissionError):
        os.pwrite(writable, b"x", 0)
    os.close(writable)
    window.close()
    assert pool.space().used_bytes == 0
    assert os.pread(descriptor, 1, 0) == b"a"
    os.close(descriptor)


def test_windows_push_warm_slots_out(pool: SlotPool) -> None:
    pool.release(pool.acquire("0:one", 12 * MIB, MIB))
    pool.window(10 * MIB).close()
    with pytest.raises(ResourceExhausted):
        pool.window(17 * MIB)


def test_closing_gives_all_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pool = SlotPool(16 * MIB, reserve_bytes=0)
    pool.release(pool.acquire("0:one", MIB, MIB))
    pool.acquire("0:two", MIB, MIB)
    pool.close()
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before
