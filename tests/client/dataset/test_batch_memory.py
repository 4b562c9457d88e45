"""Large batches use memory again that nobody holds, and none that somebody does."""

import errno
import mmap
import os

import numpy as np
import pytest
import torch
import torch.utils.dlpack
from hypothesis import given
from hypothesis import strategies as st

from forebay.dataset.memory import MAX_FREE_BYTES, SMALLEST_BYTES, BatchMemory
from forebay_wire.limits import MIB

BYTES = np.dtype(np.uint8)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_what_is_let_go_of_is_used_again():
    memory = BatchMemory()
    first = memory.empty((8, MIB), BYTES)
    place = address(first)
    tensor = torch.from_numpy(first)[3:5]  # a view holds it, too
    del first
    assert memory.free_bytes == 0
    del tensor
    assert memory.free_bytes == 8 * MIB
    assert address(memory.empty((2, MIB), np.dtype(np.float32))) == place
    assert address(memory.empty((MIB,), np.dtype(np.float32))) != place, "it is twice too large"
    memory.clear()
    assert memory.free_bytes == 0


def test_small_arrays_are_not_its_business():
    memory = BatchMemory()
    memory.empty((SMALLEST_BYTES - 1,), BYTES)
    assert memory.free_bytes == 0


@given(st.lists(st.tuples(st.integers(4, 40), st.booleans()), max_size=30))
def test_no_two_share_memory_and_what_is_free_is_bounded(steps):
    memory = BatchMemory()
    held: list[tuple[int, np.ndarray]] = []
    for number, (size, lets_go) in enumerate(steps):
        array = memory.empty((size * MIB,), BYTES)
        array[:: 64 * 1024] = number % 251
        held.append((number, array))
        if lets_go:
            del held[number % len(held)]
        del array
        for old, kept in held:
            assert (kept[:: 64 * 1024] == old % 251).all()
        assert memory.free_bytes <= MAX_FREE_BYTES


def test_a_forked_child_has_its_own():
    memory = BatchMemory()
    array = memory.empty((4, MIB), BYTES)
    array[:] = 1
    child = os.fork()
    if child == 0:
        array[:] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (array == 1).all()


def test_huge_pages_are_no_condition(monkeypatch):
    """macOS has no such advice, and kernels without them refuse it."""

    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", Refusing)
        assert BatchMemory().empty((4, MIB), BYTES).shape == (4, MIB)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert BatchMemory().empty((4, MIB), BYTES).shape == (4, MIB)


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.view(torch.float32)[1:],
        lambda tensor: tensor.numpy(),
        lambda tensor: np.from_dlpack(tensor),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
    ],
)
def test_whatever_leads_to_the_memory_holds_it(hold):
    memory = BatchMemory()
    tensor = torch.from_numpy(memory.empty((4, MIB), BYTES))
    kept = hold(tensor)
    del tensor
    assert memory.free_bytes == 0
    del kept
    assert memory.free_bytes == 4 * MIB
