"""Nested values of LitData: JSON text, or since its version 0.2.70 a tagged form, little-endian.

tag u8      0 JSON: text; 1 texts: count u32, texts; 2 i64s, 3 f64s, 4 bools: count u32, values;
            5 object: count u32, then a key (text) and a tagged value of each; 6 records:
            count u32, keys u32, keys, then of each record and key its kind u8 (16 null,
            17 text, 18 i64, 19 f64, 20 bool) and value; 7 text, 8 i64, 9 f64, 10 bool; 11 null
text        length u32, UTF-8
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np

MAX_DEPTH: Final = 100
FIRST_KIND: Final = 16
"""Of the values of records."""
FIRST_PRINTABLE: Final = 0x21
"""Bytes from here on begin JSON text."""


class NestedReader:
    """Reads one value from its front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def read(self) -> Any:
        """The value. ValueError, struct.error, IndexError for what is none."""
        if not self._data or self._data[0] >= FIRST_PRINTABLE:
            return json.loads(self._data)
        value = self._tagged(0)
        if self._position != len(self._data):
            raise ValueError(f"{len(self._data) - self._position} bytes follow a nested value")
        return value

    def _tagged(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"a value is nested deeper than {MAX_DEPTH}")
        tag = self._number("<B")
        if tag == 0:
            return json.loads(self._text())
        if tag == 1:
            return [self._text() for _ in range(self._number("<I"))]
        if tag in (2, 3, 4):
            return self._numbers({2: "<i8", 3: "<f8", 4: "?"}[tag])
        if tag == 5:
            return {self._text(): self._tagged(depth + 1) for _ in range(self._number("<I"))}
        if tag == 6:
            return self._records()
        return self._scalar(tag - 6 if tag < 11 else 0)

    def _records(self) -> list[dict[str, Any]]:
        count, num_keys = self._number("<I"), self._number("<I")
        keys = [self._text() for _ in range(num_keys)]
        return [
            {key: self._scalar(self._number("<B") - FIRST_KIND) for key in keys}
            for _ in range(count)
        ]

    def _scalar(self, kind: int) -> Any:
        readers: list[Callable[[], Any]] = [
            lambda: None,
            self._text,
            lambda: self._number("<q"),
            lambda: self._number("<d"),
            lambda: bool(self._number("<B")),
        ]
        if not 0 <= kind < len(readers):
            raise ValueError(f"a nested value has the unknown kind {kind}")
        return readers[kind]()

    def _numbers(self, dtype: str) -> list[Any]:
        count = self._number("<I")
        values: list[Any] = np.frombuffer(self._data, dtype, count, self._position).tolist()
        self._position += count * np.dtype(dtype).itemsize
        return values

    def _text(self) -> str:
        length = self._number("<I")
        text = self._data[self._position : self._position + length]
        if len(text) < length:
            raise ValueError("a text is cut short")
        self._position += length
        return text.decode()

    def _number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._data, self._position)
        self._position += struct.calcsize(layout)
        return value
