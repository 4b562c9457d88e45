"""MDS shards and tar files as datasets without being copied: the same rows as imported."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forebay
from forebay.importers import in_place
from forebay.testing.foreign import npy, write_mds, write_tar
from forebay.testing.same import same
from forebay_wire.errors import InvalidRequest, SchemaMismatch

NUM_ROWS = 1000

COLUMNS = [("id", "int", 8), ("js", "json", None), ("raw", "bytes", None), ("tok", "ndarray", None)]


def mds_row(n: int) -> list[bytes]:
    tokens = np.arange(n % 5 + 1, dtype="<i4")
    return [
        struct.pack("<q", n),
        json.dumps({"n": [n]}).encode(),
        b"r" * (n % 30),
        bytes([33, 1 << 2 | 0, len(tokens)]) + tokens.tobytes(),
    ]


def members(n: int) -> list[tuple[str, bytes]]:
    key = f"{'deep/' * 30}{n:05d}" if n % 100 == 7 else f"{n:05d}"  # long names have heads of two
    found = [
        (f"{key}.cls", str(n).encode()),
        (f"{key}.json", json.dumps({"a": n, "b": [str(n)]}).encode()),
        (f"{key}.x.npy", npy(np.full((2, 3), n, np.float32))),
        (f"{key}.jpg", bytes([n % 256]) * (n % 700)),
    ]
    return [*found, (f"{key}.txt", b"text")] if n % 3 else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    rows = [mds_row(n) for n in range(NUM_ROWS)]
    write_mds(made / "mds", COLUMNS, [rows[:600], rows[600:]])
    for number in range(2):
        some = range(number * 500, number * 500 + 500)
        write_tar(made / f"{number}.tar", [one for n in some for one in members(n)])
    return made


both_ways = pytest.mark.parametrize("way", ["local", "remote"])


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "BATCH_BYTES", 20_000)


@both_ways
@pytest.mark.parametrize("what", [["mds"], ["0.tar", "1.tar"]])
def test_batches_are_those_of_an_import(
    client: forebay.Client, folder: Path, name: str, what: list[str]
) -> None:
    paths = [folder / one for one in what]
    placed = client.register_dataset(name, paths)
    imported = client.import_dataset(f"{name}-copy", paths)
    assert all(shard.origin is not None for shard in placed.manifest.shards)
    assert max(len(shard.batch_rows) for shard in placed.manifest.shards) >= 2
    assert placed.schema.arrow.equals(imported.schema.arrow, check_metadata=True)
    assert placed.table().equals(imported.table())
    options: dict[str, Any] = {"batch_size": 64, "shuffle": "none", "num_threads": 2}
    loaders = forebay.DataLoader(placed, **options), forebay.DataLoader(imported, **options)
    for one, other in zip(*loaders, strict=True):
        assert one.keys() == other.keys()
        assert all(same(one[key], other[key]) for key in one)
    rows = np.random.default_rng(0).permutation(NUM_ROWS)
    one, other = placed.take(rows), imported.take(rows)
    assert all(same(one[key], other[key]) for key in one)
    assert placed.verify().damaged == {}
    pinned = client.pin_origins(name)
    assert pinned.manifest.shards[0].origin is None
    assert pinned.table().equals(imported.table())


def test_appended(client: forebay.Client, folder: Path, name: str) -> None:
    client.register_dataset(name, [folder / "0.tar"])
    both = client.register_dataset(name, [folder / "1.tar"], append=True)
    assert (both.version, both.take(range(NUM_ROWS))["cls"].tolist()) == (2, list(range(NUM_ROWS)))


def test_what_does_not_fit_is_named_when_it_is_read(
    client: forebay.Client, folder: Path, name: str
) -> None:
    path, more = folder / f"{name}.tar", folder / f"{name}-more.tar"
    rows = [(f"{n:04d}.json", b'{"a": 1}') for n in range(100)]
    write_tar(path, rows)
    write_tar(more, [*rows, ("zz.json", b'{"b": 1}')])
    client.register_dataset(name, [path])
    dataset = client.register_dataset(name, [more], append=True)
    assert len(dataset.take(range(110))["json"]) == 110
    with pytest.raises(SchemaMismatch, match=r"sample zz: column 'json': the key 'b' is new"):
        dataset.table()


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        (b"nothing" * 100, "webdataset", "cannot be read in place"),
        (b"\x1f\x8b\x08nothing" * 100, None, "cannot be read in place"),
        (b"", "mds", "cannot be opened|there is no file"),
    ],
)
def test_files_that_will_not_do(
    client: forebay.Client, folder: Path, name: str, content: bytes, format: str, message: str
) -> None:
    path = folder / f"{name}.tar"
    path.write_bytes(content)
    with pytest.raises((InvalidRequest, forebay.NotFound), match=message):
        client.register_dataset(name, [path], format=format)


def test_compressed_shards_are_to_be_imported(
    client: forebay.Client, folder: Path, name: str
) -> None:
    import gzip

    write_mds(folder / name, [("id", "int", 8)], [[[bytes(8)]]], "gz", gzip.compress)
    with pytest.raises(InvalidRequest, match="is compressed"):
        client.register_dataset(name, [folder / name])


def test_files_without_the_columns_of_the_dataset_are_not_appended(
    client: forebay.Client, folder: Path, name: str
) -> None:
    """Whoever registered them would have a version that nobody can read."""
    client.register_dataset(name, [folder / "0.tar"])
    client.dataset(name).add_columns(lambda rows: {"n": rows["cls"]}, columns=["cls"])
    with pytest.raises(SchemaMismatch, match="has no 'n', which the dataset has"):
        client.register_dataset(name, [folder / "1.tar"], append=True)
    client.drop_columns(name, ["n", "cls"])
    with pytest.raises(SchemaMismatch, match="column 'cls' is int64, and the dataset has no such"):
        client.register_dataset(name, [folder / "1.tar"], append=True)
    client.register_dataset(f"{name}-mds", [folder / "mds"])
    client.drop_columns(f"{name}-mds", ["raw"])
    with pytest.raises(SchemaMismatch, match="column 'raw' is binary"):
        client.register_dataset(f"{name}-mds", [folder / "mds"], append=True)
    assert client.dataset(name).verify().damaged == {}
