"""Types of CSV columns are those of all values, and change none of them."""

import datetime
import gzip
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import forebay
from forebay.importers import csv_files
from forebay.importers.csv_types import first_misfit
from forebay.importers.files import look
from forebay.importers.piece import Options
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.errors import InvalidRequest, SchemaMismatch


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forebay.Client]:
    with (
        DaemonProcess(tmp_path_factory.mktemp("csv") / "data") as process,
        forebay.connect(process.data) as connected,
    ):
        yield connected


Load = Callable[..., pa.Table]
_NUMBERS = itertools.count()


@pytest.fixture
def load(client: forebay.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports files of these texts, in blocks of few rows."""
    monkeypatch.setattr(csv_files, "BLOCK_BYTES", 64)
    names: list[str] = []

    def imported(*texts: str, append: bool = False, **options: object) -> pa.Table:
        if not append:
            names.append(f"csv-{next(_NUMBERS)}")
        paths = [tmp_path / f"{number}.csv" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return client.import_dataset(names[-1], paths, append=append, **options).table()

    return imported


def column(*values: object) -> str:
    """A file of one column, longer than a block."""
    return "x\n" + "".join(f"{value}\n" for value in values)


FILLER = ["1"] * 100


@pytest.mark.parametrize(
    ("values", "kind", "last"),
    [
        (["1"], pa.int64(), 1),
        (["-9223372036854775808"], pa.int64(), -(2**63)),
        (["9223372036854775808"], pa.uint64(), 2**63),
        (["18446744073709551615"], pa.uint64(), 2**64 - 1),
        (["0.5"], pa.float64(), 0.5),
        (["-3", "1e3"], pa.float64(), 1000.0),
        ([" 7"], pa.int64(), 7),
        (["007"], pa.string(), "007"),
        (["00.5"], pa.string(), "00.5"),
        (["0"], pa.int64(), 0),
        (["0x10"], pa.string(), "0x10"),
        ([" 0XFF "], pa.string(), " 0XFF "),
        (["1e400"], pa.string(), "1e400"),
        (["0.5", "-1e999"], pa.string(), "-1e999"),
        (["-inf"], pa.float64(), -np.inf),
        (["Infinity"], pa.float64(), np.inf),
        ([" "], pa.string(), " "),
        ([" NA"], pa.string(), " NA"),
        (["\t7 "], pa.int64(), 7),
        (["7\u00a0"], pa.string(), "7\u00a0"),
        (["x1"], pa.string(), "x1"),
    ],
)
def test_a_type_is_that_of_all_values(
    load: Load, values: list[str], kind: pa.DataType, last: object
) -> None:
    found = load(column(*FILLER, *values)).column("x")
    assert (found.type, found[-1].as_py()) == (kind, last)
    assert len(found) == 100 + len(values)
    assert found[0].as_py() == ("1" if kind == pa.string() else 1)


@pytest.mark.parametrize(
    ("values", "kind", "last"),
    [
        (["true"] * 50 + ["FALSE"], "bool", False),
        (["0"] * 50 + ["true"], "bool", True),
        (["true"] * 50 + ["tRUE"], "text", "tRUE"),
        (["true"] * 50 + [" false"], "text", " false"),
        (["2024-02-29 10:00:00"] * 50 + ["2024-02-29 10:00:00 "], "text", "2024-02-29 10:00:00 "),
        (["2024-02-29"] * 50, "date32", datetime.date(2024, 2, 29)),
        (["2024-02-29"] * 50 + ["2024-02-29 10:00:00"], "ts", datetime.datetime(2024, 2, 29, 10)),  # noqa: DTZ001  the type has no zone
        (["10:30"] * 50 + ["10:30:05"], "time", datetime.time(10, 30, 5)),
        (["2024-02-29"] * 50 + ["soon"], "text", "soon"),
        ([""] * 50, "text", ""),
        (["NA"] * 50, "text", "NA"),
    ],
)
def test_other_types_are_those_that_arrow_infers(
    load: Load, values: list[str], kind: str, last: object
) -> None:
    wanted = {
        "bool": pa.bool_(),
        "date32": pa.date32(),
        "ts": pa.timestamp("s"),
        "time": pa.time32("s"),
        "text": pa.string(),
    }
    found = load("x,y\n" + "".join(f"{value},1\n" for value in values)).column("x")
    assert (found.type, found[-1].as_py()) == (wanted[kind], last)
    assert len(found) == len(values)


def test_types_that_are_given_win(load: Load) -> None:
    text = "id,x,y\n" + "007,1,\n" * 50
    types = {"id": "int64", "x": "float32", "y": "float64"}
    found = load(text, types=types)
    assert [str(one) for one in found.schema.types] == ["int64", "float", "double"]
    assert found.column("id")[0].as_py() == 7
    assert np.isnan(found.column("y")[0].as_py())
    with pytest.raises(InvalidRequest, match="a type is given for z"):
        load(text, types={"z": "int64"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["18446744073709551616"],
            "line 102, column 'x'.* numbers like 18446744073709551616",
        ),
        (
            ["-1", "9223372036854775808"],
            "line 103, column 'x'.* numbers like 9223372036854775808",
        ),
        (
            ["9007199254740993", "0.5"],
            "line 102, column 'x'.* numbers like 9007199254740993",
        ),
        ([""], None),
        (["NA"], "line 102, column 'x': the value is missing"),
    ],
)
def test_what_no_number_type_keeps_is_named(
    load: Load, values: list[str], message: str | None
) -> None:
    text = column(*FILLER, *values)
    if message is None:  # an empty line is no row
        assert len(load(text)) == 100
        return
    with pytest.raises(SchemaMismatch, match=message):
        load(text)
    assert len(load(text, types={"x": "float64"})) == 100 + len(values)


def test_files_have_one_type_or_are_told_apart(load: Load) -> None:
    whole, half, text = (column(*["1"] * 50, last) for last in ("2", "0.5", "two"))
    empty, other = column(*['""'] * 9), "y\n1\n"
    assert load(whole, half).column("x").type == pa.float64()
    assert load(empty, whole, append=True).column("x").to_pylist()[-1] == 2
    assert load(empty, text).column("x").type == pa.string()
    with pytest.raises(SchemaMismatch, match=r"1.csv, line 52, column 'x': 'two' is no int64, wh"):
        load(whole, text)
    with pytest.raises(SchemaMismatch, match=r"1.csv: its columns are y; those of .*0.csv are x"):
        load(whole, other)
    found = load(whole, text, types={"x": "string"})
    assert found.column("x")[-1].as_py() == "two"


def test_a_value_that_is_not_of_the_given_type_is_named(load: Load) -> None:
    head = '"a text\nof two lines",1\n\n' * 40  # and empty lines, which are no rows
    with pytest.raises(SchemaMismatch, match=r"line 122, column 'x': 'one' is no int64"):
        load("t,x\n" + head + "t,one\n" + head, types={"x": "int64"})
    load("t,x\n" + head)
    with pytest.raises(SchemaMismatch, match=r"line 122, column 'x': '0.5' is no int64"):
        load("t,x\n" + head + "t,0.5\n", append=True)
    with pytest.raises(SchemaMismatch, match=r"line 121, column 'f1': the value is missing"):
        load(head + "t,NA\n", types={"f1": "int64"}, has_header=False)
    with pytest.raises(InvalidRequest, match=r"0.csv, line 122: expected 2 columns, found 3"):
        load("t,x\n" + head + "1,2,3\n")
    with pytest.raises(InvalidRequest, match="same name"):
        load("t,t\n1,2\n")


def test_arrow_reads_no_number_that_is_none(load: Load) -> None:
    load("i,f,t\n" + "1,0.5,0x1\n" * 50)
    assert load("i,f,t\n" + "1,inf,0x1\n" * 50, append=True).num_rows == 100
    for row, column, value, kind in (
        ("0x10,1,a", "i", "0x10", "int64"),
        (" 0X10,1,a", "i", " 0X10", "int64"),
        ("1,1e400,a", "f", "1e400", "double"),
    ):
        text = "i,f,t\n" + "1,inf,0x1\n" * 50 + row + "\n"
        message = f"0.csv, line 52, column '{column}': '{value}' is no {kind}"
        with pytest.raises(SchemaMismatch, match=message):
            load(text, append=True)
    with pytest.raises(SchemaMismatch, match="line 2, column 'i': '0x7' is no int8"):
        load("i\n0x7\n", types={"i": "int8"})
    with pytest.raises(SchemaMismatch, match="line 2, column 'f': '1e39' is no float"):
        load("f\n1e39\n", types={"f": "float32"})


def test_columns_that_an_appended_file_lacks_are_named(load: Load) -> None:
    load("i,j,f,t\n1,2,0.5,a\n")
    for row in ("i,f,t\n0x1,0.5,a\n", "i,f,t\n1,inf,0x1\n", "i,j,t\nx,1,a\n", "i,j,t\n1,1,a\n"):
        with pytest.raises(SchemaMismatch, match=r"column '[ifj]'|columns"):
            load(row, append=True)


def test_long_fields_have_lines_too(
    client: forebay.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "long.csv"
    path.write_text('n,t\n1,"' + "q\n" * 150_000 + '"\nx,"' + "y" * 200_000 + '"\n')
    message = "line 150003, column 'n': 'x' is no int64"
    with pytest.raises(SchemaMismatch, match=message):
        client.import_dataset("long", path, types={"n": "int64"})
    with caplog.at_level(logging.WARNING):
        made = client.import_dataset("long", path)
    assert message in caplog.text
    assert made.table().column("t")[1].as_py() == "y" * 200_000


ROW = "1,a\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROW * 40 + '2,"open\n' + ROW * 40, "line 42: the quote that opens there is never closed"),
        (ROW * 40 + '2,"open', "line 42: the quote that opens"),
        (ROW * 40 + '"2\n' + "\n" * 9, "line 42: the quote that opens"),
        ('1,5" wide\n' * 41 + '2,"5\n' + ROW * 40, "line 43: the quote that opens"),
        ('1,"a\nb\n"\n1,"""c\n' + ROW * 40, "line 5: the quote that opens"),
        ('1,"a\nb", x"y\n' + ROW, "line 2: expected 2 columns, found 3"),
        (ROW * 40 + "1\n" + ROW, "line 42: expected 2 columns, found 1"),
        ('1,"\na,b"\n\n' * 40 + "1,2,3\n", "line 122: expected 2 columns, found 3"),
        (ROW * 40 + "1,caf\udce9\n", "line 42, column 'b': the text is not UTF-8"),
        (ROW * 40 + '1,"\n\n\udce9"\n', "line 44, column 'b': the text is not UTF-8"),
        (ROW * 40 + "1\udce9,a\n", "line 42, column 'a': the text is not UTF-8"),
    ],
)
def test_what_is_no_csv_is_named_by_its_line(
    client: forebay.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setattr(csv_files, "BLOCK_BYTES", 400)
    path = tmp_path / "f.csv"
    path.write_bytes(("a,b\n" + text).encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidRequest, match=f"f.csv, {message}"):
        client.import_dataset("broken", path)


@pytest.mark.parametrize(
    "text", ['1,5" wide\n2,"5"" wide"\n', '1,""\n2,""""\n', '1,"a\nb"\n2,"c"\n\n\n', '1,"a"b"\n']
)
def test_quotes_that_are_closed_are_taken(load: Load, text: str) -> None:
    assert load("a,b\n" + text * 50).num_rows == 50 * text.count(
        "\n" if "\nb" not in text else ',"'
    )


def test_what_cannot_be_read_says_what_to_do(client: forebay.Client, tmp_path: Path) -> None:
    good, empty, cut = (tmp_path / name for name in ("good.csv", "none.csv", "cut.csv.gz"))
    good.write_text("a\n1\n")
    empty.write_text("")
    with pytest.raises(InvalidRequest, match=r"none.csv is empty: .* leave it out"):
        client.import_dataset("broken", [good, empty])
    for text in (b"a\xe9,b\n1,2\n", b"b,a\xe9\n1,2\n"):
        empty.write_bytes(text)
        number = 1 + (text[0:1] == b"b")
        for types in ({}, {"a": "int64", "b": "int64"}):
            message = f"none.csv, line 1, column {number}: the text is not UTF-8"
            with pytest.raises(InvalidRequest, match=message):
                client.import_dataset("unread", empty, types=types)
    packed = gzip.compress(np.random.default_rng(0).bytes(1 << 20).hex("\n", 8).encode())
    cut.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InvalidRequest, match=r"cut.csv.gz is cut off or damaged .*: copy it again"):
        client.import_dataset("broken", cut)


