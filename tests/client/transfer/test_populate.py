"""Populating a mapping: every page is there afterwards, or there is an error and no signal."""

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from forebay.transfer import populate
from forebay.transfer.populate import PAGE, WORTH_BYTES, populate_read

NUM_BYTES = 4 << 20


@pytest.fixture(params=["by single pages", "page by page"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "page by page":
        monkeypatch.setattr(populate._around_faults, "_is_refused", True)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(NUM_BYTES))
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def mapped(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, NUM_BYTES, prot=mmap.PROT_READ)


def address_of(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def num_present(address: int, num_bytes: int) -> int:
    """Pages that the page table has: bit 63 of each entry of /proc/self/pagemap."""
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(address // PAGE * 8)
        entries = np.frombuffer(pages.read(num_bytes // PAGE * 8), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum())


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("num_bytes", [PAGE, WORTH_BYTES - PAGE, WORTH_BYTES, NUM_BYTES])
def test_every_page_is_mapped_afterwards(file: int, num_bytes: int) -> None:
    memory = mapped(file)
    assert populate_read(address_of(memory), num_bytes) == 0
    assert num_present(address_of(memory), num_bytes) == num_bytes // PAGE


@pytest.mark.usefixtures("_way")
def test_an_unaligned_range_is_mapped_with_both_ends(file: int) -> None:
    memory = mapped(file)
    address = address_of(memory)
    assert populate_read(address + PAGE + 7, NUM_BYTES - 3 * PAGE) == 0
    assert num_present(address + PAGE, NUM_BYTES - 2 * PAGE) == NUM_BYTES // PAGE - 2


@pytest.mark.usefixtures("_way")
def test_a_file_cut_under_the_mapping_is_an_error(file: int) -> None:
    memory = mapped(file)
    os.ftruncate(file, NUM_BYTES // 2)
    assert populate_read(address_of(memory), NUM_BYTES) == errno.EFAULT
    assert populate_read(address_of(memory), NUM_BYTES // 2) == 0


def test_pages_that_are_not_cached_are_read(file: int) -> None:
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    memory = mapped(file)
    assert populate_read(address_of(memory), NUM_BYTES) == 0
    assert num_present(address_of(memory), NUM_BYTES) == NUM_BYTES // PAGE


def test_a_forked_child_populates_its_own_memory(file: int) -> None:
    assert populate_read(address_of(mapped(file)), NUM_BYTES) == 0
    child = os.fork()
    if child == 0:
        memory = mapped(file)
        good = populate_read(address_of(memory), NUM_BYTES) == 0
        good = good and num_present(address_of(memory), NUM_BYTES) == NUM_BYTES // PAGE
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_may_populate_at_once(file: int) -> None:
    memory = mapped(file)
    results: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(populate_read(address_of(memory), NUM_BYTES))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0, 0, 0]
