"""Rows of CSV files are found where Arrow finds them, and quotes that nothing closes."""

import io

import pyarrow.csv as pa_csv
from hypothesis import example, given
from hypothesis import strategies as st

from forebay.importers.csv_lines import Watched, records

TEXTS = st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "a", "é", " "])).map("".join)


@given(TEXTS, st.integers(1, 9))
@example('a,5" b\n"c', 3)
@example('"a"\n"', 4)
def test_open_quotes_are_found(text: str, size: int) -> None:
    found = list(records(io.BytesIO(text.encode()), ","))
    is_open = bool(found) and found[-1].open_quote is not None
    assert is_open == _is_open(text)
    watched = Watched(io.BytesIO(text.encode()), ",")
    while watched.read(size):
        pass
    assert watched.may_be_open or not is_open


def _is_open(text: str) -> bool:
    """By the letter, a character at a time."""
    is_open, starts, place = False, True, 0
    while place < len(text):
        one = text[place]
        if is_open and text[place : place + 2] == '""':
            place += 1
        elif is_open:
            is_open = one != '"'
        elif one == '"' and starts:
            is_open = True
        starts = not is_open and one in ",\r\n"
        place += 1
    return is_open


@given(TEXTS.filter(lambda text: not _is_open(text)))
def test_rows_and_fields_are_those_of_arrow(text: str) -> None:
    text = "x,y\n" + text + "\n"
    found = list(records(io.BytesIO(text.encode()), ","))
    rejected: list[int] = []

    def take(row: pa_csv.InvalidRow) -> str:
        rejected.append(row.actual_columns)
        return "skip"

    table = pa_csv.read_csv(
        io.BytesIO(text.encode()),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=take),
    )
    counts = [one.num_fields for one in found[1:]]
    assert rejected == [count for count in counts if count != 2]
    assert table.num_rows == counts.count(2)


@given(st.text("0xX1,", max_size=9), st.integers(1, 4))
def test_hexadecimal_numbers_are_noticed(text: str, size: int) -> None:
    watched = Watched(io.BytesIO(text.encode()), ",")
    while watched.read(size):
        pass
    assert watched.has_hex == ("0x" in text.lower())


def test_lines_of_what_is_not_utf8() -> None:
    text = '\ufeffa,b\n\n1,"x\ny'.encode() + b'\xe9",2\n"\n\xff'
    found = list(records(io.BytesIO(text), ","))
    assert [(one.line, one.num_fields) for one in found] == [(1, 2), (3, 3), (5, 1)]
    assert [one.undecodable for one in found] == [None, (4, 1), (6, 0)]
    assert [one.open_quote for one in found] == [None, None, 5]
