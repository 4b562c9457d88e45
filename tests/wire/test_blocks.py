"""The block shuffle and its lanes: exact like every order, and near to where it reads."""

import tracemalloc

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forebay_wire.blocks import MAX_BLOCKS, MAX_LANES, BlockParameters
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import Cut, Order
from forebay_wire.permutation import derive_key, permute, permute_each, unpermute

TEN_BILLION = 10**10
NUM_SHARDS = 100_003

FIXED_EVEN = [1, 16, 0, 17, 2, 15, 8, 4, 11, 5, 9, 13, 7, 12, 10, 3, 6, 14]
FIXED_UNEVEN = [2, 14, 12, 0, 15, 10, 3, 5, 7, 1, 16, 9, 4, 17, 8, 13, 6, 11]
FIXED_DEEP = [5785948949, 6856216074, 9703663478]

sizes = st.one_of(st.integers(1, 64), st.integers(1, 1 << 40))
last_batches = st.sampled_from(["keep", "pad", "drop"])


def starts_of(shard_rows) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.array(shard_rows, dtype=np.int64))))


def even(n, rows, window, lanes=1, *, seed=0, epoch=0) -> Order:
    layout = BlockParameters(window, rows, lanes).layout(n, None)
    return Order(n, "block", seed, epoch, "m/", layout)


def uneven(shard_rows, window, lanes=1, *, seed=0, epoch=0) -> Order:
    starts = starts_of(shard_rows)
    n = int(starts[-1])
    return Order(n, "block", seed, epoch, "m/", BlockParameters(window, 0, lanes).layout(n, starts))


@st.composite
def orders(draw, max_samples=400):
    """(order, lanes, the first row of each block and, last, the number of rows)."""
    lanes, window = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    seed, epoch = draw(st.integers(0, 99)), draw(st.integers(0, 9))
    if draw(st.booleans()):
        n, rows = draw(st.integers(1, max_samples)), draw(st.integers(1, 50))
        starts = np.array([*range(0, n, rows), n])
        return even(n, rows, window, lanes, seed=seed, epoch=epoch), lanes, starts
    shard_rows = draw(st.lists(st.integers(0, 40), min_size=1, max_size=10).filter(any))
    order = uneven(shard_rows, window, lanes, seed=seed, epoch=epoch)
    return order, lanes, np.unique(starts_of(shard_rows))


# The definition of docs/formats/order.md, word for word, one sample at a time.

WORD = (1 << 64) - 1


def mixed(number: int) -> int:
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & WORD
    return number ^ (number >> 31)


