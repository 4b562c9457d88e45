"""What a column may hold: as users write it, as Arrow says it, as a first sample shows it."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from forebay.dataset.schema import METADATA_KEY, SCALARS, Array, Schema
from forebay_wire.errors import InvalidRequest, SchemaMismatch

EVERYTHING = {
    "image": Array("uint8", (28, 28)),
    "mask": Array("bool", (4,)),
    "label": "int64",
    "text": "string",
    "blob": "binary",
    "photo": "image",
    "tokens": "list[int32]",
}


@pytest.mark.parametrize("dtype", SCALARS)
def test_every_element_type_survives_arrow(dtype):
    schema = Schema.of({"one": dtype, "many": Array(dtype, (2, 3)), "ragged": f"list[{dtype}]"})
    assert Schema.from_arrow(schema.arrow) == schema


def test_a_schema_survives_arrow_with_its_metadata_and_without():
    schema = Schema.of(EVERYTHING)
    assert Schema.from_arrow(schema.arrow) == schema
    bare = Schema.from_arrow(schema.arrow.remove_metadata())
    assert bare["photo"].text == "binary"  # Arrow knows no images
    assert bare["image"] == schema["image"]


def test_the_metadata_says_what_the_user_wrote():
    specs = json.loads(Schema.of(EVERYTHING).arrow.metadata[METADATA_KEY])
    assert specs["image"] == {"array": "uint8", "shape": [28, 28]}
    assert (specs["label"], specs["photo"], specs["tokens"]) == ("int64", "image", "list[int32]")


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("f4"), torch.float32])
def test_an_element_type_may_be_written_in_several_ways(dtype):
    assert Array(dtype, [3]) == Array("float32", (3,))
    assert Schema.of({"x": dtype})["x"].text == "float32"


def test_fixed_shape_tensors_are_arrows_own_extension_type():
    assert Schema.of(EVERYTHING).arrow.field("image").type == pa.fixed_shape_tensor(
        pa.uint8(), (28, 28)
    )


@pytest.mark.parametrize(
    ("arrow", "text"),
    [
        (pa.large_string(), "string"),
        (pa.dictionary(pa.int8(), pa.string()), "string"),
        (pa.large_binary(), "binary"),
        (pa.list_(pa.float32(), 3), "float32 array of shape (3,)"),
        (pa.large_list(pa.int16()), "list[int16]"),
        (pa.timestamp("us"), "arrow:timestamp[us]"),
        (pa.list_(pa.string()), "arrow:list<item: string>"),
    ],
)
def test_arrow_types_become_ours(arrow, text):
    assert Schema.from_arrow(pa.schema({"x": arrow}))["x"].text == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "bool"),
        (3, "int64"),
        (0.5, "float64"),
        (np.float32(0.5), "float32"),
        (np.zeros((2, 3), np.uint8), "uint8 array of shape (2, 3)"),
        (torch.zeros(4, dtype=torch.float16), "float16 array of shape (4,)"),
        (torch.tensor(1), "int64"),
        ("text", "string"),
        (b"bytes", "binary"),
        ([1, 2], "list[int64]"),
    ],
)
def test_a_type_is_inferred_from_the_first_sample(value, text):
    assert Schema.infer({"x": value})["x"].text == text


@pytest.mark.parametrize(
    "value", [None, {}, [], ["a"], object(), torch.zeros(2, dtype=torch.bfloat16), 1j]
)
def test_what_cannot_be_inferred_is_named(value):
    with pytest.raises(SchemaMismatch, match="torch.uint8" if hasattr(value, "dtype") else "'x'"):
        Schema.infer({"x": value})


@pytest.mark.parametrize(
    "spec", ["int65", "list[string]", "list[", Array, 7, ["int64"], {"array": "int8"}, None]
)
def test_an_unknown_type_says_what_there_is(spec):
    with pytest.raises(InvalidRequest, match=r"'x'.*forebay\.Array"):
        Schema.of({"x": spec})


@pytest.mark.parametrize("names", [{}, {"": "int64"}, {"_ids": "int64"}])
def test_bad_column_names_are_refused(names):
    with pytest.raises(InvalidRequest):
        Schema.of(names)


def test_repeated_column_names_of_a_table_are_refused():
    with pytest.raises(InvalidRequest, match="repeat"):
        Schema.of(pa.schema([("a", pa.int64()), ("a", pa.int64())]))


@pytest.mark.parametrize(("dtype", "shape"), [("int64", (0,)), ("int64", (-1,)), ("object", (1,))])
def test_impossible_arrays_are_refused(dtype, shape):
    with pytest.raises(InvalidRequest):
        Array(dtype, shape)


def test_an_array_without_dimensions_is_a_number():
    assert Schema.of({"x": Array("int16", ())})["x"].kind == "scalar"


def test_a_missing_column_is_named_with_those_that_exist():
    with pytest.raises(InvalidRequest, match=r"'nope'; the dataset has image, mask"):
        Schema.of(EVERYTHING)["nope"]
