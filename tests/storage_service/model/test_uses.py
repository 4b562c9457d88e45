"""The uses of shards are those of the loader's own way from positions to rows."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from forebay_server.model.tracks import Track, Tracks, tracks_of
from forebay_server.model.uses import ONE_TRACK, ReadOrder, windows
from forebay_wire.blocks import BlockParameters, starts_of
from forebay_wire.errors import InvalidRequest
from forebay_wire.manifest import DatasetManifest, LayerRef, ShardRef
from forebay_wire.order import Cut, Order, split_rows
from forebay_wire.permutation import derive_key, permute
from forebay_wire.selection import Nested, Ring, Rule, Stored, base_of

MANIFEST = "ab" * 32
WITHIN = "cd" * 32


@st.composite
def orders(draw):
    """(order, first rows of shards, the rows that it reads: all, in the order of the selection)."""
    rows = draw(st.integers(1, 200))
    starts = shard_starts(rows, draw(st.integers(1, 50)))
    of = np.arange(rows)
    selection: Rule | None = None
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
    for _ in range(draw(st.integers(0, 2)) if selection else 0):
        seed, start = draw(st.integers(0, 9)), draw(st.integers(0, samples - 1))
        selection = Nested(selection, samples, WITHIN, seed, start)
        places = permute(derive_key("fold", WITHIN, seed), samples, np.arange(samples))
        of = of[np.roll(places, -start)]
        samples = draw(st.integers(1, samples))
    ranks = draw(st.integers(1, 4))
    shuffle = draw(st.sampled_from(["none", "full", "block"]))
    blocks = None
    if shuffle == "block":
        has_shards = selection is None or isinstance(selection, Stored)
        block_rows = draw(st.integers(0 if has_shards else 1, 20))
        blocks = BlockParameters(draw(st.integers(1, 4)), block_rows, draw(st.integers(1, 6)))
    order = ReadOrder(
        manifest=MANIFEST,
        identity=f"{MANIFEST}/",
        num_samples=samples,
        num_version_rows=rows,
        selection=selection,
        shuffle=shuffle,
        seed=draw(st.integers(0, 99)),
        global_batch_size=draw(st.integers(1, 40)),
        last_batch=draw(st.sampled_from(["keep", "pad", "drop"])),
        rank=draw(st.integers(0, ranks - 1)),
        num_ranks=ranks,
        num_epochs=draw(st.integers(1, 3)),
        blocks=blocks,
    )
    return order, starts, of


def shard_starts(rows: int, size: int) -> np.ndarray:
    return np.array([*range(0, rows, size), rows], dtype=np.int64)


def uses_by_reading(order: ReadOrder, starts, of, epoch: int, position: int, tracks=ONE_TRACK):
    """What a loader does, step by step."""
    n, layout, lanes = order.num_samples, None, 1
    if order.blocks is not None:
        counts = np.histogram(np.sort(of), starts)[0].tolist()  # rows of each shard that it reads
        layout, lanes = order.blocks.layout(n, starts_of(counts)), order.blocks.lanes
    while epoch < order.num_epochs:
        cut = Cut(n, order.global_batch_size, order.last_batch, position, lanes)
        samples = Order(n, order.shuffle, order.seed, epoch, order.identity, layout)
        for step in range(cut.num_steps):
            part = cut.part(step, order.rank, order.num_ranks)
            rows = of[samples.at(part.positions(order.num_samples))]
            places = [(starts, np.arange(len(starts)))] if tracks.reads_base else []
            places += [(track.starts, track.numbers) for track in tracks.beside]
            used = set()
            for borders, numbers in places:
                used.update(numbers[np.searchsorted(borders, rows, side="right") - 1].tolist())
            for shard in sorted(used):
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


@st.composite
def tracks_beside(draw, starts):
    """Shards of layers of any sizes, the last of which may be the version's own."""
    rows, own = int(starts[-1]), len(starts) - 1
    numbers = itertools.count(own)
    beside = []
    for _ in range(draw(st.integers(1, 3))):
        covered = draw(st.sampled_from(starts[1:].tolist()))
        cuts = sorted(draw(st.sets(st.integers(1, covered)))) if covered > 1 else []
        inner = [0, *(cut for cut in cuts if cut < covered), covered]
        rest = [int(one) for one in starts if one > covered]
        first = own - len(rest)
        beside.append(
            Track(
                np.array([*inner, *rest]),
                np.array([*(next(numbers) for _ in inner[1:]), *range(first, own)], dtype=np.int64),
            )
        )
        assert beside[-1].starts[-1] == rows
    return Tracks(draw(st.booleans()), tuple(beside))


