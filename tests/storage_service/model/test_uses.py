"""The uses of shards are those of the loader's own way from positions to rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.uses import ReadOrder, windows
from forebay_wire.order import Cut, Order, split_rows
from forebay_wire.selection import Ring, Stored

MANIFEST = "ab" * 32


@st.composite
def orders(draw):
    """(order, first rows of shards, the rows that it reads: all, in the order of the selection)."""
    rows = draw(st.integers(1, 200))
    starts = shard_starts(rows, draw(st.integers(1, 50)))
    of = np.arange(rows)
    selection: Ring | Stored | None = None
    samples = rows
    kind = draw(st.sampled_from(["all", "ring", "stored"]))
    if kind == "ring":
        samples = draw(st.integers(1, rows))
        seed, start = draw(st.integers(0, 9)), draw(st.integers(0, rows - 1))
        selection = Ring(seed, start)
        of = np.roll(split_rows(MANIFEST, rows, seed, np.arange(rows)), -start)
    if kind == "stored":
        of = np.array(sorted(draw(st.sets(st.integers(0, rows - 1), min_size=1))))
        samples = len(of)
        selection = Stored(tuple(np.histogram(of, starts)[0].tolist()))
    ranks = draw(st.integers(1, 4))
    order = ReadOrder(
        manifest=MANIFEST,
        identity=f"{MANIFEST}/",
        num_samples=samples,
        num_version_rows=rows,
        selection=selection,
        shuffle=draw(st.sampled_from(["none", "full"])),
        seed=draw(st.integers(0, 99)),
        global_batch_size=draw(st.integers(1, 40)),
        last_batch=draw(st.sampled_from(["keep", "pad", "drop"])),
        rank=draw(st.integers(0, ranks - 1)),
        num_ranks=ranks,
        num_epochs=draw(st.integers(1, 3)),
    )
    return order, starts, of


def shard_starts(rows: int, size: int) -> np.ndarray:
    return np.array([*range(0, rows, size), rows], dtype=np.int64)


def uses_by_reading(order: ReadOrder, starts, of, epoch: int, position: int):
    """What a loader does, step by step."""
    while epoch < order.num_epochs:
        cut = Cut(order.num_samples, order.global_batch_size, order.last_batch, position)
        samples = Order(order.num_samples, order.shuffle, order.seed, epoch, order.identity)
        for step in range(cut.num_steps):
            part = cut.part(step, order.rank, order.num_ranks)
            rows = of[samples.at(part.positions(order.num_samples))]
            for shard in sorted(set(np.searchsorted(starts, rows, side="right") - 1)):
                yield order.time(epoch, cut.bounds(step)[0]), int(shard)
        epoch, position = epoch + 1, 0


@given(orders(), st.integers(1, 64), st.data())
def test_the_uses_are_what_a_loader_reads(drawn, window, data):
    order, starts, of = drawn
    epoch = data.draw(st.integers(0, order.num_epochs - 1))
    position = data.draw(st.integers(0, order.num_samples))
    found = list(windows(order, starts, epoch, position, window))
    uses = [
        (time, shard)
        for one in found
        for time, shard in zip(one.times.tolist(), one.shards.tolist(), strict=True)
    ]
    assert uses == list(uses_by_reading(order, starts, of, epoch, position))
    stops = [one.stop for one in found]
    assert all(before <= after for before, after in pairwise(stops))
    assert all(one.times.max(initial=-1) < one.stop for one in found)


def test_a_window_costs_what_it_looks_at_whatever_the_epoch():
    order = ReadOrder(
        MANIFEST, "x/", 10**12, 10**12, None, "full", 1, 256, "keep", rank=3, num_ranks=8
    )
    starts = np.arange(0, 10**12 + 1, 10**8, dtype=np.int64)
    found = windows(order, starts, 5, 10**11)
    first, second = next(found), next(found)
    assert first.times[0] == order.time(5, 10**11)
    assert first.stop == second.times[0]
    assert len(first.times) <= 1 << 14


def test_batches_larger_than_the_dataset_that_are_dropped_end_the_plan():
    order = ReadOrder(MANIFEST, "x/", 10, 10, None, "none", 1, 16, "drop", rank=0, num_ranks=1)
    assert list(windows(order, shard_starts(10, 5), 0, 0)) == []
