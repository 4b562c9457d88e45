"""Where things lie in a pack, and how it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.checkpoint.layout import ALIGNMENT, Extent, pieces, place
from forebay_wire.errors import ResourceExhausted
from forebay_wire.limits import KIB, MAX_SEGMENT_BYTES, MIB, MIN_SHARED_SEGMENT_BYTES
from forebay_wire.segments import check_cuts

sizes = st.one_of(st.integers(0, 300), st.integers(0, 600 * KIB), st.integers(3 * MIB, 13 * MIB))
extents = st.lists(st.tuples(sizes, st.booleans()), max_size=40).map(
    lambda found: [Extent((number,), size, frozen) for number, (size, frozen) in enumerate(found)]
)


@given(extents)
def test_extents_are_aligned_apart_and_covered_by_legal_segments(found: list[Extent]) -> None:
    layout = place(found)
    check_cuts(layout.cuts, layout.num_bytes)
    end = 0
    for offset, extent in sorted(zip(layout.offsets, found, strict=True), key=lambda p: p[0]):
        assert offset % ALIGNMENT == 0
        assert offset >= end or not extent.num_bytes
        end = max(end, offset + extent.num_bytes)
    assert end <= layout.num_bytes < end + ALIGNMENT


@given(extents, st.randoms())
def test_the_layout_does_not_depend_on_the_order_of_the_plan(found, random) -> None:
    shuffled = random.sample(found, len(found))
    layout, other = place(found), place(shuffled)
    assert layout.cuts == other.cuts
    assert dict(zip(found, layout.offsets, strict=True)) == dict(
        zip(shuffled, other.offsets, strict=True)
    )


def test_a_large_tensor_has_segments_of_its_own_and_small_ones_share() -> None:
    found = [Extent((0,), 9 * MIB), *[Extent((n,), 1000) for n in range(1, 2001)]]
    layout = place(found)
    assert layout.cuts[:3] == (4 * MIB, 4 * MIB, MIB)
    shared = layout.cuts[3:]
    assert all(cut >= MIN_SHARED_SEGMENT_BYTES for cut in shared[:-1])
    assert len(shared) == 8


def test_frozen_tensors_do_not_share_segments_with_trained_ones() -> None:
    found = [Extent((n,), 1000, frozen=n % 2 == 0) for n in range(10)]
    layout = place(found)
    assert layout.cuts == (5 * 1024, 5 * 1024)
    assert all(
        (offset < layout.cuts[0]) == found[n].frozen for n, offset in enumerate(layout.offsets)
    )


def test_one_tensor_more_moves_nothing_of_the_other_kind() -> None:
    frozen = [Extent(("f", n), 5 * MIB, frozen=True) for n in range(3)]
    alone = place([*frozen, Extent(("t", 1), 100)])
    together = place([*frozen, Extent(("t", 0), 100), Extent(("t", 1), 100)])
    assert alone.offsets[:3] == together.offsets[:3]
    assert alone.cuts[:-1] == together.cuts[:-1]


@given(extents, st.integers(MAX_SEGMENT_BYTES, 16 * MIB))
def test_pieces_are_whole_segments_that_fit_the_slot(found: list[Extent], capacity: int) -> None:
    cuts = place(found).cuts
    portions = list(pieces(cuts, capacity))
    assert [cut for piece in portions for cut in piece.cuts] == list(cuts)
    position = 0
    for piece in portions:
        assert piece.start == position
        assert sum(piece.cuts) == piece.num_bytes <= capacity
        position = piece.stop


def test_a_slot_below_one_segment_is_an_error_with_numbers() -> None:
    with pytest.raises(ResourceExhausted, match="1000 bytes and one segment needs 4194304"):
        list(pieces([MAX_SEGMENT_BYTES], 1000))