@given(orders(), st.integers(1, 64), st.data())
def test_the_uses_of_columns_in_several_places_are_what_a_loader_reads(drawn, window, data):
    order, starts, of = drawn
    if order.selection is not None:
        base, _ = base_of(order.selection, np.arange(0))
        assume(not isinstance(base, Stored))  # see the next test
    tracks = data.draw(tracks_beside(starts))
    found = windows(order, starts, 0, 0, window, tracks)
    uses = [
        (time, shard)
        for one in found
        for time, shard in zip(one.times.tolist(), one.shards.tolist(), strict=True)
    ]
    assert uses == list(uses_by_reading(order, starts, of, 0, 0, tracks))


def test_stored_rows_are_looked_for_where_they_would_lie_evenly():
    """Which rows they are nobody reads for a plan: of the other places it is an estimate."""
    starts = shard_starts(1000, 500)
    beside = Track(shard_starts(1000, 100), np.arange(2, 12))
    order = ReadOrder(
        MANIFEST, "x/", 20, 1000, Stored((10, 10)), "none", 1, 1, "keep", 0, 1, num_epochs=1
    )
    found = list(windows(order, starts, 0, 0, tracks=Tracks(True, (beside,))))
    uses = dict.fromkeys(range(20), ())
    for one in found:
        for time, shard in zip(one.times.tolist(), one.shards.tolist(), strict=True):
            uses[time] = (*uses[time], shard)
    assert uses == {n: (n // 10, 2 + n // 2) for n in range(20)}


def test_columns_are_looked_for_where_they_lie():
    shard = lambda blob, rows: ShardRef(blob, 100, rows, (rows,))  # noqa: E731
    version = DatasetManifest(
        "d",
        3,
        None,
        "now",
        (shard("a", 10), shard("b", 10), shard("c", 5)),
        shard_schemas=("then", "now"),
        layers=(
            LayerRef(("y", "z"), "yz", (shard("y0", 15), shard("y1", 5)), 2),
            LayerRef(("w",), "w", (shard("w0", 25),), 3),
        ),
    )
    every = [one.blob for one in version.every_shard()]
    assert every == ["a", "b", "c", "y0", "y1", "w0"]

    def read(*columns, counts=None):
        return [every[n] for n in tracks_of(version, columns).shards(3, counts)]

    assert read("x") == ["a", "b", "c"]
    assert read("z") == ["c", "y0", "y1"]
    assert read("w") == ["w0"]
    assert read("x", "w") == ["a", "b", "c", "w0"]
    assert read() == every
    assert read("x", "w", counts=(0, 3, 0)) == ["b", "w0"]


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


def test_a_block_shuffle_of_many_shards_needs_few_of_them_at_a_time():
    blocks = BlockParameters(16, 0, lanes=8)
    order = ReadOrder(
        MANIFEST,
        "x/",
        10**10,
        10**10,
        None,
        "block",
        *(1, 4096, "keep", 3, 8),
        blocks=blocks,
    )
    starts = np.arange(0, 10**10 + 1, 10**5, dtype=np.int64)
    found = windows(order, starts, 5, 10**9)
    shards = [set(next(found).shards.tolist()) for _ in range(4)]
    # Rank 3 reads lane 3 alone: one window of shards, or the end of one and the start of the next.
    assert len(set().union(*shards)) <= 32


def test_blocks_that_the_samples_do_not_have_are_refused_at_once():
    order = ReadOrder(
        MANIFEST,
        "x/",
        *(10, 20, Ring(0, 0), "block", 1, 4, "keep", 0, 1),
        blocks=BlockParameters(4),
    )
    with pytest.raises(InvalidRequest, match="block_rows"):
        windows(order, shard_starts(20, 5), 0, 0)


@pytest.mark.parametrize(("shuffle", "blocks"), [("full", BlockParameters(4)), ("block", None)])
def test_only_a_block_shuffle_has_blocks(shuffle, blocks):
    with pytest.raises(InvalidRequest, match="window_blocks"):
        ReadOrder(MANIFEST, "x/", 10, 10, None, shuffle, 1, 4, "keep", 0, 1, blocks=blocks)
