"""The extent list under a blob's id: round trip, and damage anywhere is noticed."""

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import (
    DIGEST_OFFSET,
    EXTENT,
    HEADER,
    VERSION,
    VERSION_WITHOUT_LAYERS,
    ObjectBlob,
    ObjectExtent,
)
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import file_bytes_for, table_of

NAME = "0123456789abcdef" * 2


def one_extent(*pieces: bytes) -> ObjectBlob:
    table = table_of(pieces)
    size = file_bytes_for(table.total_bytes, table.num_segments)
    return ObjectBlob(table, (ObjectExtent(0, 0, table.total_bytes, size, NAME),))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
def test_what_is_encoded_is_decoded(pieces: list[bytes]) -> None:
    blob = one_extent(*pieces)
    data = blob.encode()
    assert len(data) == HEADER.size + EXTENT.size + len(blob.table.encoded)
    back = ObjectBlob.decode(data, "here", blob.table.blob_id)
    assert back.extents == blob.extents
    assert back.table.encoded == blob.table.encoded


def test_every_flipped_bit_and_every_truncation_is_an_integrity_error() -> None:
    blob = one_extent(b"one", b"two two")
    data = blob.encode()
    for position in range(len(data) * 8):
        bad = bytearray(data)
        bad[position // 8] ^= 1 << position % 8
        with pytest.raises(IntegrityError, match="tier object"):
            ObjectBlob.decode(bad, "tier object", blob.table.blob_id)
    for length in range(len(data)):
        with pytest.raises(IntegrityError, match="tier object"):
            ObjectBlob.decode(data[:length], "tier object", blob.table.blob_id)


def test_the_list_of_another_blob_is_refused() -> None:
    with pytest.raises(IntegrityError, match="does not belong"):
        ObjectBlob.decode(one_extent(b"a").encode(), "here", one_extent(b"b").table.blob_id)


@pytest.mark.parametrize(
    "extents",
    [
        (),
        (ObjectExtent(0, 0, 9, 100, NAME),),
        (ObjectExtent(1, 0, 9, 100, NAME),),
        (ObjectExtent(0, 95, 10, 100, NAME),),
        (ObjectExtent(0, 0, 4, 100, NAME), ObjectExtent(5, 0, 5, 100, NAME)),
    ],
)
def test_extents_must_cover_the_blob(extents: tuple[ObjectExtent, ...]) -> None:
    table = table_of([b"0123456789"])
    with pytest.raises(IntegrityError, match="extents of blob"):
        ObjectBlob.decode(ObjectBlob(table, extents).encode(), "here", table.blob_id)


def test_several_extents_in_several_objects() -> None:
    table = table_of([b"0123456789"])
    extents = (ObjectExtent(0, 7, 4, 20, NAME), ObjectExtent(4, 0, 6, 20, NAME[::-1]))
    encoded = ObjectBlob(table, extents, PIECES).encode()
    back = ObjectBlob.decode(encoded, "here", table.blob_id)
    assert back.extents == extents


def layered(*extents: ObjectExtent) -> ObjectBlob:
    """Of three segments, 4 + 3 + 3 bytes, that lie as a whole in layer 0."""
    table = table_of([b"0123", b"456", b"789"])
    return ObjectBlob(table, (ObjectExtent(0, 0, 10, 100, NAME), *extents), PIECES)


SOUND = (
    ObjectExtent(0, 5, 4, 100, NAME, layer=1),
    ObjectExtent(7, 20, 3, 100, NAME[::-1], "shuffle-lz4", 1),
    ObjectExtent(7, 0, 3, 50, NAME, layer=2),
)


def test_layers_are_decoded_and_marked_by_the_version() -> None:
    found = layered(*SOUND)
    data = found.encode()
    assert data[8] == VERSION
    back = ObjectBlob.decode(data, "here", found.table.blob_id)
    assert back.extents == found.extents
    assert back.has_layers
    assert layered().encode()[8] == VERSION_WITHOUT_LAYERS
    assert not layered().has_layers


@pytest.mark.parametrize(
    "extents",
    [
        SOUND[2:],
        (ObjectExtent(0, 5, 3, 100, NAME, layer=1),),
        (ObjectExtent(1, 5, 3, 100, NAME, layer=1),),
        (ObjectExtent(4, 5, 9, 100, NAME, layer=1),),
        (ObjectExtent(10, 5, 3, 100, NAME, layer=1),),
        (ObjectExtent(0, 5, 0, 100, NAME, layer=1),),
        (ObjectExtent(0, 97, 4, 100, NAME, layer=1),),
        (ObjectExtent(2**64 - 1, 0, 2**64 - 1, 100, NAME, layer=1),),
        (SOUND[0], SOUND[0]),
        (ObjectExtent(0, 5, 7, 100, NAME, layer=1), ObjectExtent(4, 5, 3, 100, NAME, layer=1)),
        (*SOUND, ObjectExtent(7, 0, 3, 50, NAME, layer=4)),
    ],
    ids=[
        "on nothing", "half a segment", "from its middle", "too long", "behind the end", "empty",
        "beyond its file", "huge", "twice", "overlap", "a layer left out",
    ],
)  # fmt: skip
def test_layers_that_do_not_fit_are_refused(extents: tuple[ObjectExtent, ...]) -> None:
    found = layered(*extents)
    with pytest.raises(IntegrityError, match="do not lie on each other"):
        ObjectBlob.decode(found.encode(), "here", found.table.blob_id)


def test_layers_of_a_list_that_can_have_none_are_refused() -> None:
    found = layered(*SOUND)
    older = bytearray(found.encode())
    older[8] = VERSION_WITHOUT_LAYERS
    older[DIGEST_OFFSET : DIGEST_OFFSET + 32] = (
        blake3(older[:DIGEST_OFFSET]).update(older[HEADER.size :]).digest()
    )
    with pytest.raises(IntegrityError, match="do not lie on each other"):
        ObjectBlob.decode(older, "here", found.table.blob_id)
