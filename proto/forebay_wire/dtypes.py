"""Bytes of tensors as numbers, by torch's names of dtypes: numpy, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Kind:
    """How the bytes of a dtype become numbers."""

    item_bytes: int
    values_per_item: int
    decode: Callable[[NDArray[np.uint8]], Floats]
    """Whole items to float32 where that is exact, else float64."""


def kind_of(dtype: str) -> Kind | None:
    """Of torch's name of a dtype; None if its values are not known here."""
    return _KINDS.get(dtype)


def to_numpy(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any] | None:
    """Whole items as the numpy numbers that hold them exactly: integers as they are, bfloat16 and
    smaller floats as float32, complex32 as complex64. None if their values are not known here."""
    if dtype in _NUMPY:
        found: NDArray[Any] = _aligned(raw, _NUMPY[dtype])
        return found
    kind = kind_of(dtype)
    if kind is None:
        return None
    values: NDArray[Any] = kind.decode(raw)
    return values.view(np.complex64) if dtype == "complex32" else values


_NUMPY: Final = {
    "bool": "?",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
    **{f"int{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"uint{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
}


def _native(numpy_dtype: str, as_dtype: str = "") -> Callable[[NDArray[np.uint8]], Floats]:
    def decode(raw: NDArray[np.uint8]) -> Floats:
        values: Floats = _aligned(raw, numpy_dtype)
        return values.astype(as_dtype) if as_dtype else values

    return decode


def _aligned(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """*raw* as numbers of *dtype*, copied where they do not lie at their borders."""
    found = raw.view(dtype)
    return found if found.flags.aligned else found.copy()


def _bfloat16(raw: NDArray[np.uint8]) -> Floats:
    wide = _aligned(raw, "<u2").astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def _by_table(table: NDArray[np.float32]) -> Callable[[NDArray[np.uint8]], Floats]:
    def decode(raw: NDArray[np.uint8]) -> Floats:
        found: Floats = np.take(table, raw, axis=0).reshape(-1)
        return found

    return decode


def _small_float(
    exponent_bits: int, mantissa_bits: int, bias: int, *, special: str
) -> NDArray[np.float32]:
    """All 256 values of a float of 8 bits.

    *special*: ``ieee`` (the highest exponent is infinities and NaN), ``fn`` (only the code of all
    ones is NaN) or ``fnuz`` (so is only minus zero).
    """
    found = []
    top = (1 << exponent_bits) - 1
    for code in range(256):
        exponent = (code >> mantissa_bits) & top
        mantissa = code & ((1 << mantissa_bits) - 1)
        sign = -1.0 if code & 0x80 else 1.0
        if exponent:
            value = math.ldexp(1 + mantissa / (1 << mantissa_bits), exponent - bias)
        else:
            value = math.ldexp(mantissa / (1 << mantissa_bits), 1 - bias)
        if special == "ieee" and exponent == top:
            value = math.nan if mantissa else math.inf
        is_last = exponent == top and mantissa == (1 << mantissa_bits) - 1
        if (special == "fn" and is_last) or (special == "fnuz" and code == 0x80):
            value = math.nan
        found.append(sign * value)
    return np.array(found, np.float32)


def _exponents() -> NDArray[np.float32]:
    """float8_e8m0fnu: powers of two, no sign, no zero."""
    found = [math.ldexp(1.0, code - 127) for code in range(255)]
    return np.array([*found, math.nan], np.float32)


def _pairs_of_four_bits() -> NDArray[np.float32]:
    """float4_e2m1fn_x2: two numbers in each byte, the one in the low bits first."""
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    one = [*sizes, *(-size for size in sizes)]
    return np.array([[one[code & 15], one[code >> 4]] for code in range(256)], np.float32)


_KINDS: Final[dict[str, Kind]] = {
    "float64": Kind(8, 1, _native("<f8")),
    "float32": Kind(4, 1, _native("<f4")),
    "float16": Kind(2, 1, _native("<f2", "<f4")),
    "bfloat16": Kind(2, 1, _bfloat16),
    "float8_e4m3fn": Kind(1, 1, _by_table(_small_float(4, 3, 7, special="fn"))),
    "float8_e4m3fnuz": Kind(1, 1, _by_table(_small_float(4, 3, 8, special="fnuz"))),
    "float8_e5m2": Kind(1, 1, _by_table(_small_float(5, 2, 15, special="ieee"))),
    "float8_e5m2fnuz": Kind(1, 1, _by_table(_small_float(5, 2, 16, special="fnuz"))),
    "float8_e8m0fnu": Kind(1, 1, _by_table(_exponents())),
    "float4_e2m1fn_x2": Kind(1, 2, _by_table(_pairs_of_four_bits())),
    "complex32": Kind(4, 2, _native("<f2", "<f4")),
    "complex64": Kind(8, 2, _native("<f4")),
    "complex128": Kind(16, 2, _native("<f8")),
    "bool": Kind(1, 1, _native("|u1", "<f4")),
    "uint8": Kind(1, 1, _native("|u1", "<f4")),
    "int8": Kind(1, 1, _native("|i1", "<f4")),
    "uint16": Kind(2, 1, _native("<u2", "<f4")),
    "int16": Kind(2, 1, _native("<i2", "<f4")),
    "uint32": Kind(4, 1, _native("<u4", "<f8")),
    "int32": Kind(4, 1, _native("<i4", "<f8")),
    "uint64": Kind(8, 1, _native("<u8", "<f8")),
    "int64": Kind(8, 1, _native("<i8", "<f8")),
}