def permuted(key: bytes, n: int, value: int, tweak: int = 0) -> int:
    digest = blake3(key).digest(length=64)
    keys = [int.from_bytes(digest[i : i + 8], "little") ^ mixed(tweak) for i in range(0, 64, 8)]
    a = next(a for a in range(n + 1) if a * a >= n)
    sizes = (a, -(-n // a))
    while True:
        halves = list(divmod(value, sizes[1]))
        for i, round_key in enumerate(keys):
            h = (halves[1 - i % 2] ^ round_key) * 0x9E3779B97F4A7C15 & WORD
            h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93 & WORD
            f = (h >> 32) * sizes[i % 2] >> 32
            halves[i % 2] = (halves[i % 2] + f) % sizes[i % 2]
        value = halves[0] * sizes[1] + halves[1]
        if value < n:
            return value


def defined(starts: list[int], window: int, lanes: int, seed: int, epoch: int) -> list[int]:
    """All rows in the order of their positions."""
    n, m = starts[-1], len(starts) - 1
    block_key, row_key = (derive_key(what, "m/", seed, epoch) for what in ("blocks", "rows"))
    rows_of = [list(range(starts[b], starts[b + 1])) for b in range(m)]
    dealt = [rows_of[permuted(block_key, m, place)] for place in range(m)]
    slots = [(place, row) for place, rows in enumerate(dealt) for row in rows]
    order, start = [-1] * n, 0
    for lane in range(lanes):
        own = slots[start : start + len(range(lane, n, lanes))]
        num_blocks = own[-1][0] - own[0][0] + 1 if own else 0
        num_windows = -(-num_blocks // window)
        taken = 0
        for number in range(num_windows):
            end = own[0][0] + (number + 1) * num_blocks // num_windows
            rows = [row for place, row in own[taken:] if place < end]
            for i in range(len(rows)):
                source = permuted(row_key, len(rows), i, start + taken)
                order[lane + (taken + i) * lanes] = rows[source]
            taken += len(rows)
        start += len(own)
    return order


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    *(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9)),
)
def test_the_order_is_what_its_definition_says(shard_rows, window, lanes, seed, epoch):
    order = uneven(shard_rows, window, lanes, seed=seed, epoch=epoch)
    starts = starts_of(shard_rows).tolist()
    found = order.between(0, order.num_samples).tolist()
    assert found == defined(starts, window, lanes, seed, epoch)


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 12), *(st.integers(1, 5), st.integers(1, 5)))
def test_equal_blocks_are_ordered_like_shards(n, rows, window, lanes):
    shards = [min(rows, n - start) for start in range(0, n, rows)]
    found = even(n, rows, window, lanes, seed=2, epoch=1).between(0, n).tolist()
    assert found == uneven(shards, window, lanes, seed=2, epoch=1).between(0, n).tolist()


# Permutations.


@given(sizes, st.integers(0, 99), st.data())
@example(1 << 40, 0, None)
@example(1, 0, None)
def test_a_permutation_of_up_to_2_to_the_40_samples_has_an_inverse(n, seed, data):
    key = derive_key("test", seed)
    positions = np.unique(np.linspace(0, n - 1, 200).astype(np.int64))
    if data is not None:
        chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
        positions = np.array(chosen)
    found = permute(key, n, positions)
    assert found.min() >= 0
    assert found.max() < n
    assert len(set(found.tolist())) == len(positions)
    assert unpermute(key, n, found).tolist() == positions.tolist()
    assert permute(key, n, unpermute(key, n, positions)).tolist() == positions.tolist()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 99))
def test_many_permutations_at_once_are_each_a_bijection(each, seed):
    sizes_of = np.repeat(each, each)
    starts = np.repeat(np.cumsum(each) - each, each)
    positions = np.arange(len(sizes_of)) - starts
    found = permute_each(derive_key("test", seed), starts, sizes_of, positions)
    assert np.all(found < sizes_of)
    assert sorted((starts + found).tolist()) == list(range(len(sizes_of)))


def test_a_tweak_makes_another_permutation_whatever_came_before_it():
    key, whole = derive_key("test"), np.arange(1000)
    found = {
        tuple(permute_each(key, np.full(1000, tweak), np.full(1000, 1000), whole).tolist())
        for tweak in (0, 1, 2, 1 << 40)
    }
    assert len(found) == 4
    assert tuple(permute(key, 1000, whole).tolist()) in found  # the tweak 0 is none


