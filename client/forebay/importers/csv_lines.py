"""Lines of CSV files, which Arrow does not tell: where rows begin, and what is wrong with them.

It reads as Arrow does: a quote counts at the beginning of a field, two of them within quotes are
one, and lines without anything are no rows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np

QUOTE: Final = '"'
_BOM: Final = b"\xef\xbb\xbf".decode("latin-1")
_ENDS: Final = "\r\n"


@dataclass
class Record:
    """One row, or the names of the columns."""

    line: int
    """Number, from 1, of the line that it begins on."""
    num_fields: int = 1
    num_bytes: int = 0
    undecodable: tuple[int, int] | None = None
    """Line and field, from 0, of the first byte that is not UTF-8."""
    open_quote: int | None = None
    """Line of the quote that nothing closes before the file ends."""


def records(plain: IO[bytes], delimiter: str) -> Iterator[Record]:
    """All rows, the names of the columns among them."""
    text = io.TextIOWrapper(plain, encoding="latin-1", newline="")  # a character is a byte
    record: Record | None = None
    opened: int | None = None
    for number, line in enumerate(text, 1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if opened is None:
            if not line.rstrip(_ENDS):
                continue
            record = Record(number)
        assert record is not None
        before = record.num_fields
        was_open = opened is not None
        fields, is_open, is_new = _fields(line, delimiter, was_open)
        if is_new or not is_open:
            opened = number if is_open else None
        record.num_fields += fields
        record.num_bytes += len(line)
        if record.undecodable is None and not line.isascii():
            bad = _undecodable(line)
            if bad is not None:
                field = before - 1 + _fields(line[:bad], delimiter, was_open)[0]
                record.undecodable = (number, field)
        if opened is None:
            yield record
    if opened is not None:
        assert record is not None
        record.open_quote = opened
        yield record


def _fields(line: str, delimiter: str, is_open: bool) -> tuple[int, bool, bool]:
    """How many delimiters end fields of *line*, whether it ends within quotes, and whether these
    begin in it."""
    if not is_open and QUOTE not in line:
        return line.count(delimiter), False, False
    count, at, is_new = 0, 0, False
    while True:
        if not is_open and line.startswith(QUOTE, at):
            is_open, is_new, at = True, True, at + 1
        while is_open:
            at = line.find(QUOTE, at) + 1
            if not at:
                return count, True, is_new
            if line.startswith(QUOTE, at):
                at += 1
            else:
                is_open = False
        at = line.find(delimiter, at) + 1
        if not at:
            return count, False, False
        count += 1


def _undecodable(line: str) -> int | None:
    try:
        line.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


class Watched:
    """A file whose bytes are looked at while Arrow reads them."""

    def __init__(self, plain: Any, delimiter: str) -> None:
        self._plain = plain
        self._opens = np.zeros(256, dtype=bool)  # by the byte before a quote
        self._opens[np.frombuffer(f'{delimiter}\r\n"'.encode(), dtype=np.uint8)] = True
        self._last = b"\n"
        self._is_open = False
        self._has_odd_quotes = False
        self.has_hex = False
        """Whether ``0x`` occurs, in whatever column."""

    @property
    def may_be_open(self) -> bool:
        """Whether the file may end within quotes: if all quotes are where fields begin and end,
        their number tells; else :func:`records` does."""
        return self._is_open or self._has_odd_quotes

    @property
    def closed(self) -> bool:
        return bool(self._plain.closed)

    def close(self) -> None:
        self._plain.close()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._plain.read() if size < 0 else self._plain.read(size)
        if data:
            self._look(data)
        return data

    def _look(self, data: bytes) -> None:
        found = np.frombuffer(data, dtype=np.uint8)
        if not self.has_hex:
            places = np.flatnonzero((found | ord(" ")) == ord("x"))  # of either case
            if len(places) and places[0] == 0:
                places, self.has_hex = places[1:], self._last == b"0"
            self.has_hex |= bool((found[places - 1] == ord("0")).any())
        if b'"' in data and not self._has_odd_quotes:
            quotes = np.flatnonzero(found == ord('"'))
            opening = quotes[1 if self._is_open else 0 :: 2]
            if len(opening) and opening[0] == 0:
                opening, self._has_odd_quotes = opening[1:], not bool(self._opens[self._last[0]])
            self._has_odd_quotes |= not bool(self._opens[found[opening - 1]].all())
            self._is_open ^= len(quotes) % 2 == 1
        self._last = data[-1:]
