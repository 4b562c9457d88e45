"""Types of the columns of CSV files: of all their values, such that none is changed.

The types are those that pyarrow infers, looked for in all rows of all files instead of the first
block of one; and there are none for what they would change: whole numbers beyond int64 are uint64
or refused; digits behind a leading zero (``007``) are text, as for readr, and so are hexadecimal
numbers (``0x10``) and columns with numbers that float64 has no room for (``1e400``). What a type
takes is what Arrow's reader of CSV takes then, also with white space around.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from forebay_wire.errors import SchemaMismatch

MAX_EXACT: Final = 2**53
"""Whole numbers up to here are kept by float64."""

logger = logging.getLogger(__name__)

NUMBERS: Final = (pa.int64(), pa.uint64(), pa.float64())
CANDIDATES: Final = (
    *(pa.int64(), pa.uint64(), pa.bool_(), pa.date32(), pa.time32("s")),
    *(pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.timestamp("ns", "UTC")),
    pa.float64(),
)
"""The first one that takes all values is a column's type; text if none does."""

_MISSING: Final = pa.array(pa_csv.ConvertOptions().null_values)
_BLANK: Final = " \t"
"""What Arrow's reader leaves out around numbers, dates and times, and nowhere else."""
_LEADING_ZERO: Final = r"^[ \t]*[+-]?0[0-9xX]"
_HEX: Final = r"^[ \t]*[+-]?0[xX]"
_LONG_INTEGER: Final = r"^[ \t]*[+-]?[0-9]{16,}[ \t]*$"
_INFINITY: Final = r"(?i)^[+-]?inf"
_TRUTHS: Final = pa.array(
    [*pa_csv.ConvertOptions().true_values, *pa_csv.ConvertOptions().false_values]
)
FIRST_VALUES: Final = 64
SHOWN: Final = 80
"""Characters of a value in a message."""
_TIME: Final = r"^([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?$"

Rows = Iterator[tuple[int, pa.RecordBatch]]
"""Batches of text, each with the number of its first row."""


@dataclass(frozen=True)
class Place:
    """A value."""

    row: int
    value: str

    @property
    def shown(self) -> str:
        """For messages."""
        return repr(self.value if len(self.value) <= SHOWN else self.value[:SHOWN] + "…")


@dataclass
class ColumnTypes:
    """The types that the values of one column of one file may have."""

    candidates: tuple[pa.DataType, ...] = CANDIDATES
    has_values: bool = False
    large: Place | None = None
    """The first whole number beyond those that float64 keeps."""
    lost: dict[pa.DataType, Place] = field(default_factory=dict)
    """Of each type that is no candidate any more the first value that it does not take."""

    @property
    def type(self) -> pa.DataType | None:
        """None: there is no value."""
        if not self.has_values:
            return None
        return self.candidates[0] if self.candidates else pa.string()

    def take(self, values: pa.StringArray, row: int) -> None:
        """More *values*, of which the first one's number is *row*."""
        if self.has_values and not self.candidates:
            return
        rows, present = there(values)
        if not len(present):
            return
        self.has_values = True
        for kind, at in self._misfits(present):
            self.lost[kind] = Place(row + rows[at].as_py(), present[at].as_py())
        self.candidates = tuple(kind for kind in self.candidates if kind not in self.lost)
        if self.large is None and pa.float64() in self.candidates:
            self.large = _large(values, row)

    def _misfits(self, present: pa.StringArray) -> Iterator[tuple[pa.DataType, int]]:
        """The candidates that do not take all that is *present*, and the first value of each."""
        zero = -1
        if any(kind in NUMBERS for kind in self.candidates):
            zero = pc.index(pc.match_substring_regex(present, _LEADING_ZERO), True).as_py()
        for kind in self.candidates:
            part = present.slice(0, zero) if zero >= 0 and kind in NUMBERS else present
            at = first_misfit(kind, part)
            if at is not None:
                yield kind, at
            elif len(part) < len(present):
                yield kind, zero


def there(values: pa.StringArray) -> tuple[pa.Array, pa.StringArray]:
    """Numbers and texts of those that are there in any type: not empty, ``NA``, ``null`` and the
    like."""
    rows = pc.indices_nonzero(pc.invert(pc.is_in(values, _MISSING)))
    return rows, values if len(rows) == len(values) else values.take(rows)


def first_misfit(kind: pa.DataType, values: pa.StringArray) -> int | None:
    """The first of *values* that cannot be read as *kind*; None: all can.

    What cannot be read costs Arrow a hundred times what can, so it is looked for in ever larger
    pieces: a column of another type shows with the first.
    """
    start, size = 0, FIRST_VALUES
    while _reads(kind, values.slice(start, size)):
        start, size = start + size, 2 * size
        if start >= len(values):
            return None
    low, high = 0, size  # the first so many of the piece can be read; so many cannot
    while high - low > 1:
        middle = (low + high) // 2
        can = _reads(kind, values.slice(start + low, middle - low))
        low, high = (middle, high) if can else (low, middle)
    return start + low


