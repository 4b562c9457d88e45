"""Segment tables: canonical bytes, ids, and that every kind of damage is found."""

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from forebay_wire.errors import IntegrityError, InvalidRequest, LimitExceeded
from forebay_wire.limits import MAX_SEGMENT_BYTES
from forebay_wire.segments import (
    BLOB_KEY,
    EMPTY_TABLE,
    TRAILER,
    SegmentTable,
    SegmentTableBuilder,
    check_cuts,
    decode_trailer,
    encode_trailer,
    even_cuts,
    file_bytes_for,
    table_bytes_for,
    table_of,
)

pieces = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


@given(pieces)
def test_a_table_comes_back_from_its_bytes(given_pieces):
    table = table_of(given_pieces)
    again = SegmentTable.decode(table.encoded, "here", table.blob_id)
    assert again.encoded == table.encoded
    assert again.offsets.tolist() == [0, *np.cumsum([len(piece) for piece in given_pieces])]
    assert len(table.encoded) == table_bytes_for(len(given_pieces))


@given(pieces.filter(bool), st.data())
def test_one_flipped_bit_of_a_table_is_found(given_pieces, data):
    table = table_of(given_pieces)
    damaged = bytearray(table.encoded)
    bit = data.draw(st.integers(0, len(damaged) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IntegrityError, match="here"):
        SegmentTable.decode(damaged, "here", table.blob_id)


@given(pieces.filter(bool), st.data())
def test_a_table_cut_short_is_found(given_pieces, data):
    encoded = table_of(given_pieces).encoded
    length = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(IntegrityError, match="here"):
        SegmentTable.decode(encoded[:length], "here")


def test_the_id_is_the_digest_of_the_table_under_the_domain_key():
    table = table_of([b"abc", b"de"])
    assert table.blob_id == blake3(table.encoded, key=BLOB_KEY).hexdigest()


def test_equal_bytes_cut_differently_have_different_ids():
    assert table_of([b"abcd"]).blob_id != table_of([b"ab", b"cd"]).blob_id


def test_the_format_is_fixed_for_ever():
    table = table_of([b"forebay"])
    assert table.encoded.hex() == (
        "46425345475441420100000000000000010000000000000007000000000000000700000071bc"
        "a58aea351e2b1e9b3e60050ba20973bc6c4e47fb08233877a11209bfef4f854756b6073e9437"
    )
    assert table.blob_id == "0960694f85d70f430b02bc59a51ef76fa162451fd6dfef1cafd00bc27965629d"


def test_the_empty_blob_has_an_id_and_no_segments():
    assert EMPTY_TABLE.total_bytes == 0
    assert SegmentTable.decode(EMPTY_TABLE.encoded, "here", EMPTY_TABLE.blob_id).num_segments == 0


def test_a_segment_is_checked_by_both_digests():
    table = table_of([b"abc", b"defg"])
    table.check(1, b"defg", "here")
    table.check_identity(1, b"defg", "here")
    for check in (table.check, table.check_identity):
        with pytest.raises(IntegrityError, match=rf"segment 1 of blob {table.blob_id}.*tier ssd"):
            check(1, b"defh", "tier ssd")


def test_covering_gives_the_segments_that_hold_a_range():
    table = table_of([b"aaa", b"bb", b"c"])
    ranges = {(0, 0): [], (0, 1): [0], (0, 6): [0, 1, 2], (2, 2): [0, 1], (3, 2): [1], (5, 1): [2]}
    assert {key: list(table.covering(*key)) for key in ranges} == ranges


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 7), (6, 1), (0, -1)])
def test_a_range_outside_the_blob_is_refused(offset, length):
    with pytest.raises(InvalidRequest, match="outside"):
        table_of([b"aaa", b"bb", b"c"]).covering(offset, length)


def test_a_segment_holds_one_byte_to_four_mebibytes():
    builder = SegmentTableBuilder()
    builder.add(bytes(MAX_SEGMENT_BYTES))
    with pytest.raises(LimitExceeded, match="segment bytes"):
        builder.add(bytes(MAX_SEGMENT_BYTES + 1))
    with pytest.raises(InvalidRequest, match="at least one byte"):
        builder.add(b"")


def test_a_table_of_another_blob_is_refused():
    with pytest.raises(IntegrityError, match="does not belong"):
        SegmentTable.decode(table_of([b"a"]).encoded, "here", table_of([b"b"]).blob_id)


def test_lengths_that_do_not_add_up_are_refused():
    encoded = bytearray(table_of([b"abc"]).encoded)
    encoded[24] = 4  # the total
    with pytest.raises(IntegrityError, match="add up"):
        SegmentTable.decode(encoded, "here")


def test_a_trailer_comes_back_and_any_flipped_bit_is_found():
    trailer = encode_trailer(123, 456)
    assert len(trailer) == TRAILER.size == 32
    assert decode_trailer(trailer, "here") == (123, 456)
    for bit in range(len(trailer) * 8):
        damaged = bytearray(trailer)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError, match="here"):
            decode_trailer(damaged, "here")
    with pytest.raises(IntegrityError, match="cut short"):
        decode_trailer(trailer[:-1], "here")


def test_a_file_holds_data_table_and_trailer():
    assert file_bytes_for(1000, 3) == 1000 + 32 + 3 * 44 + 32


def test_cuts_must_be_exact_and_within_the_limits():
    check_cuts([1, MAX_SEGMENT_BYTES], MAX_SEGMENT_BYTES + 1)
    check_cuts([], 0)
    for cuts, num_bytes in [
        ([1], 2),
        ([0, 2], 2),
        ([MAX_SEGMENT_BYTES + 1], MAX_SEGMENT_BYTES + 1),
    ]:
        with pytest.raises(InvalidRequest):
            check_cuts(cuts, num_bytes)


@given(st.integers(0, 10**6), st.integers(1, 10**5))
def test_even_cuts_cover_everything(num_bytes, size):
    cuts = even_cuts(num_bytes, size)
    assert sum(cuts) == num_bytes
    assert all(cut == size for cut in cuts[:-1])
    assert all(0 < cut <= size for cut in cuts)
