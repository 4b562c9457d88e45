"""Objects come back as they were, or are refused by name."""

import datetime
import enum
import json
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forebay.checkpoint.objects import INLINE_BYTES, EncodedObject, decode, encode
from forebay_wire.errors import IntegrityError, UnsupportedObject
from forebay_wire.manifest import canonical_json


def through_json(value: Any) -> Any:
    """*value* encoded, canonicalised as a manifest does it, and decoded."""
    encoded = encode(value, ("value",))
    pack = bytearray()
    for attachment in encoded.attachments:
        attachment.reference[0] = len(pack)
        pack += attachment.data
    text = canonical_json(encoded.json)
    return decode(json.loads(text), lambda offset, size: bytes(pack[offset : offset + size]), {})


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, item in expected.items():
            assert_same(found[key], item)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert np.float64(found).tobytes() == np.float64(expected).tobytes()
    else:
        assert found == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        2**53 - 1,
        2**53,
        -(2**200),
        0.1,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        -math.nan,
        struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000001))[0],
        1e-320,
        1 + 2j,
        "",
        "größe",
        "\ud800 alone",
        b"",
        b"\x00\xff",
        bytearray(b"abc"),
        b"x" * (INLINE_BYTES + 1),
        [],
        (),
        {},
        [1, [2, (3, {"a": None})]],
        {"b": 1, "a": 2},
        {"a": 1, "b": 2},
        {1: "int", "1": "str"},
        {"$tag": 1},
        {(1, 2): 3, None: 4, True: 5},
        OrderedDict([("z", 1), ("a", 2)]),
        Counter({30: 1, 80: 2}),
        {1, 2, 3},
        frozenset({"a"}),
        torch.float8_e4m3fn,
        torch.Size([2, 3]),
        torch.device("cuda", 1),
        np.float32(1.5),
        np.int64(7),
        np.bool_(True),
        np.datetime64("2026-11-22"),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.zeros((0, 4), dtype=np.float16),
        np.arange(INLINE_BYTES, dtype=np.int64)[::2],
        np.array(["a", "bc"]),
        torch.arange(5, dtype=torch.bfloat16),
        (torch.zeros(0), torch.tensor(3)),
        random.Random(3).getstate(),
        np.random.RandomState(3).get_state(),
        np.random.default_rng(3).bit_generator.state,
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:20]!a}",
)
def test_value_comes_back_with_its_type(value: Any) -> None:
    assert_same(through_json(value), value)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=2000),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(json_like)
def test_any_nested_value_comes_back(value: Any) -> None:
    assert_same(through_json(value), value)


class Colour(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Colour.RED,
        Point(1, 2),
        Text("a"),
        defaultdict(int),
        len,
        datetime.timedelta(1),
        np.array([object()]),
        np.zeros(2, dtype=[("a", "i4")]),
        range(3),
        torch.Generator(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_need_pickle_is_refused_by_path_and_type(value: Any) -> None:
    with pytest.raises(UnsupportedObject, match=r"^optimizer\.state\.0\.foo\.1: <(class|enum) "):
        encode([1, value], ("optimizer", "state", 0, "foo"))


def test_cycle_is_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(UnsupportedObject, match="nested deeper"):
        encode(cycle, ("value",))


def test_large_bytes_leave_only_a_reference_in_the_json() -> None:
    encoded = encode({"a": b"x" * 10_000}, ("value",))
    assert len(json.dumps(encoded.json)) < 100
    assert [attachment.data.nbytes for attachment in encoded.attachments] == [10_000]


def test_tensors_go_to_the_sink_by_path() -> None:
    names = []

    def sink(tensor: torch.Tensor, path: tuple[str | int, ...]) -> str:
        names.append(path)
        return "t"

    encoded = encode([(torch.ones(2),)], ("a",), sink)
    assert encoded == EncodedObject([{"$tuple": [{"$tensor": "t"}]}])
    assert names == [("a", 0, 0)]
    tensor = torch.ones(2)
    assert decode(encoded.json, lambda *_: b"", {"t": tensor}) == [(tensor,)]


@pytest.mark.parametrize("json_value", [{"$pickle": "x"}, {"$int": "1", "$float": "2"}])
def test_unknown_tag_is_an_integrity_error(json_value: Any) -> None:
    with pytest.raises(IntegrityError, match="unknown tag"):
        decode(json_value, lambda *_: b"", {})


def test_object_array_is_never_decoded() -> None:
    with pytest.raises(IntegrityError, match="never writes"):
        decode({"$array": ["|O", [1], "AAAAAAAAAAA="]}, lambda *_: b"", {})
