"""The pool of warm buffers: nobody sees another's bytes, and memory is used again."""

import gc

import numpy as np
import pyarrow as pa

from forebay.transfer.window import WindowPool
from forebay_wire.limits import KIB, MIB


def test_buffer_comes_back_when_its_last_view_dies() -> None:
    pool = WindowPool()
    window = pool.lend(100 * KIB)
    array = np.frombuffer(window, np.uint8)[10:20]
    del window
    gc.collect()
    assert (pool.lent_bytes, pool.idle_bytes) == (128 * KIB, 0)
    del array
    gc.collect()
    assert (pool.lent_bytes, pool.idle_bytes) == (0, 128 * KIB)


def test_arrow_buffers_hold_it_too() -> None:
    pool = WindowPool()
    buffer = pa.py_buffer(pool.lend(MIB)).slice(5, 10)
    gc.collect()
    assert pool.lent_bytes == MIB
    del buffer
    gc.collect()
    assert pool.lent_bytes == 0


def test_lent_memory_is_lent_once() -> None:
    pool = WindowPool()
    first, second = pool.lend(KIB), pool.lend(KIB)
    first[:] = b"1" * KIB
    second[:] = b"2" * KIB
    assert first == b"1" * KIB


def test_warm_memory_is_used_again() -> None:
    pool = WindowPool()
    pool.lend(MIB)[0] = 77
    gc.collect()
    assert pool.lend(MIB - 5)[0] == 77


def test_idle_memory_is_bounded() -> None:
    pool = WindowPool(keep_bytes=2 * MIB)
    windows = [pool.lend(MIB) for _ in range(5)]
    del windows
    gc.collect()
    assert pool.idle_bytes == 2 * MIB
    assert pool.lent_bytes == 0