@pytest.mark.parametrize("n", [(1 << 40) - 1, 1 << 40, (1 << 62) - 1, 1 << 62, 3**25])
def test_many_permutations_at_once_are_right_at_large_sizes(n):
    key, positions = derive_key("test"), np.array([0, 1, n // 2, n - 2, n - 1])
    at_once = permute_each(key, np.zeros(5, np.int64), np.full(5, n), positions)
    assert at_once.tolist() == permute(key, n, positions).tolist()


# The order.


@given(orders())
def test_every_row_stands_at_exactly_one_position(drawn):
    order, _, _ = drawn
    found = order.between(0, order.num_samples)
    assert sorted(found.tolist()) == list(range(order.num_samples))


@given(orders(), st.data())
def test_a_position_has_its_row_however_one_comes_to_it(drawn, data):
    order, _, _ = drawn
    whole = order.between(0, order.num_samples)
    some = np.array(data.draw(st.lists(st.integers(0, order.num_samples - 1), max_size=20)), int)
    assert order.at(some).tolist() == whole[some].tolist()


@given(st.integers(2, 1 << 40), st.integers(1, 50), st.integers(1, 70), st.data())
def test_samples_of_any_number_are_permuted(n, window, lanes, data):
    # A block at least so large that there are not too many of them.
    rows = data.draw(st.integers(-(-n // MAX_BLOCKS), n))
    order = even(n, rows, window, lanes)
    start = data.draw(st.integers(0, n - 1))
    stop = min(n, start + 2000)
    spread = np.unique(np.linspace(0, n - 1, 500).astype(np.int64))
    found = order.at(np.unique(np.concatenate((np.arange(start, stop), spread))))
    assert found.min() >= 0
    assert found.max() < n
    assert len(set(found.tolist())) == len(found)


def test_the_order_of_blocks_is_fixed_for_ever():
    # Saved positions mean something only as long as these numbers stand.
    assert even(18, 3, 2, 2).between(0, 18).tolist() == FIXED_EVEN
    assert uneven([5, 1, 0, 7, 3, 2], 2, 3, seed=4, epoch=1).between(0, 18).tolist() == FIXED_UNEVEN
    deep = even(TEN_BILLION, 100_000, 16, 4, seed=7, epoch=3)
    assert deep.between(5 * 10**9, 5 * 10**9 + 3).tolist() == FIXED_DEEP


def test_seed_epoch_window_and_lanes_each_change_the_order():
    found = [
        order.between(0, 1000).tolist()
        for order in (
            even(1000, 10, 5),
            even(1000, 10, 5, seed=1),
            even(1000, 10, 5, epoch=1),
            even(1000, 10, 6),
            even(1000, 11, 5),
            even(1000, 10, 5, 2),
        )
    ]
    assert len({tuple(one) for one in found}) == len(found)


@given(orders())
def test_few_blocks_are_open_at_a_time(drawn):
    order, lanes, starts = drawn
    whole = order.between(0, order.num_samples)
    num_reads = 0
    for lane in range(lanes):
        blocks = np.searchsorted(starts, whole[lane::lanes], side="right") - 1
        of_lane = set(blocks.tolist())
        opened = [int(np.flatnonzero(blocks == block)[0]) for block in of_lane]
        left = [int(np.flatnonzero(blocks == block)[-1]) for block in of_lane]
        for place in range(len(blocks)):
            num_open = sum(a <= place <= b for a, b in zip(opened, left, strict=True))
            assert num_open <= order.layout.parameters.window_blocks
        num_reads += len(of_lane)
    # Each block by one lane, but for those that two neighbouring lanes share.
    assert num_reads <= len(starts) - 1 + min(lanes, order.num_samples) - 1


def test_rows_are_mixed_over_the_whole_window_and_blocks_over_all():
    order = even(64_000, 100, 8)
    found = order.between(0, 64_000)
    windows = found.reshape(80, 800)
    assert all(len(set((one // 100).tolist())) == 8 for one in windows)
    # In the first batch of 100 of each window every block is about equally frequent.
    counts = [np.bincount(np.unique(one // 100, return_inverse=True)[1][:100]) for one in windows]
    assert abs(np.mean([count.std() for count in counts]) - 3.3) < 0.7
    middle = np.mean(np.abs(found - np.arange(64_000)))
    assert abs(middle / 64_000 - 1 / 3) < 0.04  # as far from home as in a full shuffle
    assert abs(np.corrcoef(found[:-1] % 100, found[1:] % 100)[0, 1]) < 0.02


def test_the_last_window_of_a_lane_mixes_as_well_as_the_others():
    whole = even(9 * 50, 50, 8).between(0, 450)  # not eight blocks and then one
    assert sorted(len(set((part // 50).tolist())) for part in (whole[:200], whole[200:])) == [4, 5]


def test_empty_shards_are_no_blocks():
    with_empty = uneven([0, 5, 0, 0, 7, 3, 0], 2).between(0, 15)
    assert with_empty.tolist() == uneven([5, 7, 3], 2).between(0, 15).tolist()


@pytest.mark.parametrize("blocks", ["shards", "rows"])
def test_ten_billion_samples_start_at_once_and_take_little_memory(blocks):
    rows = np.full(NUM_SHARDS, TEN_BILLION // NUM_SHARDS)
    rows[: TEN_BILLION - int(rows.sum())] += 1
    starts, position = starts_of(rows), 9_876_543_210
    tracemalloc.start()
    parameters = BlockParameters(16, 0 if blocks == "shards" else 4096, 8)
    layout = parameters.layout(TEN_BILLION, starts)
    order = Order(TEN_BILLION, "block", 0, 0, "m", layout)
    part = Cut(TEN_BILLION, 4096, "keep", position, 8).part(7, 3, 8)
    found = order.at(part.positions(TEN_BILLION))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(found.tolist())) == 512
    assert len(set((np.searchsorted(starts, found, side="right")).tolist())) <= 32
    assert peak < (16 << 20 if blocks == "shards" else 1 << 20)


# Lanes.


def read_step(order: Order, cut: Cut, step: int, num_ranks: int) -> tuple[list[int], list[int]]:
    """(samples of the global batch, rows of each rank), padding left out of the samples."""
    samples, rows = [], []
    for rank in range(num_ranks):
        part = cut.part(step, rank, num_ranks)
        found = order.at(part.positions(order.num_samples))
        samples += found[part.mask()].tolist()
        rows.append(len(found))
    return samples, rows


@given(orders(), st.integers(1, 50), st.integers(1, 7), last_batches)
def test_every_number_of_ranks_reads_the_same_global_batches(drawn, size, num_ranks, last_batch):
    order, lanes, _ = drawn
    n = order.num_samples
    cut = Cut(n, size, last_batch, lanes=lanes)
    seen = []
    for step in range(cut.num_steps):
        samples, rows = read_step(order, cut, step, num_ranks)
        assert sorted(samples) == sorted(order.between(*cut.bounds(step)).tolist())
        assert samples == read_step(order, cut, step, 1)[0]
        assert max(rows) - min(rows) <= 1
        if last_batch == "pad":
            assert set(rows) == {-(-size // num_ranks)}
        seen += samples
    assert len(seen) == n - (n % size if last_batch == "drop" else 0)
    assert len(set(seen)) == len(seen)


@given(
    drawn=orders(),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    stops=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    num_ranks=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    last=last_batches,
)
def test_over_changes_of_topology_nothing_repeats_or_is_skipped(
    drawn, sizes, stops, num_ranks, last
):
    order, lanes, _ = drawn
    n, position, seen = order.num_samples, 0, []
    for turn, size in enumerate(sizes):
        is_last = turn == len(sizes) - 1
        cut = Cut(n, size, last, position, lanes)
        # As many steps on every rank, whatever the rank reads in them.
        steps = cut.num_steps if is_last else min(stops[turn], cut.num_steps)
        for step in range(steps):
            assert cut.bounds(step)[0] == position
            seen += read_step(order, cut, step, num_ranks[turn])[0]
            position = cut.bounds(step)[1]
    assert sorted(seen) == sorted(order.between(0, position).tolist())
    assert n - position < (sizes[-1] if last == "drop" else 1)


@given(st.integers(0, 300), st.integers(1, 100), st.integers(1, 20), st.integers(1, 7))
def test_a_batch_is_listed_lane_by_lane(start, size, lanes, num_ranks):
    cut = Cut(start + size, size, "keep", start, lanes)
    by_lane = sorted(range(start, start + size), key=lambda position: (position % lanes, position))
    parts = [cut.part(0, rank, num_ranks).positions(start + size) for rank in range(num_ranks)]
    assert np.concatenate(parts).tolist() == by_lane


@pytest.mark.parametrize(("lanes", "num_ranks"), [(4, 4), (4, 8), (8, 4), (4, 2), (6, 3)])
def test_ranks_take_whole_lanes_where_the_numbers_allow_it(lanes, num_ranks):
    size = 2 * lanes * num_ranks
    cut = Cut(50 * size, size, "keep", 7, lanes)
    for rank in range(num_ranks):
        lanes_of = {
            int(lane)
            for step in range(cut.num_steps - 1)
            for lane in cut.part(step, rank, num_ranks).positions(50 * size) % lanes
        }
        assert lanes_of == set(
            range(rank * lanes // num_ranks, -(-(rank + 1) * lanes // num_ranks))
        )


def test_where_they_do_not_a_rank_shares_a_lane_with_its_neighbours():
    cut = Cut(10_000, 100, "keep", 0, lanes=5)
    lanes_of = [set((cut.part(3, rank, 3).positions(10_000) % 5).tolist()) for rank in range(3)]
    assert lanes_of == [{0, 1}, {1, 2, 3}, {3, 4}]


def test_nodes_read_only_the_blocks_of_their_lanes():
    n, num_nodes = 80_000, 4
    order = even(n, 100, 8, num_nodes)
    cut = Cut(n, 160, "keep", 0, num_nodes)
    blocks = [set() for _ in range(num_nodes)]
    for step in range(cut.num_steps):
        for rank in range(8):  # two ranks on each node
            positions = cut.part(step, rank, 8).positions(n)
            blocks[rank // 2] |= set((order.at(positions) // 100).tolist())
    assert sum(map(len, blocks)) <= n // 100 + num_nodes - 1
    assert all(len(one) in (200, 201) for one in blocks)


def test_padding_repeats_what_follows_in_the_lane():
    cut = Cut(13, 8, "pad", 0, lanes=2)
    parts = [cut.part(1, rank, 4) for rank in range(4)]
    found = [part.positions(13).tolist() for part in parts]
    assert found == [[8, 10], [12, 1], [9, 11], [11, 0]]
    assert [part.num_samples for part in parts] == [2, 1, 1, 1]


# What cannot be.


@pytest.mark.parametrize(
    "arguments",
    [(0,), (MAX_BLOCKS + 1,), (1, -1), (1, 1 << 62), (1, 0, 0), (1, 0, MAX_LANES + 1)],
)
def test_parameters_that_cannot_be_are_refused(arguments):
    with pytest.raises(InvalidRequest):
        BlockParameters(*arguments)


def test_too_many_blocks_are_refused():
    with pytest.raises(InvalidRequest, match="larger"):
        BlockParameters(1, 1).layout(MAX_BLOCKS + 1, None)


def test_samples_of_no_shard_need_a_size_of_blocks():
    with pytest.raises(InvalidRequest, match="block_rows"):
        BlockParameters(1).layout(10, None)


def test_blocks_that_are_not_of_these_samples_are_refused():
    parameters = BlockParameters(1)
    with pytest.raises(InvalidRequest, match="12 rows"):
        parameters.layout(10, starts_of([5, 7]))
    with pytest.raises(InvalidRequest, match="10 samples"):
        Order(10, "block", 0, 0, "m", parameters.layout(12, starts_of([5, 7])))


def test_blocks_belong_to_the_block_shuffle_and_to_no_other():
    layout = BlockParameters(1, 5).layout(10, None)
    for shuffle, given_layout in (("full", layout), ("none", layout), ("block", None)):
        with pytest.raises(InvalidRequest, match="window_blocks"):
            Order(10, shuffle, 0, 0, "m", given_layout)


@pytest.mark.parametrize("positions", [[-1], [0, 10]])
def test_positions_outside_the_order_are_refused(positions):
    with pytest.raises(InvalidRequest, match="outside"):
        even(10, 3, 2).at(np.array(positions))


def test_no_positions_have_no_rows():
    assert even(10, 3, 2).between(4, 4).tolist() == []
