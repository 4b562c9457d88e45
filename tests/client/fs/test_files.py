"""Reading: files behave as any binary file does, whatever way the bytes come."""

import hashlib
import io
import pickle
import random
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem

import forebay
from forebay.checkpoint.service import CheckpointService, PackTerms
from forebay.checkpoint.snapshot import Part, build_pack
from forebay.checkpoint.upload import PackUpload
from forebay.fs import ForebayFileSystem
from forebay.testing.forks import in_fork
from forebay.testing.workers import read_file
from forebay.waiting import Deadline
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import GenerationId

from .conftest import ROWS

SHARD = "datasets/flowers/1/shard-00001.arrow"
WEIGHT = "checkpoints/cnn/1/1/state/model/layer/weight"


def again(thing: Any) -> Any:
    """*thing* after a journey to another process."""
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - our own


@pytest.fixture
def content(fs: ForebayFileSystem, client: forebay.Client) -> bytes:
    """Of the shard, read without the file system."""
    [blob] = client.transfer.open([fs.ukey(SHARD)])
    with blob:
        return bytes(blob.map())


def test_a_file_reads_like_a_local_one(
    fs: ForebayFileSystem, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "same").write_bytes(content)
    rng = random.Random(1)
    with fs.open(SHARD) as ours, (tmp_path / "same").open("rb") as local:
        assert (ours.readable(), ours.seekable(), ours.writable()) == (True, True, False)
        assert ours.size == len(content)
        for _ in range(300):
            size = rng.choice([0, 1, 9, 4096, 70_000, len(content), -1])
            where = rng.randrange(len(content) + 100)
            step = rng.choice(["read", "readinto", "set", "from here", "from end", "readline"])
            if step == "read":
                assert ours.read(size) == local.read(size)
            elif step == "readinto":
                mine, theirs = bytearray(abs(size)), bytearray(abs(size))
                assert ours.readinto(mine) == local.readinto(theirs)
                assert mine == theirs
            elif step == "readline":
                assert ours.readline() == local.readline()
            elif step == "set":
                assert ours.seek(where) == local.seek(where)
            elif step == "from here":
                assert ours.seek(-ours.tell() // 2, 1) == local.seek(-local.tell() // 2, 1)
            else:
                assert ours.seek(-len(content) // 3, 2) == local.seek(-len(content) // 3, 2)
            assert ours.tell() == local.tell()


def test_what_a_file_refuses(fs: ForebayFileSystem) -> None:
    with fs.open(SHARD) as file:
        with pytest.raises(ValueError, match="before the file"):
            file.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 3)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    for use in (file.read, file.tell, lambda: file.seek(0), lambda: file.map(), file.__enter__):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (5, 9), (-7, None), (None, -7), (-9, -3), (9, 5), (10**9, None), (0, 10**9)],
)
def test_ranges_are_counted_as_slices(
    fs: ForebayFileSystem, content: bytes, start: int | None, end: int | None
) -> None:
    assert fs.cat_file(SHARD, start, end) == content[start:end]
    assert fs.cat_ranges([SHARD, SHARD], start, [end, None]) == [
        content[start:end],
        content[start:],
    ]


