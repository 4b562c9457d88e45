"""Memory that a GPU copies to by itself: registered once, let go before it is unmapped."""

import mmap

import pytest

from forebay.checkpoint.overlap_cuda import RegisteredMemory


class Runtime:
    """What CUDA's runtime is asked for; there is no GPU here."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.registered: dict[int, int] = {}
        self.num_calls = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address not in self.registered
        self.num_calls += 1
        if not self.status:
            self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_a_slot_is_registered_whole_and_once_however_much_of_it_is_used() -> None:
    runtime, slot = Runtime(), mmap.mmap(-1, 1 << 16)
    memory = RegisteredMemory(runtime)
    for used in (100, 5000, 1 << 16):
        assert memory.register(memoryview(slot)[:used])
    assert runtime.num_calls == 1
    assert list(runtime.registered.values()) == [1 << 16]


def test_two_slots_stay_registered_and_the_one_used_least_lately_goes() -> None:
    runtime, slots = Runtime(), [mmap.mmap(-1, 4096 * (n + 1)) for n in range(3)]
    memory = RegisteredMemory(runtime)
    for number in (0, 1, 0, 2):
        memory.register(memoryview(slots[number]))
    assert sorted(runtime.registered.values()) == [4096, 3 * 4096]
    memory.close()
    assert not runtime.registered
    for slot in slots:
        slot.close()  # nobody holds it any more


def test_memory_that_is_registered_cannot_be_unmapped() -> None:
    slot = mmap.mmap(-1, 4096)
    memory = RegisteredMemory(Runtime())
    memory.register(memoryview(slot))
    with pytest.raises(BufferError):
        slot.close()
    memory.close()
    slot.close()


def test_what_cuda_refuses_is_no_error_and_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime, slot = Runtime(status=2), mmap.mmap(-1, 4096)
    memory = RegisteredMemory(runtime)
    assert not memory.register(memoryview(slot))
    assert "cannot register 4096 bytes" in caplog.text
    runtime.status = 0
    assert memory.register(memoryview(slot))
    memory.close()
