"""Manifests: canonical, digested, and refused when anything about them is not as written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_wire.errors import IntegrityError, InvalidRequest
from forebay_wire.manifest import (
    FRAME_BYTES,
    KIND_DATASET,
    DatasetManifest,
    GenerationManifest,
    PackRef,
    SelectionManifest,
    ShardRef,
    Stamp,
    StatisticsManifest,
    canonical_json,
    decode,
    encode,
    parse,
    put_stamp,
    read_stamp,
)

BLOB = "ab" * 32

DATASET = DatasetManifest(
    dataset="mnist",
    version=2,
    parent="cd" * 32,
    schema="c2NoZW1h",
    shards=(ShardRef(BLOB, 1000, 7, (3, 4)), ShardRef("ef" * 32, 500, 2, (2,))),
    metadata={"source": "ünïcode"},
)
SELECTION = SelectionManifest(
    "mnist", 2, "cd" * 32, "train", 7, {"kind": "split", "seed": 0, "start": 0, "stop": 7}
)
STATISTICS = StatisticsManifest("mnist", 2, "cd" * 32, "", {":x": {"mean": [0.5]}})
GENERATION = GenerationManifest(
    run="run",
    attempt=2,
    step=40,
    parent=(1, 30),
    num_ranks=2,
    metrics={"accuracy": 0.5},
    dataset={"position": 128},
    packs=(PackRef(0, BLOB, 10, {"tensors": []}), PackRef(1, BLOB, 10, {})),
    created_unix=1.5,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("manifest", [DATASET, SELECTION, STATISTICS, GENERATION])
def test_a_manifest_comes_back_from_its_bytes(manifest):
    manifest_id, data = manifest.encode()
    assert parse(data, "here", manifest_id) == manifest


def test_a_first_attempt_has_no_parent():
    first = GenerationManifest("run", 1, 1, None, 1, {}, None, (), 0.0)
    manifest_id, data = first.encode()
    assert parse(data, "here", manifest_id) == first


@pytest.mark.parametrize("manifest", [DATASET, SELECTION, GENERATION])
def test_every_flipped_bit_and_every_truncation_is_found(manifest):
    manifest_id, data = manifest.encode()
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1 << index % 8
        with pytest.raises(IntegrityError, match="here"):
            parse(damaged, "here", manifest_id)
        with pytest.raises(IntegrityError, match="here"):
            parse(data[:index], "here", manifest_id)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values, max_size=5))
def test_equal_values_have_equal_bytes_whatever_their_order(payload):
    turned = dict(reversed(payload.items()))
    assert encode(KIND_DATASET, payload) == encode(KIND_DATASET, turned)
    assert json.loads(canonical_json(payload)) == payload


def test_the_kind_is_part_of_the_identity():
    assert encode(1, {"a": 1})[0] != encode(2, {"a": 1})[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(InvalidRequest, match="manifest"):
        canonical_json({"value": value})


def test_another_manifest_than_the_wanted_one_is_refused():
    _, data = DATASET.encode()
    with pytest.raises(IntegrityError, match="not " + "00" * 32):
        parse(data, "here", "00" * 32)


def test_an_unknown_kind_asks_for_an_upgrade():
    manifest_id, data = encode(99, {})
    with pytest.raises(IntegrityError, match="upgrade"):
        parse(data, "here", manifest_id)


def test_a_missing_or_unknown_field_is_refused():
    for payload in ({"run": "r"}, {"dataset": "d", "surprise": 1}):
        for kind in (1, 2, 3):
            manifest_id, data = encode(kind, payload)
            with pytest.raises(IntegrityError, match="field"):
                parse(data, "here", manifest_id)


def test_an_object_is_wanted():
    manifest_id, data = encode(KIND_DATASET, [1, 2])
    with pytest.raises(IntegrityError, match="no object"):
        decode(data, "here", manifest_id)


def test_rows_and_blobs_of_a_version_add_up_over_its_shards():
    assert DATASET.num_rows == 9
    assert DATASET.blobs() == [BLOB, "ef" * 32]
    assert GENERATION.blobs() == [BLOB, BLOB]


def test_the_frame_is_80_bytes():
    assert FRAME_BYTES == 80


def test_a_stamp_changes_neither_the_id_nor_what_the_manifest_says():
    manifest_id, data = DATASET.encode()
    stamped = put_stamp(data, Stamp(5, (1 << 63) - 1))
    assert stamped != data
    assert parse(stamped, "here", manifest_id) == DATASET
    assert read_stamp(stamped) == Stamp(5, (1 << 63) - 1)
    assert read_stamp(data) == Stamp(0, 0)