def test_ranges_of_many_files_open_each_once(
    fs: ForebayFileSystem, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_found = ForebayFileSystem._open_found
    monkeypatch.setattr(
        ForebayFileSystem,
        "_open_found",
        lambda self, found: opened.append(found.path) or open_found(self, found),
    )
    starts = list(range(0, 4000, 100))
    missing = "datasets/flowers/9/manifest.json"
    found = fs.cat_ranges([*[SHARD] * 40, missing], [*starts, 0], [*(s + 50 for s in starts), 1])
    assert found[:-1] == [content[start : start + 50] for start in starts]
    assert isinstance(found[-1], FileNotFoundError)
    assert opened == [SHARD]
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([missing], 0, 1, on_error="raise")


def test_get_copies_a_version(fs: ForebayFileSystem, tmp_path: Path) -> None:
    fs.get("datasets/flowers/1", str(tmp_path / "copy"), recursive=True)
    copied = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert copied == [name.rpartition("/")[2] for name in fs.find("datasets/flowers/1")]
    for name in copied:
        assert (tmp_path / "copy" / name).read_bytes() == fs.cat_file(f"datasets/flowers/1/{name}")
    out = io.BytesIO()
    fs.get_file(WEIGHT, out)
    assert out.getvalue() == fs.cat_file(WEIGHT)


def is_mapped_from(folder: Path, address: int) -> bool:
    """Whether this process has a file of *folder* mapped at *address*."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, stop = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= address < stop:
            return str(folder) in line
    return False


def test_bytes_on_this_host_are_mapped_and_not_copied(
    fs: ForebayFileSystem, content: bytes, way: str, daemon: DaemonProcess
) -> None:
    with fs.open(SHARD) as file:
        whole, part = file.map(), file.map(100, 200)
        file.seek(100)
        buffer = pa.py_buffer(file.read_buffer(100))
        assert file.tell() == 200
    assert (whole, part, buffer.to_pybytes()) == (content, content[100:200], content[100:200])
    assert whole.readonly
    start = np.frombuffer(whole, np.uint8).ctypes.data
    assert is_mapped_from(daemon.data, start) == (way == "local")
    if way == "local":
        assert buffer.address == start + 100


def test_short_reads_over_http_fetch_each_segment_once(
    address: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    asked = []
    from forebay.transfer.remote import RemoteBlob

    read_into = RemoteBlob._read_into
    monkeypatch.setattr(
        RemoteBlob,
        "_read_into",
        lambda self, offset, target: asked.append(offset) or read_into(self, offset, target),
    )
    with ForebayFileSystem(address).open(SHARD) as file:
        assert b"".join(iter(lambda: file.read(1000), b"")) == content
        num_segments = next(iter(file._source._blobs.values())).table.num_segments
    assert num_segments > 2
    assert len(asked) <= 2 * num_segments + 1  # a read across a border takes both


def test_text_and_compression_come_from_fsspec(fs: ForebayFileSystem) -> None:
    with fs.open("datasets/flowers/1/manifest.json", "r", encoding="utf-8") as file:
        assert '"dataset":"flowers"' in file.read()
    assert fs.read_text("datasets/flowers/1/manifest.json").startswith("{")
    assert fs.head(SHARD, 6) == b"ARROW1"
    assert fs.tail(SHARD, 6) == b"ARROW1"


# Tensors that several ranks hold.


def save_parts(client: forebay.Client, run: str, *ranks: list[Part]) -> None:
    """A generation of one rank for each of *ranks*, which holds these parts."""
    service = CheckpointService(client, run)
    generation = GenerationId(run, service.begin_attempt(None, len(ranks)), 1)
    names = {part.name for parts in ranks for part in parts}
    for rank, parts in enumerate(ranks):
        structure = {name: ("model", name) for name in sorted(names)} if rank == 0 else {}
        terms = PackTerms(generation, rank, len(ranks))
        upload = PackUpload(service, terms, build_pack(parts, {}, structure))
        upload.copy(Deadline(60))
        upload.seal()
    service.wait(generation, "local", 60)


def test_parts_of_several_ranks_make_one_file(
    fs: ForebayFileSystem, client: forebay.Client, way: str
) -> None:
    whole = torch.arange(6 * 40 * 5, dtype=torch.float64).reshape(6, 40, 5)
    run = f"ranks-{way}"
    cuts = {"rows": 0, "columns": 1, "deep": 2}
    ranks: list[list[Part]] = [[], []]
    for name, dimension in cuts.items():
        first = whole.shape[dimension] // 3
        for rank, (start, stop) in enumerate([(0, first), (first, whole.shape[dimension])]):
            part = whole.narrow(dimension, start, stop - start).contiguous()
            offsets = [0, 0, 0]
            offsets[dimension] = start
            ranks[rank].append(Part(name, tuple(whole.shape), tuple(offsets), part))
    save_parts(client, run, *reversed(ranks))
    for name in cuts:
        path = f"checkpoints/{run}/latest/state/model/{name}"
        found = np.frombuffer(fs.cat_file(path)).reshape(whole.shape)
        assert fs.size(path) == found.nbytes
        assert np.array_equal(found, whole.numpy())
        with fs.open(path) as file:
            assert again(file).read() == found.tobytes()


def test_what_is_not_committed_is_not_there(
    fs: ForebayFileSystem, client: forebay.Client, way: str
) -> None:
    service = CheckpointService(client, f"open-{way}")
    generation = GenerationId(service.run, service.begin_attempt(None, 2), 1)
    part = Part("t", (1,), (0,), torch.zeros(1))
    upload = PackUpload(service, PackTerms(generation, 0, 2), build_pack([part], {}, {}))
    upload.copy(Deadline(60))
    upload.seal()  # the other rank's is missing
    assert service.look(generation).state == "open"
    assert fs.ls(f"checkpoints/{service.run}") == []
    assert not fs.exists(f"checkpoints/{service.run}/1")
    assert not fs.exists(f"checkpoints/{service.run}/1/1")
    assert not fs.exists(f"checkpoints/{service.run}/latest")


# Other libraries.


def test_arrow_reads_shards_through_the_handler(fs: ForebayFileSystem, way: str) -> None:
    arrow = PyFileSystem(FSSpecHandler(fs))
    before = pa.total_allocated_bytes()
    with arrow.open_input_file(SHARD) as file:
        table = pa.ipc.open_file(file).read_all()
    if way == "local":
        assert pa.total_allocated_bytes() - before < table.nbytes / 4  # it lies in the mapping
    assert table.column("id").to_pylist()[0] > 0
    found = pads.dataset(
        "datasets/flowers/1", filesystem=arrow, format="ipc", exclude_invalid_files=True
    )
    assert sorted(found.to_table(columns=["id"])["id"].to_pylist()) == list(range(ROWS))


def test_pandas_and_open_files(address: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_ADDRESS", address)
    url = "forebay://datasets/flowers/latest/shard-00000.arrow"
    assert pd.read_feather(url, columns=["id"])["id"].tolist()[:3] == [0, 1, 2]
    with pytest.raises(forebay.DaemonUnavailable):
        pd.read_feather(url, storage_options={"address": "unix:/nowhere/rpc.sock", "timeout": 0.1})
    files = fsspec.open_files("forebay://datasets/flowers/latest/*.arrow")
    assert {one.path.split("/")[2] for one in files} == {"2"}
    num_rows = 0
    for opened in again(files):
        with opened as file:
            num_rows += pa.ipc.open_file(file).read_all().num_rows
    assert num_rows == 2 * ROWS


# Addresses.


def test_the_entry_point_is_registered(address: str) -> None:
    code = (
        "import sys, fsspec; fs = fsspec.filesystem('forebay', address=sys.argv[1]);"
        "assert fs.exists('datasets/flowers'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, address], check=True, timeout=60)


def test_forms_of_the_address(
    daemon: DaemonProcess, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(daemon.data.parent)
    folder = ForebayFileSystem(daemon.data.name)
    monkeypatch.chdir("/")
    for fs in (folder, again(folder), ForebayFileSystem(address)):
        assert fs.exists("datasets/flowers")
    assert folder == ForebayFileSystem(daemon.data) != ForebayFileSystem(address)
    assert len({folder, ForebayFileSystem(daemon.data)}) == 1
    monkeypatch.setenv("FOREBAY_DATA", str(daemon.data))
    assert fsspec.filesystem("forebay") != ForebayFileSystem(address)
    monkeypatch.setenv("FOREBAY_ADDRESS", address)
    assert fsspec.filesystem("forebay") == ForebayFileSystem(address)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("forebay://127.0.0.1:7070/datasets/x/1", "grpc://127.0.0.1:7070"),
        ("forebay://localhost:7070/datasets/x/1", "grpc://localhost:7070"),
        ("forebay://store.example:7070/datasets/x/1", "grpcs://store.example:7070"),
    ],
)
def test_a_host_in_the_url(url: str, address: str) -> None:
    fs, path = fsspec.core.url_to_fs(url, token="t")
    assert str(fs.address) == address
    assert path == "datasets/x/1"


def test_file_systems_share_a_connection_and_let_it_go(daemon: DaemonProcess) -> None:
    first, second = ForebayFileSystem(daemon.data), ForebayFileSystem(daemon.data)
    assert first.client is second.client
    shared = weakref.ref(first.client)
    del first
    assert second.exists("datasets")
    del second
    assert shared() is None


# Processes and threads.


def test_spawned_process_gets_file_system_and_open_file(
    fs: ForebayFileSystem, content: bytes
) -> None:
    with fs.open(SHARD) as file:
        arguments = (fs, file, hashlib.sha256(content).hexdigest())
        child = get_context("spawn").Process(target=read_file, args=arguments)
        child.start()
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:this process was forked:RuntimeWarning")
def test_forked_process_reads_what_it_inherits(fs: ForebayFileSystem, content: bytes) -> None:
    with fs.open(SHARD) as file, fs.open(SHARD) as unread:
        file.read(10)

        def work() -> None:
            assert file.read() == content[10:]
            assert unread.read() == content
            assert fs.cat_file(SHARD) == content
            assert ForebayFileSystem(fs.address).exists(SHARD)

        assert in_fork(work) == 0
        assert file.read(10) == content[10:20]


def test_many_threads(fs: ForebayFileSystem, content: bytes) -> None:
    def work(number: int) -> bool:
        start = number * 1009 % len(content)
        with fs.open(SHARD) as file:
            file.seek(start)
            same = file.read(5000) == content[start : start + 5000]
        [part] = fs.cat_ranges([SHARD], start, start + 100)
        return same and part == content[start : start + 100] and len(fs.ls("datasets/flowers")) == 2

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(100)))
