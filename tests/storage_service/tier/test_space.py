"""The ledger: what is promised is there, counted once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from forebay_server.tier.space import (
    BLOCK_BYTES,
    Device,
    Reservation,
    SpaceLedger,
    device_of,
    in_blocks,
)
from forebay_wire.errors import ResourceExhausted

BLOCK = BLOCK_BYTES


def test_the_device_and_the_limit_both_bind() -> None:
    ledger = SpaceLedger("tier x", 10 * BLOCK, 2 * BLOCK, lambda: 7 * BLOCK)
    assert ledger.space().free_bytes == 5 * BLOCK
    ledger.reset(8 * BLOCK, 1)
    assert ledger.space().free_bytes == 2 * BLOCK


def test_a_refusal_tells_needed_free_and_holders() -> None:
    ledger = SpaceLedger("tier x", 10 * BLOCK, 0, lambda: 1 << 40)
    ledger.reset(6 * BLOCK, 3)
    ledger.reserve(BLOCK)
    with pytest.raises(ResourceExhausted) as caught:
        ledger.reserve(4 * BLOCK)
    message = caught.value.message
    for part in ("tier x", f"{4 * BLOCK} bytes needed", f"{3 * BLOCK} free", "3 files", "delete"):
        assert part in message


def test_as_much_as_there_is_but_at_least_the_minimum() -> None:
    ledger = SpaceLedger("tier x", 10 * BLOCK, 0, lambda: 1 << 40)
    assert ledger.reserve_between(1, 7 * BLOCK - 1).num_bytes == 7 * BLOCK
    assert ledger.reserve_between(1, 7 * BLOCK).num_bytes == 3 * BLOCK
    with pytest.raises(ResourceExhausted):
        ledger.reserve_between(1, 1)


class LedgerMachine(RuleBasedStateMachine):
    """A device that really allocates agrees with the ledger that guards it."""

    pending = Bundle("pending")
    files = Bundle("files")

    def __init__(self) -> None:
        super().__init__()
        self.device_bytes = 100 * BLOCK
        self.ledger = SpaceLedger("tier x", 60 * BLOCK, 5 * BLOCK, lambda: self.device_bytes)
        self.promised: dict[Reservation, int] = {}
        self.used_bytes = 0

    @rule(target=pending, size=st.integers(1, 40 * BLOCK))
    def reserve(self, size: int) -> Reservation | None:
        free = self.ledger.space().free_bytes
        if in_blocks(size) > free // BLOCK * BLOCK:
            with pytest.raises(ResourceExhausted):
                self.ledger.reserve(size)
            return None
        reservation = self.ledger.reserve(size)
        self.promised[reservation] = 0
        return reservation

    @rule(reservation=pending)
    def allocate(self, reservation: Reservation | None) -> None:
        if reservation in self.promised:
            self.device_bytes -= reservation.num_bytes - self.promised[reservation]
            self.promised[reservation] = reservation.num_bytes
            reservation.allocated()

    @rule(target=files, reservation=consumes(pending))
    def publish(self, reservation: Reservation | None) -> int:
        if reservation not in self.promised:
            return 0
        self.allocate(reservation)
        used = reservation.num_bytes // 2 // BLOCK * BLOCK
        self.device_bytes += reservation.num_bytes - used
        self.used_bytes += used
        del self.promised[reservation]
        reservation.settle(used)
        reservation.release()
        return used

    @rule(reservation=consumes(pending))
    def abort(self, reservation: Reservation | None) -> None:
        if reservation in self.promised:
            self.device_bytes += self.promised.pop(reservation)
            reservation.release()
            reservation.release()

    @rule(size=consumes(files))
    def delete(self, size: int) -> None:
        self.device_bytes += size
        self.used_bytes -= size
        self.ledger.freed(size)

    @invariant()
    def every_promise_can_be_kept(self) -> None:
        space = self.ledger.space()
        assert space.used_bytes == self.used_bytes
        promised = sum(reservation.num_bytes for reservation in self.promised)
        assert space.reserved_bytes == promised
        pending = promised - sum(self.promised.values())
        assert space.free_bytes == max(
            0,
            min(60 * BLOCK - self.used_bytes - promised, self.device_bytes - 5 * BLOCK - pending),
        )
        assert self.device_bytes - pending >= 5 * BLOCK


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_ledgers_on_one_device_do_not_promise_the_same_bytes_twice() -> None:
    device = Device()
    ledgers = [SpaceLedger(f"tier {n}", 0, 2 * BLOCK, lambda: 10 * BLOCK) for n in range(2)]
    for ledger in ledgers:
        ledger.join(device)
    first = ledgers[0].reserve(5 * BLOCK)
    assert ledgers[1].space().free_bytes == 3 * BLOCK
    with pytest.raises(ResourceExhausted, match=f"{5 * BLOCK} are promised"):
        ledgers[1].reserve(4 * BLOCK)
    first.grow(BLOCK)
    assert [ledger.space().free_bytes for ledger in ledgers] == [2 * BLOCK] * 2
    first.allocated()  # the device shows it from now on: here it has endless room
    assert ledgers[1].space().free_bytes == 8 * BLOCK
    second = ledgers[1].reserve(3 * BLOCK)
    first.settle(6 * BLOCK)
    second.release()
    assert [ledger.space().free_bytes for ledger in ledgers] == [8 * BLOCK] * 2


def test_folders_of_one_file_system_are_one_device(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert device_of(tmp_path) is device_of(tmp_path / "a")
    assert device_of(tmp_path) is not device_of("/proc")