def _reads(kind: pa.DataType, values: pa.StringArray) -> bool:
    """Whether Arrow's reader of CSV takes all *values*, and changes none beyond rounding."""
    if pa.types.is_boolean(kind):
        return pc.all(pc.is_in(values, _TRUTHS), min_count=0).as_py() is True
    if not pa.types.is_timestamp(kind):
        values = pc.utf8_trim(values, characters=_BLANK)
    if pa.types.is_time32(kind):
        return pc.all(pc.match_substring_regex(values, _TIME), min_count=0).as_py() is True
    try:
        found = values.cast(kind)
    except pa.ArrowException:
        return False
    if pa.types.is_floating(kind) and has_infinity(found):
        made = values.filter(pc.is_inf(found))
        return pc.all(pc.match_substring_regex(made, _INFINITY)).as_py() is True
    return True


def has_infinity(values: pa.Array) -> bool:
    """Whether there is one among these floats."""
    return pc.any(pc.is_inf(values)).as_py() is True


def _large(values: pa.StringArray, row: int) -> Place | None:
    found = pc.indices_nonzero(pc.match_substring_regex(values, _LONG_INTEGER))
    for place in found.to_pylist():
        value = values[place].as_py()
        if abs(int(value)) > MAX_EXACT:
            return Place(row + place, value)
    return None


@dataclass(frozen=True)
class Scanned:
    """What was found in one file."""

    name: str
    columns: Mapping[str, ColumnTypes]
    num_rows: int
    """Not all of them, if there was nothing to look for."""
    place_of: Callable[[int], str]
    """File and line of a row."""

    def where(self, place: Place, column: str) -> str:
        return f"{self.place_of(place.row)}, column {column!r}"


def scan(
    names: Sequence[str],
    wanted: Sequence[str],
    rows: Rows,
    place_of: Callable[[int], str],
    name: str,
) -> Scanned:
    """Look at *rows* of the file *name*, of columns *names*: for the types of those *wanted*."""
    columns = {column: ColumnTypes() for column in names}
    num_rows = 0
    for row, batch in rows:
        for column in wanted:
            columns[column].take(batch.column(column), row)
        num_rows = row + batch.num_rows
        if not wanted and num_rows:
            break
    return Scanned(name, columns, num_rows, place_of)


def common_schema(files: Sequence[Scanned]) -> pa.Schema:
    """One type for each column of all *files*. SchemaMismatch naming file, line and column."""
    names = list(files[0].columns)
    for file in files[1:]:
        if set(file.columns) != set(names):
            raise SchemaMismatch(
                f"{file.name}: its columns are {', '.join(sorted(file.columns))}; those of "
                f"{files[0].name} are {', '.join(sorted(names))}"
            )
    return pa.schema([pa.field(name, _common(name, files)) for name in names])


def _common(column: str, files: Sequence[Scanned]) -> pa.DataType:
    with_values = [file for file in files if file.columns[column].has_values]
    if not with_values:
        return pa.string()  # as text, the empty values stay what they are
    found = [file.columns[column] for file in with_values]
    for kind in CANDIDATES:
        if all(kind in one.candidates for one in found):
            if kind == pa.float64():
                _check_exact(column, with_values)
            return kind
    if any(one.candidates for one in found):
        _check_alike(column, with_values)
    for file in with_values:
        _warn(file, column)
    return pa.string()


def _warn(file: Scanned, column: str) -> None:
    """Say which value made text of a column that began as something else."""
    lost = file.columns[column].lost.items()
    kind, place = max(lost, key=lambda one: one[1].row)
    if place.row > min(other.row for _, other in lost):
        logger.warning(
            "%s: %s is no %s, as the values before it are: the column becomes text",
            file.where(place, column),
            place.shown,
            kind,
        )


def _check_exact(column: str, files: Sequence[Scanned]) -> None:
    for file in files:
        place = file.columns[column].large
        if place is not None:
            raise SchemaMismatch(
                f"{file.where(place, column)}: no integer type holds all numbers of the column, "
                f"and float64 rounds numbers like {place.value}: keep them as text with --type "
                f"{column}=string, or have them rounded with --type {column}=float64"
            )


def _check_alike(column: str, files: Sequence[Scanned]) -> None:
    """Files of which each by itself has another type than text are not made text silently."""
    first = next(file for file in files if file.columns[column].candidates)
    kind = first.columns[column].candidates[0]
    for file in files:
        place = file.columns[column].lost.get(kind)
        if file is not first and place is not None:
            raise SchemaMismatch(
                f"{file.where(place, column)}: {place.shown} is no {kind}, which the column is "
                f"in {first.name}: give one type for all with --type {column}=TYPE, such as string"
            )


def misfit(column: str, kind: pa.DataType, batches: Rows) -> Place | None:
    """The first value of *column* that cannot be read as *kind*; None: all can."""
    for row, batch in batches:
        if column not in batch.schema.names:
            return None  # which is said elsewhere
        rows, present = there(batch.column(column))
        at = first_misfit(kind, present)
        if at is not None:
            return Place(row + rows[at].as_py(), present[at].as_py())
    return None


def first_hexadecimal(columns: Sequence[str], batches: Rows) -> tuple[str, Place] | None:
    """The first value of *columns* that Arrow takes for a hexadecimal number, and its column."""
    for row, batch in batches:
        for column in [name for name in columns if name in batch.schema.names]:
            at = pc.index(pc.match_substring_regex(batch.column(column), _HEX), True).as_py()
            if at >= 0:
                return column, Place(row + at, batch.column(column)[at].as_py())
    return None
