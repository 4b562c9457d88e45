"""Codecs that run what a chunk holds are refused by their names, before a chunk is decoded."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numcodecs.pickles
import pytest
from zarr.core.buffer import cpu

import forebay
from forebay.importers.arrays import open_zarr, zarr_pieces
from forebay.importers.in_place import place_zarr
from forebay.zarr import ForebayStore, samples
from forebay.zarr_codecs import check_codecs
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import new_random_name

NUMBERS = {"zarr_format": 2, "shape": [4], "chunks": [4], "order": "C", "fill_value": 0}
ARRAYS: dict[str, dict[str, Any]] = {
    "filter": {"dtype": "<f4", "filters": [{"id": "pickle", "protocol": 4}], "compressor": None},
    "compressor": {"dtype": "<f4", "filters": None, "compressor": {"id": "pickle"}},
    "text": {
        "dtype": "|O",
        "fill_value": None,
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}],
        "compressor": None,
    },
}


class Runs:
    """Pickled, what leaves a trace when somebody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """numcodecs as it was before 0.16.6."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)


@pytest.fixture(params=list(ARRAYS))
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, bytes]:
    return {
        ".zgroup": b'{"zarr_format": 2}',
        "a/.zarray": json.dumps({**NUMBERS, **ARRAYS[request.param]}).encode(),
        "a/0": pickle.dumps(Runs(tmp_path / "trace")),
    }


@pytest.fixture
def folder(keys: dict[str, bytes], tmp_path: Path) -> Path:
    for key, value in keys.items():
        path = tmp_path / "store.zarr" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    return tmp_path / "store.zarr"


def test_the_loader_unpickles_nothing(
    keys: dict[str, bytes], daemon: DaemonProcess, tmp_path: Path
) -> None:
    store = ForebayStore(
        f"zarr-{new_random_name()}",
        address=str(daemon.address()["rpc"]),
        session=tmp_path / "session",
    )
    for key, value in keys.items():
        store.set_sync(key, cpu.Buffer.from_bytes(value))
    store.commit()
    with pytest.raises(forebay.InvalidRequest, match=r"array 'a' of .* the codec 'pickle'.*again"):
        samples(store, ["a"])[0]
    assert not (tmp_path / "trace").exists()


def test_importing_unpickles_nothing(folder: Path) -> None:
    for path, named in ((folder, "array 'a' of"), (folder / "a", "array '' of")):
        with pytest.raises(forebay.InvalidRequest, match=named):
            open_zarr(str(path))
        with pytest.raises(forebay.InvalidRequest, match=named):
            zarr_pieces(str(path), "")
    assert not (folder.parent / "trace").exists()


def test_nothing_that_takes_unpickling_is_registered(folder: Path) -> None:
    with pytest.raises(forebay.InvalidRequest, match=r"array 'a' of .* the codec 'pickle'"):
        place_zarr(str(folder))


@pytest.mark.parametrize(
    "described",
    [
        {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
        {"codecs": [{"name": "https://codec.zarr.dev/numcodecs/pickle"}]},
        {"codecs": ["pickle"]},
        {"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": ["pickle"]}}]},
        {"codecs": [{"name": "x", "configuration": {"index_codecs": [{"name": "pickle"}]}}]},
        {"metadata": {"deep/.zarray": {"filters": [{"id": "pickle"}]}}},
        {"consolidated_metadata": {"metadata": {"deep": {"codecs": [{"name": "pickle"}]}}}},
    ],
)
def test_wherever_they_are_named(described: dict[str, Any]) -> None:
    with pytest.raises(forebay.InvalidRequest, match="pickle"):
        check_codecs(described, "array 'x'")


@pytest.mark.parametrize(
    "described",
    [
        {"filters": [{"id": "vlen-utf8"}], "compressor": {"id": "zstd", "level": 0}},
        {"filters": None, "compressor": None, "attributes": {"codecs": "pickle"}},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
        {"metadata": []},
        [],
    ],
)
def test_what_runs_no_code_is_let_through(described: Any) -> None:
    check_codecs(described, "array 'x'")