PARTS = [
    "1",
    "0",
    "7",
    "-",
    "+",
    " ",
    "\t",
    "\u00a0",
    "NA",
    "0x",
    "e4",
    "00",
    ".",
    "inf",
    "nan",
    "true",
]
PARTS += ["False", "tRUE", "2024-02-29", "10:30", ":05", "T", "Z", '""', "+0530", "24:00"]
FIELDS = st.lists(st.sampled_from(PARTS), max_size=4).map("".join)


@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=5), st.booleans())
def test_the_reader_takes_what_the_scan_allows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], are_quoted: bool
) -> None:
    path = tmp_path_factory.mktemp("agree") / "f.csv"
    quote = '"' if are_quoted else ""
    path.write_text("a,b\n" + "".join(f"{quote}{a}{quote},{quote}{b}{quote}\n" for a, b in rows))
    piece = csv_files.CsvPiece(look(str(path)))
    try:
        schema = csv_files.csv_schema([piece], Options())
    except InvalidRequest as refused:
        if "rounds numbers" in str(refused) or "never closed" in str(refused):
            return
        raise
    blocks = list(piece.read(schema, Options()))
    assert sum(block.batch.num_rows for block in blocks) == len(rows)
    for name, texts in zip("ab", zip(*rows, strict=True), strict=True):
        found = [one for block in blocks for one in block.batch.column(name).to_pylist()]
        if schema[name].kind == "string":
            assert are_quoted or '"' in "".join(texts) or found == list(texts)


def test_text_beside_numbers_is_said(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load("x,y\n" + "a,1\n" * 30)
        assert caplog.text == ""
        load("x,y\n" + "a,1\n" * 30 + "a,b\n")
    assert "0.csv, line 32, column 'y': 'b' is no int64, as the values before it are" in caplog.text


def test_compressed_files_are_looked_through_as_well(
    client: forebay.Client, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(column(*FILLER, "0.25").encode()))
    made = client.import_dataset("compressed", path)
    assert made.table().column("x")[-1].as_py() == 0.25
    path.write_bytes(gzip.compress(column(*FILLER, "word").encode()))
    with pytest.raises(SchemaMismatch, match=r"t.csv.gz, line 102, column 'x': 'word' is no d"):
        client.import_dataset("compressed", path, append=True)


@given(st.integers(0, 600), st.lists(st.integers(0, 600), max_size=3))
def test_the_first_misfit_is_found(count: int, places: list[int]) -> None:
    values = ["7"] * count
    for place in places:
        values[place:] = ["x", *values[place + 1 :]]
    found = first_misfit(pa.int64(), pa.array(values, pa.string()))
    assert found == (values.index("x") if "x" in values else None)
