"""Importers read what other tools write: fixtures are encoded here, after their own pages."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forebay.dataset.tables import conform
from forebay.importers import tables
from forebay.importers.objects import source_of
from forebay.importers.piece import Options
from forebay.testing.foreign import npy, write_mds, write_tar
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound, SchemaMismatch


def read(given: Any, kind: str | None = None, **options: Any) -> pa.Table:
    """All rows of a source as a dataset would hold them, each piece read by itself."""
    source = source_of(given, kind)
    chosen = Options(**options)
    schema = source.schema(chosen)
    found = [
        conform(pa.Table.from_batches([block.batch]), schema)
        for piece in source.pieces
        for block in piece.read(schema, chosen)
    ]
    return pa.concat_tables(found)


# ------------------------------------------------------------------------------------ encoders


def write_litdata(
    folder: Path,
    formats: list[str],
    spec: Any,
    chunks: list[list[list[bytes]]],
    dim: int | None = None,
    **config: Any,
) -> None:
    folder.mkdir()
    listed = []
    for number, items in enumerate(chunks):
        bodies = [
            (b"" if dim else struct.pack(f"<{len(item)}I", *map(len, item))) + b"".join(item)
            for item in items
        ]
        offsets = np.cumsum([4 * (len(items) + 2), *map(len, bodies)])
        data = struct.pack(f"<{len(items) + 2}I", len(items), *offsets) + b"".join(bodies)
        name = f"chunk-0-{number}.bin"
        if config.get("compression"):
            data = pa.compress(data, codec="zstd", asbytes=True)
        (folder / name).write_bytes(data)
        listed.append(
            {"chunk_bytes": len(data), "chunk_size": len(items), "dim": dim, "filename": name}
        )
    text = json.dumps([1, spec]) if spec is not None else None
    index = {"chunks": listed, "config": {"data_format": formats, "data_spec": text, **config}}
    (folder / "index.json").write_text(json.dumps(index))


LEAF = {"type": None, "context": None, "children_spec": []}


def tree(**children: Any) -> dict[str, Any]:
    context = json.dumps(list(children))
    return {"type": "builtins.dict", "context": context, "children_spec": list(children.values())}


# -------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    rows = [{"n": n, "text": f"ü{n}", "deep": {"a": [n]}} for n in range(1000)]
    data = "\n".join(json.dumps(row) for row in rows).encode()
    if suffix.endswith("gz"):
        data = gzip.compress(data)
    if suffix.endswith("zst"):
        data = pa.compress(data, codec="zstd", asbytes=True)
    (tmp_path / f"t.{suffix}").write_bytes(data)
    assert read(tmp_path / f"t.{suffix}").to_pylist() == rows


@pytest.mark.parametrize("range_bytes", [1, 7, 64, 1000])
@pytest.mark.parametrize("block_bytes", [16, 4096])
def test_ranges_of_json_lines_are_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int, block_bytes: int
) -> None:
    monkeypatch.setattr(tables, "RANGE_BYTES", range_bytes)
    monkeypatch.setattr(tables, "BLOCK_BYTES", block_bytes)
    lines = [json.dumps({"n": n, "s": "x" * (n % 40)}) for n in range(60)]
    for end in ("", "\n", "\n\n"):
        (tmp_path / "t.jsonl").write_text("\n".join(lines) + end)
        assert read(tmp_path / "t.jsonl").column("n").to_pylist() == list(range(60))


@pytest.mark.parametrize(
    ("line", "problem"), [('{"n": "x"}', "n"), ('{"n": 1, "more": 2}', "more"), ("{}", "missing")]
)
def test_later_lines_never_widen_the_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, problem: str
) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 64)
    (tmp_path / "t.jsonl").write_text('{"n": 1}\n' * 100 + line + "\n")
    with pytest.raises(SchemaMismatch, match=problem):
        read(tmp_path / "t.jsonl")


def test_a_type_that_is_given_wins(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"n": 1}\n{"n": 2.5}\n')
    found = read(tmp_path / "t.jsonl", types={"n": "float32"})
    assert (found.schema.field("n").type, found.column("n").to_pylist()) == (pa.float32(), [1, 2.5])
    with pytest.raises(InvalidRequest, match="the columns are n"):
        read(tmp_path / "t.jsonl", types={"m": "float32"})


def lines_of(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "t.jsonl"


def test_whole_numbers_of_json_lines_stay_exact(tmp_path: Path) -> None:
    rows = [{"i": 1234567890123456789, "l": [2**63, 5]}, {"i": 2**64 - 1, "l": []}]
    found = read(lines_of(tmp_path, *rows))
    assert found.schema.types == [pa.uint64(), pa.list_(pa.uint64())]
    assert found.to_pylist() == rows
    rows = [{"d": {"x": 2**63}}, {"d": {"x": 1}}]
    assert read(lines_of(tmp_path, *rows)).to_pylist() == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, -1, 2**63], "t.jsonl, line 3, column 'i': no integer type holds 9223372036854775808"),
        ([1, 2**64], "t.jsonl, line 2, column 'i': no integer type holds 18446744073709551616"),
        ([0.5, 2**53 + 1], "t.jsonl, line 2, column 'i': float64, .* would round 9007199254740993"),
        ([{"a": [2**60, 0.5]}], "t.jsonl, line 1, column 'i.a': float64, .* would round"),
        ([0.5] * 100 + [2**53 + 1], "t.jsonl, line 101, column 'i': float64"),
        ([1] * 100 + [2**63], "t.jsonl, line 101: .*9223372036854775808"),
    ],
)
def test_no_number_of_json_lines_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], message: str
) -> None:
    path = lines_of(tmp_path, *({"i": value} for value in rows))
    monkeypatch.setattr(tables, "BLOCK_BYTES", 200)
    monkeypatch.setattr(tables, "RANGE_BYTES", 500)
    with pytest.raises(SchemaMismatch, match=message):
        read(path)
    if "column 'i':" in message:
        found = read(path, types={"i": "float64"}).column("i").to_pylist()
        assert found == [float(value) for value in rows]


def test_texts_of_json_lines_that_look_like_dates_stay_texts(tmp_path: Path) -> None:
    rows = [{"s": "2020-01-01", "l": ["2020-01-01T00:00:00Z"], "d": {"t": "2020-01-02 03:04:05"}}]
    assert read(lines_of(tmp_path, *rows)).to_pylist() == rows
    given = read(lines_of(tmp_path, {"s": "2020-01-01"}), types={"s": pa.timestamp("s")})
    assert given.schema.field("s").type == pa.timestamp("s")


def test_parquet_is_cut_between_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RANGE_BYTES", 1)
    table = pa.table({"x": range(1000)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    assert len(source_of(tmp_path / "t.parquet", None).pieces) == 10
    assert read(tmp_path / "t.parquet").column("x").to_pylist() == list(range(1000))


def test_what_datasets_saves(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number in range(2):
        rows = pa.table(
            {
                "label": [number, 2],
                "image": pa.array([{"bytes": b"a", "path": None}, {"bytes": b"b"}], image),
            }
        )
        with pa.ipc.new_stream(str(tmp_path / f"data-{number}.arrow"), rows.schema) as writer:
            writer.write_table(rows)
    state = {"_data_files": [{"filename": f"data-{number}.arrow"} for number in range(2)]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    features = {
        "label": {"names": ["no", "yes", "so"], "_type": "ClassLabel"},
        "image": {"_type": "Image"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": features}))
    found = read(tmp_path)
    assert found.column("label").to_pylist() == [0, 2, 1, 2]
    assert found.column("image").to_pylist() == [b"a", b"b"] * 2
    assert source_of(tmp_path, None).metadata == {"classes": {"label": ["no", "yes", "so"]}}


def test_splits_that_datasets_saves_are_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InvalidRequest, match="splits train, test"):
        source_of(tmp_path, None)


# -------------------------------------------------------------------------------------- arrays


def test_npy(tmp_path: Path) -> None:
    array = np.arange(5000 * 6, dtype=">i4").reshape(5000, 2, 3)
    np.save(tmp_path / "t.npy", array)
    found = read(tmp_path / "t.npy").column("data").combine_chunks()
    assert np.array_equal(found.to_numpy_ndarray(), array)


def test_zarr_group(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "t.zarr", mode="w")
    for name, shape in (("x", (1000, 3)), ("y", (1000,))):
        made = group.create_array(name, shape=shape, chunks=(64, *shape[1:]), dtype="f4")
        made[:] = np.arange(np.prod(shape)).reshape(shape)
    found = read(tmp_path / "t.zarr")
    assert found.column("y").to_pylist() == list(range(1000))
    x = found.column("x").combine_chunks().to_numpy_ndarray()
    assert np.array_equal(x, np.arange(3000).reshape(1000, 3))


# ---------------------------------------------------------------------------------- webdataset


@pytest.mark.parametrize(("name", "mode"), [("t.tar", "w"), ("t.tar.gz", "w:gz")])
def test_webdataset(tmp_path: Path, name: str, mode: str) -> None:
    members = []
    for number in range(300):
        key = f"a.b/{number:05d}"
        members += [
            (f"{key}.txt", f"text {number}".encode()),
            (f"{key}.cls", str(number % 10).encode()),
            (f"{key}.json", json.dumps({"n": number}).encode()),
            (f"{key}.x.npy", npy(np.full((2, 2), number, np.float32))),
            (f"{key}.seg.png", b"\x89PNG" + bytes([number % 256])),
        ]
        if number % 2:
            members.append((f"{key}.bin", bytes([number % 256])))
    write_tar(tmp_path / name, members, mode)
    found = read(tmp_path / name)
    assert found.column("key")[299].as_py() == "a.b/00299"
    assert found.column("cls").to_pylist() == [number % 10 for number in range(300)]
    assert found.column("json")[7].as_py() == {"n": 7}
    schema = source_of(tmp_path / name, None).schema(Options())
    assert (schema["seg.png"].text, schema["bin"].text) == ("image", "binary")
    assert found.column("seg.png")[3].as_py() == b"\x89PNG\x03"
    assert found.column("bin").to_pylist()[:4] == [None, b"\x01", None, b"\x03"]
    assert found.column("txt")[5].as_py() == "text 5"
    x = found.column("x.npy").combine_chunks().to_numpy_ndarray()
    assert np.array_equal(x[:, 1, 1], np.arange(300))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"x")], "sample a, column 'cls' is no whole number"),
        ([("a.cls", b"1"), ("b.txt", b"t")], "cannot be missing"),
        ([("a.txt", b"1"), ("a.txt", b"t")], "there twice"),
        ([("a.json", b"{")], "is no JSON"),
        ([("a.npy", npy(np.array([{}], object)))], "is no npy array"),
    ],
)
def test_webdataset_that_will_not_do(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(InvalidRequest, match=message):
        read(tmp_path / "t.tar")


def test_nested_values_keep_every_key_or_are_refused(tmp_path: Path) -> None:
    rows = [{"a": 1}] * 300 + [{"a": 1, "b": 2}]
    members = [(f"{n:05d}.json", json.dumps(row).encode()) for n, row in enumerate(rows)]
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(SchemaMismatch, match=r"sample 00300: column 'json': the key 'b' is new"):
        read(tmp_path / "t.tar")
    found = read(tmp_path / "t.tar", types={"json": "string"})
    assert json.loads(found.column("json")[300].as_py()) == {"a": 1, "b": 2}


# ------------------------------------------------------------------------------------- mds


MDS_COLUMNS: list[tuple[str, str, int | None]] = [
    ("dyn", "ndarray", None),
    ("fix", "ndarray:float32:2,3", 24),
    ("id", "int", 8),
    ("js", "json", None),
    ("pic", "pil", None),
    ("raw", "bytes", None),
    ("si", "str_int", None),
    ("text", "str", None),
    ("tok", "ndarray:int32", None),
    ("x", "float16", 2),
]


def mds_row(n: int) -> list[bytes]:
    tokens = np.arange(n % 5 + 1, dtype="<i4")
    return [
        bytes([17, 2 << 2 | 1]) + struct.pack("<2H2h", 1, 2, n, -n),
        np.full((2, 3), n, "<f4").tobytes(),
        struct.pack("<q", n),
        json.dumps({"n": [n]}).encode(),
        struct.pack("<3I", 2, 1, 3) + b"RGB" + bytes([n % 256]) * 6,
        b"r" * (n % 3),
        str(n).encode(),
        f"é{n}".encode(),
        bytes([1 << 2 | 0, len(tokens)]) + tokens.tobytes(),
        np.float16(n).tobytes(),
    ]


@pytest.mark.parametrize("compression", [None, "zstd:7", "gz", "br", "snappy"])
def test_mds(tmp_path: Path, compression: str | None) -> None:
    codecs = {
        "zstd:7": lambda data: pa.compress(data, codec="zstd", asbytes=True),
        "br": lambda data: pa.compress(data, codec="brotli", asbytes=True),
        "snappy": lambda data: pa.compress(data, codec="snappy", asbytes=True),
        "gz": gzip.compress,
    }
    rows = [mds_row(n) for n in range(100)]
    shards = [rows[:60], rows[60:]]
    write_mds(tmp_path / "m", MDS_COLUMNS, shards, compression, codecs.get(compression or ""))
    found = read(tmp_path / "m")
    assert found.column("id").to_pylist() == found.column("si").to_pylist() == list(range(100))
    assert found.column("text")[99].as_py() == "é99"
    assert found.column("js")[99].as_py() == {"n": [99]}
    assert found.column("tok")[98].as_py() == [0, 1, 2, 3]
    assert found.column("raw")[98].as_py() == b"rr"
    assert found.column("x")[98].as_py() == 98
    dyn = found.column("dyn").combine_chunks().to_numpy_ndarray()
    assert dyn.shape == (100, 1, 2)
    assert dyn[99].tolist() == [[99, -99]]
    assert found.column("pic").combine_chunks().to_numpy_ndarray()[7].tolist() == [[[7] * 3] * 2]
    assert (found.column("fix").combine_chunks().to_numpy_ndarray()[9] == 9).all()


def test_damaged_mds(tmp_path: Path) -> None:
    write_mds(tmp_path / "m", [("id", "int", 8)], [[[struct.pack("<q", 1)]]])
    shard = tmp_path / "m" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(IntegrityError, match="sha1 is not what the index says"):
        read(tmp_path / "m")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    write_mds(tmp_path / "m", [("p", "pkl", None)], [[[b"\x80\x04N."]]])
    with pytest.raises(InvalidRequest, match="needs pickle"):
        read(tmp_path / "m")
    found = read(tmp_path / "m", types={"p": "binary"})
    assert found.column("p").to_pylist() == [b"\x80\x04N."]


# ------------------------------------------------------------------------------------- litdata


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_litdata(tmp_path: Path, compression: str | None, order: str) -> None:
    formats = ["int", "str", "tensor", "no_header_numpy:2", "bool", "json"]
    spec = tree(id=LEAF, meta=tree(text=LEAF, t=LEAF), toks=LEAF, ok=LEAF, nest=LEAF)

    def item(n: int) -> list[bytes]:
        tensor = np.full((2, 2), n, "<i8")
        nested = bytes([5]) + struct.pack("<II1sBII1s", 1, 1, b"k", 1, 1, 1, b"v")
        return [
            struct.pack("<q", n),
            f"t{n}".encode(),
            struct.pack(f"{order}4I", 17, 2, 2, 2) + tensor.tobytes(),
            np.arange(n % 4 + 1, dtype="<i4").tobytes(),
            bytes([n % 2]),
            json.dumps({"k": ["v"]}).encode() if n % 2 else nested,
        ]

    chunks = [[item(n) for n in range(50)], [item(n) for n in range(50, 80)]]
    write_litdata(tmp_path / "l", formats, spec, chunks, compression=compression)
    found = read(tmp_path / "l")
    assert found.column_names == ["id", "meta.text", "meta.t", "toks", "ok", "nest"]
    assert found.column("id").to_pylist() == list(range(80))
    assert found.column("meta.text")[79].as_py() == "t79"
    assert (found.column("meta.t").combine_chunks().to_numpy_ndarray()[79] == 79).all()
    assert found.column("toks")[79].as_py() == [0, 1, 2, 3]
    assert found.column("ok").to_pylist()[:2] == [False, True]
    assert found.column("nest").to_pylist() == [{"k": ["v"]}] * 80


def test_litdata_tokens(tmp_path: Path) -> None:
    items = [[np.arange(n, n + n % 5 + 1, dtype="<i4").tobytes()] for n in range(100)]
    write_litdata(tmp_path / "l", ["no_header_tensor:16"], LEAF, [items], dim=300)
    found = read(tmp_path / "l").column("item")
    assert found[98].as_py() == [98, 99, 100, 101]


def test_litdata_rows_as_arrow(tmp_path: Path) -> None:
    write_litdata(tmp_path / "l", ["int"], tree(id=LEAF), [[]])
    rows = pa.table({"id": [1, 2, 3]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    body = sink.getvalue().to_pybytes()
    data = (
        struct.pack("<5I", 3, 20, 20, 20, 20) + body + struct.pack("<I", len(body)) + b"LDARW01\0"
    )
    (tmp_path / "l" / "chunk-0-0.bin").write_bytes(data)
    index = json.loads((tmp_path / "l" / "index.json").read_text())
    index["chunks"][0]["chunk_size"] = 3
    (tmp_path / "l" / "index.json").write_text(json.dumps(index))
    assert read(tmp_path / "l").column("id").to_pylist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encryption": {"algorithm": "fernet"}}, "is encrypted"),
        ({"compression_level": "sample"}, "compressed within its chunks"),
    ],
)
def test_litdata_that_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_litdata(tmp_path / "l", ["int"], None, [[[struct.pack("<q", 1)]]], **config)
    with pytest.raises(InvalidRequest, match=message):
        read(tmp_path / "l")


# --------------------------------------------------------------------------------- folders


def test_image_folder(tmp_path: Path) -> None:
    for label in ("dog", "cat"):
        for number in range(300):
            path = tmp_path / label / "deep" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{label}{number}".encode())
    found = read(tmp_path)
    assert found.num_rows == 600
    assert found.column("label").to_pylist() == [0] * 300 + [1] * 300
    assert found.column("path")[299].as_py() == "cat/deep/299.png"
    assert found.column("image")[300].as_py() == b"dog0"
    assert source_of(tmp_path, None).metadata == {"classes": ["cat", "dog"]}


def test_folder_and_pattern(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.jsonl").write_text(json.dumps({"n": number}))
    (tmp_path / ".hidden.jsonl").write_text("no JSON")
    (tmp_path / "README").write_text("no data")
    assert read(tmp_path).column("n").to_pylist() == list(range(12))
    assert read(f"{tmp_path}/1?.jsonl").column("n").to_pylist() == [10, 11]
    with pytest.raises(NotFound, match="no file matches"):
        read(f"{tmp_path}/x*.jsonl")
    (tmp_path / "t.csv").write_text("n\n1\n")
    with pytest.raises(InvalidRequest, match=r"several formats \(csv, jsonl\)"):
        read(tmp_path)
    assert read(tmp_path, "csv").column("n").to_pylist() == [1]


def test_tables_in_memory() -> None:
    table = pa.table({"n": range(5)})
    assert read(table).column("n").to_pylist() == list(range(5))
    assert read(iter([table, table])).column("n").to_pylist() == [*range(5), *range(5)]
    with pytest.raises(InvalidRequest, match="int cannot be imported"):
        read(3)


def test_digest_changes_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"n": 1}\n')
    first = source_of(tmp_path, None).digest("a")
    assert first == source_of(tmp_path, None).digest("a") != source_of(tmp_path, None).digest("b")
    (tmp_path / "t.jsonl").write_text('{"n": 12}\n')
    assert source_of(tmp_path, None).digest("a") != first
