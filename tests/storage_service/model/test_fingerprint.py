"""Fingerprints from bytes say what torch says of the tensor, for every dtype and any cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.fingerprint import (
    GROUP_VALUES,
    FingerprintBuilder,
    extent_key,
    fingerprint,
)
from forebay_wire.dtypes import kind_of
from forebay_wire.errors import IntegrityError
from forebay_wire.fingerprint import (
    NUM_BUCKETS,
    RELATIVE_ERROR,
    Fingerprint,
    change,
    combine,
    decode_fingerprints,
    encode_fingerprints,
)
from forebay_wire.segments import table_of

KEY = bytes(16)

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
WHOLE = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16),
    *(torch.uint32, torch.int32, torch.uint64, torch.int64),
]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of(tensor: torch.Tensor) -> Fingerprint:
    return fingerprint(KEY, name(tensor.dtype), raw(tensor))


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def as_doubles(tensor: torch.Tensor) -> np.ndarray:
    """What torch takes the values for."""
    if tensor.dtype is torch.complex32:
        tensor = torch.view_as_real(tensor).float()
    elif tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype in (torch.uint64, torch.uint32, torch.uint16):
        return tensor.numpy().astype(np.float64).reshape(-1)
    return tensor.to(torch.float64).numpy().reshape(-1)


def check(tensor: torch.Tensor) -> None:
    found, values = of(tensor), as_doubles(tensor)
    finite = values[np.isfinite(values)]
    assert found.num_values == values.size
    assert found.num_nan == np.isnan(values).sum()
    assert found.num_inf == np.isinf(values).sum()
    if finite.size == 0:
        assert math.isnan(found.min)
        assert math.isnan(found.max)
        assert found.norm == 0
        return
    assert (found.min, found.max) == (finite.min(), finite.max())
    scale = np.abs(finite).max() or 1.0
    # In Python's numbers, which become infinite without a warning.
    norm = float(scale) * float(np.linalg.norm(finite / scale))
    assert found.norm == pytest.approx(norm, rel=1e-12, abs=0)


def bits(dtype: torch.dtype, data: bytes) -> torch.Tensor:
    """A tensor of just these bytes: NaN, infinities and subnormal numbers among them."""
    usable = data[: len(data) // dtype.itemsize * dtype.itemsize]
    if dtype is torch.bool:
        usable = bytes(byte & 1 for byte in usable)
    if not usable:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(usable), dtype=torch.uint8).view(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@given(st.sampled_from([*FLOATS, *COMPLEX, *WHOLE]), st.binary(max_size=600))
def test_any_bytes_of_any_dtype(dtype: torch.dtype, data: bytes) -> None:
    check(bits(dtype, data))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.uint8], ids=name)
def test_every_byte_of_the_small_ones(dtype: torch.dtype) -> None:
    check(bits(dtype, bytes(range(256)) * 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_subnormal_largest_and_one_value(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for values in ([info.smallest_normal / 4] * 3, [info.max, -info.max], [info.tiny, 1.0]):
        check(torch.tensor(values, dtype=dtype))
    check(torch.tensor(0.5, dtype=dtype))
    check(torch.empty(0, 3, dtype=dtype))


def test_two_numbers_in_a_byte() -> None:
    found = fingerprint(KEY, "float4_e2m1fn_x2", bytes([0x21, 0xF7]))  # 0.5, 1; 6, -6
    assert (found.num_values, found.min, found.max) == (4, -6.0, 6.0)
    assert found.norm == pytest.approx(math.sqrt(0.25 + 1 + 72))


def test_a_dtype_of_which_nothing_is_known() -> None:
    found = fingerprint(KEY, "bits8", b"abc")
    assert kind_of("bits8") is None
    assert not found.has_figures
    assert change([found], [fingerprint(KEY, "bits8", b"abc")]).norm == 0
    assert change([found], [fingerprint(KEY, "bits8", b"abd")]) is None


@given(st.data())
def test_the_cut_does_not_matter(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "complex128", "uint8"]))
    size = data.draw(st.integers(0, 3 * GROUP_VALUES)) * (kind_of(dtype).item_bytes)
    content = np.random.default_rng(size).integers(1, 60, size, dtype=np.uint8).tobytes()
    builder, start = FingerprintBuilder(KEY, dtype), 0
    while start < size:
        stop = start + data.draw(st.integers(1, size))
        builder.update(memoryview(content)[start:stop])
        start = stop
    found, whole = builder.finish(), fingerprint(KEY, dtype, content)
    assert found.digest == whole.digest
    assert (found.num_values, found.min, found.max) == pytest.approx(
        (whole.num_values, whole.min, whole.max), nan_ok=True
    )
    assert found.norm == pytest.approx(whole.norm)
    if whole.sketch is not None:
        np.testing.assert_allclose(found.sketch, whole.sketch, atol=1e-5)


def test_the_sketch_follows_its_definition() -> None:
    """The slow way, value by value, as docs/formats/fingerprint.md has it."""
    from blake3 import blake3

    values = np.random.default_rng(7).standard_normal(2 * GROUP_VALUES + 130)
    found = fingerprint(KEY, "float64", values.tobytes())
    signs = blake3(key=blake3(b"forebay fingerprint signs 1").digest())
    buckets = blake3(key=blake3(b"forebay fingerprint buckets 1").digest())
    num_groups = -(-len(values) // GROUP_VALUES)
    sign_bytes = signs.digest(length=num_groups * GROUP_VALUES // 8)
    key_bytes = buckets.digest(length=num_groups * NUM_BUCKETS * 4)
    expected = [0.0] * NUM_BUCKETS
    for group in range(num_groups):
        keys = np.frombuffer(key_bytes, "<u4", NUM_BUCKETS, group * NUM_BUCKETS * 4).tolist()
        order = sorted(range(NUM_BUCKETS), key=lambda row: (keys[row], row))
        turn_of = {row: turn for turn, row in enumerate(order)}
        for row in range(NUM_BUCKETS):
            for column in range(NUM_BUCKETS):
                number = group * GROUP_VALUES + row * NUM_BUCKETS + column
                if number < len(values):
                    minus = sign_bytes[number // 8] >> (number % 8) & 1
                    bucket = (column + turn_of[row]) % NUM_BUCKETS
                    expected[bucket] += -values[number] if minus else values[number]
    np.testing.assert_allclose(found.sketch * found.norm, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", ["everywhere", "a column", "a row", "few"])
def test_estimates_of_changes(where: str) -> None:
    """Off by no more than promised, on average over many, wherever the change is."""
    generator, errors = np.random.default_rng(3), []
    for number in range(60):
        before = generator.standard_normal((257, 64)).astype(np.float32)
        delta = np.zeros_like(before)
        if where == "everywhere":
            delta[:] = generator.standard_normal(before.shape) * 1e-3
        elif where == "a column":
            delta[:, number] = 1e-2
        elif where == "a row":
            delta[number] = generator.standard_normal(64)
        else:
            delta.reshape(-1)[generator.integers(0, before.size, 3)] = 1.0
        after = before + delta
        true = np.linalg.norm(after.astype(np.float64) - before)
        found = change([of(torch.from_numpy(before))], [of(torch.from_numpy(after))])
        assert found is not None
        assert not found.is_exact
        errors.append(found.norm / true - 1)
    assert np.sqrt(np.mean(np.square(errors))) < 1.5 * RELATIVE_ERROR
    assert abs(np.mean(errors)) < RELATIVE_ERROR / 2


def test_what_is_equal_is_exactly_unchanged() -> None:
    tensor = torch.tensor([1.0, math.nan, math.inf])
    found = change([of(tensor)], [of(tensor.clone())])
    assert found is not None
    assert (found.norm, found.relative, found.is_exact) == (0, 0, True)


def test_scalars_are_exact_and_nan_is_infinitely_far() -> None:
    one, two = of(torch.tensor(4.0)), of(torch.tensor(7.0))
    found = change([one], [two])
    assert found is not None
    assert (found.norm, found.relative, found.is_exact) == (3, 0.75, True)
    gone = change([of(torch.ones(70))], [of(torch.full((70,), math.nan))])
    assert gone is not None
    assert gone.relative == math.inf


def test_parts_add_up_to_the_whole() -> None:
    whole = torch.randn(40, 30)
    whole[3, 4] = math.nan
    found = combine([of(whole[:7]), of(whole[7:])])
    one = of(whole)
    assert (found.num_values, found.num_nan, found.min, found.max) == (
        *(one.num_values, one.num_nan, one.min, one.max),
    )
    assert found.norm == pytest.approx(one.norm)


def test_keys_go_by_the_segments_and_the_place_in_them() -> None:
    first, second = b"a" * 5000, b"b" * 5000
    table = table_of([first, second, first])
    assert extent_key("float32", 64, 128, table) == extent_key("float32", 10064, 128, table)
    assert extent_key("float32", 64, 128, table) != extent_key("float32", 5064, 128, table)
    assert extent_key("float32", 64, 128, table) != extent_key("int32", 64, 128, table)
    assert extent_key("float32", 64, 128, table) != extent_key("float32", 128, 128, table)
    assert extent_key("float32", 4992, 128, table) != extent_key("float32", 4992, 4, table)
    assert extent_key("float32", 0, 0, table) == extent_key("float32", 0, 0, table_of([second]))


def test_what_is_kept_is_read_back_or_refused() -> None:
    kept = [of(torch.randn(100)), of(torch.tensor(1)), fingerprint(KEY, "bits8", b"abc")]
    data = encode_fingerprints(kept)
    for one, other in zip(kept, decode_fingerprints(data, "test"), strict=True):
        assert one.encode() == other.encode()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 4
        with pytest.raises(IntegrityError):
            decode_fingerprints(bytes(damaged), "test")
    with pytest.raises(IntegrityError):
        decode_fingerprints(data[:-1], "test")
