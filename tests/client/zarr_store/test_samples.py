"""Samples of zarr arrays through the loader: exact, the same on any ranks, decoded once each."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.core.buffer import cpu

import forebay
from forebay.dataset import bands, cache
from forebay.dataset.cache import shard_cache
from forebay.dataset.reading import OrderOptions, PlanParameters
from forebay.dataset.schema import Array, Schema
from forebay.transfer import make_transfer
from forebay.zarr import ForebayStore, samples
from forebay.zarr_reading import ZarrCourse, ZarrReading, block_parameters, unit_rows
from forebay.zarr_samples import SampleArray, Samples
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import new_random_name

NUM = 700

IMAGES = np.arange(NUM * 24, dtype="f4").reshape(NUM, 4, 6)
LABELS = np.where(np.arange(NUM) < 400, np.arange(NUM), -7)
TEXTS = np.array([f"text {n}" for n in range(NUM)])


@pytest.fixture(scope="module")
def store(daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory) -> ForebayStore:
    """Of arrays with chunks of different lengths, in shards of zarr, never written, of text, …"""
    store = ForebayStore(
        f"zarr-{new_random_name()}",
        address=str(daemon.address()["rpc"]),
        session=tmp_path_factory.mktemp("session"),
    )
    root = zarr.create_group(store)
    image = root.create_array(
        "image", shape=IMAGES.shape, chunks=(20, 2, 6), shards=(60, 4, 6), dtype="f4"
    )
    image[:] = IMAGES
    label = root.create_array("label", shape=(NUM,), chunks=(30,), dtype="i8", fill_value=-7)
    label[:400] = LABELS[:400]
    root.create_array("text", shape=(NUM,), chunks=(64,), dtype="str")[:] = TEXTS
    big = root.create_array("deep/big-endian", shape=(NUM, 3), chunks=(50, 2), dtype=">u2")
    big[:] = np.arange(NUM * 3).reshape(NUM, 3)
    root.create_array("short", shape=(NUM - 1,), chunks=(50,), dtype="i4")
    root.create_array("deep/empty", shape=(4, 0), dtype="i4", chunks=(4, 1))
    root.create_array("scalar", shape=(), dtype="i4")
    store.commit()
    return store


@pytest.fixture(autouse=True)
def nothing_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "_bands", bands.Bands())


@pytest.fixture
def three(store: ForebayStore, way: str) -> Samples:
    return samples(store, ["image", "label", "text"])


@pytest.fixture
def both(store: ForebayStore) -> Samples:
    return samples(store, ["image", "label"])


def ids_of(loader: Any) -> list[list[int]]:
    return [batch["_ids"].tolist() for batch in loader]


def check(batch: dict[str, Any], name: str = "image") -> list[int]:
    ids = batch["_ids"].numpy()
    assert torch.equal(batch[name], torch.from_numpy(IMAGES[ids]))
    return list(ids)


# What is read.


@pytest.mark.parametrize("shuffle", ["none", "full", "block"])
def test_each_sample_is_read_once_as_it_was_written(three: Samples, shuffle: str) -> None:
    loader = forebay.DataLoader(three, global_batch_size=64, shuffle=shuffle, include_ids=True)
    seen: list[int] = []
    with loader:
        for batch in loader:
            ids = check(batch)
            assert batch["label"].tolist() == LABELS[ids].tolist(), "with the fill value"
            assert batch["text"] == TEXTS[ids].tolist()
            seen += ids
        report = loader.report()
    assert sorted(seen) == list(range(NUM))
    assert (seen == list(range(NUM))) == (shuffle == "none")
    assert report.plan_problem == ""
    assert report.reading["decode"] > 0


def test_columns_are_called_as_one_likes(store: ForebayStore) -> None:
    with forebay.connect(store.address) as client:
        dataset = client.dataset(store.name, version=1)
    found = samples(dataset, {"x": "/deep/big-endian", "y": "label"})
    assert len(found) == NUM
    assert [one.text for one in found.columns()] == ["uint16 array of shape (3,)", "int64"]
    assert found[-1]["x"].tolist() == [2097, 2098, 2099]
    assert found.__getitems__([3, 1])[1]["y"] == 1
    assert list(found.read(np.array([5, 5]), ["y"])) == ["y"]
    with pytest.raises(IndexError):
        found[NUM]


def test_a_store_that_is_one_array_and_one_of_the_second_format(
    store: ForebayStore, tmp_path: Path
) -> None:
    for format in (2, 3):
        one = ForebayStore(
            f"zarr-{new_random_name()}", address=store.address, session=tmp_path / str(format)
        )
        array = zarr.create_array(
            one, shape=(100, 3), chunks=(30, 3), dtype="bool", zarr_format=format
        )
        array[10:] = True
        with pytest.raises(forebay.InvalidRequest, match="not committed"):
            samples(one)
        one.commit()
        found = samples(one).read(np.arange(100))
        assert list(found) == ["data"]
        assert (found["data"] == (np.arange(100) >= 10)[:, None]).all()
        array[0] = True
        with pytest.raises(forebay.InvalidRequest, match="not committed"):
            samples(one)


def test_what_cannot_be_samples_is_named(store: ForebayStore) -> None:
    with pytest.raises(forebay.InvalidRequest, match=r"'label' has 700, 'short' has 699"):
        samples(store, ["label", "short"])
    with pytest.raises(forebay.InvalidRequest, match="no array 'none': it has 'deep/big-endian'"):
        samples(store, ["label", "none"])
    with pytest.raises(forebay.InvalidRequest, match=r"'scalar' of zarr-.* has the shape"):
        samples(store)
    with pytest.raises(forebay.InvalidRequest, match=r"'deep/empty' of zarr-.* \(4, 0\), so no"):
        samples(store, ["deep/empty"])
    with pytest.raises(forebay.InvalidRequest, match="give a list of paths"):
        samples(store, "label")
    with pytest.raises(forebay.InvalidRequest, match="no column 'other'"):
        forebay.DataLoader(samples(store, ["label"]), batch_size=4, columns=["other"])


def test_pickles_are_never_read(store: ForebayStore, tmp_path: Path) -> None:
    one = ForebayStore(
        f"zarr-{new_random_name()}", address=store.address, session=tmp_path / "session"
    )
    described = (
        b'{"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "|O", "compressor": null, '
        b'"fill_value": null, "order": "C", "filters": [{"id": "pickle", "protocol": 5}]}'
    )
    one.set_sync(".zarray", cpu.Buffer.from_bytes(described))
    one.commit()
    with pytest.raises(forebay.InvalidRequest, match="pickle"):
        samples(one)


# The order.


def test_blocks_are_whole_chunks(both: Samples) -> None:
    order: dict[str, Any] = {"shuffle": "block", "window_blocks": 1, "block_rows": 60}
    with forebay.DataLoader(both, batch_size=60, **order) as loader:
        state = loader.state_dict()
        assert (state["block_rows"], state["window_blocks"]) == (60, 1)
    with forebay.DataLoader(both, batch_size=60, include_ids=True, **order) as loader:
        blocks = [{row // 60 for row in ids} for ids in ids_of(loader)]
    assert max(map(len, blocks)) <= 2, "the short one shifts those after it"
    with pytest.raises(forebay.InvalidRequest, match="give a multiple of 60"):
        forebay.DataLoader(both, batch_size=60, shuffle="block", block_rows=90)
    with pytest.raises(forebay.InvalidRequest, match='belong to shuffle="block"'):
        forebay.DataLoader(both, batch_size=60, shuffle="full", block_rows=60)


def array_of(band_rows: int, row_bytes: int) -> SampleArray:
    column = Schema.of({"x": Array("uint8", (row_bytes,))})["x"]
    return SampleArray("x", column, 10**6, band_rows, band_rows, (1,), 0)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 1 << 22)), min_size=1, max_size=4))
def test_blocks_of_any_arrays(given: list[tuple[int, int]]) -> None:
    arrays = [array_of(*one) for one in given]
    found = block_parameters(arrays, OrderOptions("block"))
    unit = unit_rows([one.band_rows for one in arrays])
    ends = [found.block_rows % one.band_rows for one in arrays]
    assert found.block_rows % unit == 0
    assert ends.count(0) == len(ends) or max(given)[0] == unit
    assert 2 <= found.window_blocks <= 16
    row_bytes = sum(size for _, size in given)
    assert found.block_rows == unit or found.block_rows * row_bytes <= 16 << 20


def test_each_chunk_is_decoded_once_however_little_is_kept(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Windows of 4 MB, of 32 MB in all; 8 MB may be kept."""
    one = ForebayStore(
        f"zarr-{new_random_name()}", address=store.address, session=tmp_path / "session"
    )
    shape = (512, 64, 1024)
    array = zarr.create_array(one, name="x", shape=shape, chunks=(8, 64, 1024), dtype="u1")
    array[::8, 0, 0] = 1  # all of the chunks are written
    one.commit()
    names: Counter[str] = Counter()
    real = ZstdCodec._decode_sync

    def counted(*given: Any) -> Any:
        names[threading.current_thread().name.partition("_")[0]] += 1
        return real(*given)

    monkeypatch.setattr(ZstdCodec, "_decode_sync", counted)
    with forebay.DataLoader(
        samples(one),
        batch_size=16,
        shuffle="block",
        block_rows=16,
        window_blocks=4,
        memory_budget=16 << 20,
        num_threads=2,
    ) as loader:
        for batch in loader:
            assert 0 <= int(batch["x"].sum()) <= 16
            assert bands.process_bands().held_bytes <= 8 << 20
    assert names == {"forebay-load": 64}, "in the loader's own threads"


def test_of_long_texts_no_more_is_held_than_was_given(
    store: ForebayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ForebayStore(
        f"zarr-{new_random_name()}", address=store.address, session=tmp_path / "session"
    )
    texts = np.array([chr(97 + n % 26) * 20_000 for n in range(1000)], dtype=object)
    array = zarr.create_array(one, name="x", shape=(1000,), chunks=(25,), dtype="str")
    array[:] = texts  # 20 MB, of which a few kilobytes are stored
    one.commit()
    monkeypatch.setattr(cache, "_fetched_bytes", 4 << 20)
    found = samples(one)
    rows = np.arange(0, 1000, 25)
    tracemalloc.start()
    try:
        read = found.read(rows)["x"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == texts[rows].tolist()
    assert peak < 8 << 20
    assert 1 << 20 < bands.process_bands().held_bytes <= 4 << 20


def test_over_http_what_came_and_what_was_decoded_share_the_budget(
    store: ForebayStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    one = ForebayStore(
        f"zarr-{new_random_name()}", address=store.address, session=tmp_path / "session"
    )
    given = np.random.default_rng(0).integers(0, 256, (256, 64, 1024), "u1")
    zarr.create_array(one, name="x", data=given, chunks=(4, 64, 1024))
    one.commit()
    found = samples(one)
    cache = shard_cache(found.endpoint)
    most = [0, 0]
    with forebay.DataLoader(
        found, batch_size=16, shuffle="full", include_ids=True, memory_budget=16 << 20
    ) as loader:
        for batch in loader:
            assert (batch["x"].numpy() == given[batch["_ids"].numpy()]).all()
            held = bands.process_bands().held_bytes, cache.held_bytes
            most = [max(*both) for both in zip(most, held, strict=True)]
    assert all(1 << 20 <= num_bytes <= 4 << 20 for num_bytes in most), most


def global_batches(
    given: Samples, num_ranks: int, batch: int, states: list[dict[str, Any]] | None, steps: int
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """What all ranks read together in *steps* steps, each batch sorted, and where they stand."""
    parts: list[list[list[int]]] = []
    after = []
    for rank in range(num_ranks):
        with forebay.DataLoader(
            given,
            global_batch_size=batch,
            shuffle="block",
            seed=5,
            block_rows=60,
            window_blocks=3,
            lanes=2,
            include_ids=True,
            rank=rank,
            world_size=num_ranks,
            num_threads=1,
        ) as loader:
            if states is not None:
                loader.load_state_dict(states[0])
            read = [check(one) for one in itertools.islice(loader, steps)]
            parts.append(read)
            after.append(loader.state_dict())
    assert len({len(part) for part in parts}) == 1
    assert all(one == after[0] for one in after)
    return [sorted(itertools.chain(*rows)) for rows in zip(*parts, strict=True)], after


def test_the_same_global_batches_on_any_ranks_interrupted_and_resumed(both: Samples) -> None:
    whole, _ = global_batches(both, 1, 48, None, 99)
    assert sorted(itertools.chain(*whole)) == list(range(NUM))
    for num_ranks in (2, 4):
        assert global_batches(both, num_ranks, 48, None, 99)[0] == whole
    first, states = global_batches(both, 4, 48, None, 5)
    second, states = global_batches(both, 2, 96, states, 2)
    third, _ = global_batches(both, 1, 48, states, 99)
    assert first + third == whole[:5] + whole[9:]
    assert second == [sorted(whole[5] + whole[6]), sorted(whole[7] + whole[8])]


def test_a_state_of_other_samples_is_refused(both: Samples, store: ForebayStore) -> None:
    short = samples(store, ["short"])
    with (
        forebay.DataLoader(both, batch_size=7) as loader,
        forebay.DataLoader(short, batch_size=7) as other,
        forebay.DataLoader(samples(store, ["label"]), batch_size=9) as same,
    ):
        next(iter(loader))
        with pytest.raises(forebay.InvalidRequest, match="stands at sample 7 of 700, and these"):
            other.load_state_dict(loader.state_dict())
        same.load_state_dict(loader.state_dict())
        assert next(iter(same))["label"].tolist() == list(range(7, 16))


@pytest.fixture(scope="module")
def unlike(store: ForebayStore, tmp_path_factory: pytest.TempPathFactory) -> ForebayStore:
    """A store of two arrays that would be dealt in different blocks: of 10 samples, and of 15."""
    one = ForebayStore(
        f"zarr-{new_random_name()}",
        address=store.address,
        session=tmp_path_factory.mktemp("session"),
    )
    zarr.create_array(one, name="x", shape=(600,), chunks=(10,), dtype="i4")[:] = np.arange(600)
    zarr.create_array(one, name="big", shape=(600, 2**18), chunks=(15, 2**18), dtype="u1")
    one.commit()
    return one


SETS = [(["x"], ["x", "big"]), (["x", "big"], ["x"])]


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize(("before", "after"), SETS)
def test_a_state_goes_on_with_other_arrays(
    unlike: ForebayStore, before: list[str], after: list[str], shuffle: Any
) -> None:
    def make(arrays: list[str], block_rows: int | None = None) -> forebay.DataLoader:
        return forebay.DataLoader(
            samples(unlike, arrays),
            global_batch_size=30,
            shuffle=shuffle,
            block_rows=block_rows,
            include_ids=True,
        )

    with make(before) as loader:
        whole = ids_of(loader)
    with make(before) as loader:
        assert [batch["_ids"].tolist() for batch in itertools.islice(loader, 3)] == whole[:3]
        state = loader.state_dict()
    with make(after) as loader:
        own = loader.state_dict()
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert ids_of(loader) == whole[3:]
    if shuffle == "block":
        blocks = ("window_blocks", "block_rows")
        assert [own[name] for name in blocks] != [state[name] for name in blocks]
        with (
            make(after, block_rows=30) as chosen,
            pytest.raises(forebay.InvalidRequest, match="block"),
        ):
            chosen.load_state_dict(state)


def test_workers_that_live_on_take_the_blocks_of_a_state(unlike: ForebayStore) -> None:
    def make(arrays: list[str]) -> forebay.StreamingDataset:
        return forebay.StreamingDataset(
            samples(unlike, arrays),
            global_batch_size=30,
            shuffle="block",
            include_ids=True,
            rank=0,
            world_size=1,
        )

    before = make(["x", "big"])
    whole = [batch["_ids"].tolist() for batch in before]
    given = make(["x"])
    loader = torch.utils.data.DataLoader(
        given, batch_size=None, num_workers=1, persistent_workers=True
    )
    assert ids_of(loader) != whole
    before.set_epoch(0)
    given.load_state_dict(before.state_dict())
    assert ids_of(loader) == whole


# Workers.


@pytest.mark.parametrize(
    "context",
    ["fork", *(pytest.param(one, marks=pytest.mark.slow) for one in ("forkserver", "spawn"))],
)
def test_workers_of_torch(both: Samples, context: str) -> None:
    both[0]  # the parent has read, and has a connection
    given = forebay.StreamingDataset(
        both, global_batch_size=32, shuffle="block", include_ids=True, rank=0, world_size=1
    )
    loader = torch.utils.data.DataLoader(
        given, batch_size=None, num_workers=2, multiprocessing_context=context
    )
    seen = list(itertools.chain(*map(check, loader)))
    assert sorted(seen) == list(range(NUM))
    with forebay.DataLoader(both, global_batch_size=32, shuffle="block", include_ids=True) as ours:
        assert seen == list(itertools.chain(*ids_of(ours)))


def test_after_a_worker_was_killed_nothing_is_lost(both: Samples) -> None:
    given = forebay.StreamingDataset(
        both, global_batch_size=32, shuffle="full", include_ids=True, rank=0, world_size=1
    )
    loader = torch.utils.data.DataLoader(
        given, batch_size=None, num_workers=2, multiprocessing_context="fork", prefetch_factor=1
    )
    seen: list[int] = []
    iterator: Any = iter(loader)
    batch = next(iterator)
    seen += check(batch)
    os.kill(iterator._workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker"):  # noqa: PT012 - whenever it notices
        for batch in iterator:
            seen += check(batch)
    state = given.state_dict(after=batch)
    del iterator
    with forebay.DataLoader(both, batch_size=10, shuffle="full", include_ids=True) as ours:
        ours.load_state_dict(state)
        seen += list(itertools.chain(*ids_of(ours)))
    assert sorted(seen) == list(range(NUM))


# Bad samples, and the plan.


def test_bad_chunks_are_masked(
    store: ForebayStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = ForebayStore(
        f"zarr-{new_random_name()}", address=store.address, session=tmp_path / "session"
    )
    array = zarr.create_array(
        one,
        name="x",
        shape=(100,),
        chunks=(10,),
        dtype="i8",
        compressors=[ZstdCodec()],
        serializer=BytesCodec(),
    )
    array[:] = np.arange(100)
    one.set_sync("x/c/3", cpu.Buffer.from_bytes(b"no zstd at all"))
    one.commit()
    found = samples(one)
    with (
        forebay.DataLoader(found, batch_size=25) as loader,
        pytest.raises(forebay.IntegrityError, match="rows 30 to 40 of array 'x'"),
    ):
        list(loader)
    caplog.clear()
    with forebay.DataLoader(found, batch_size=25, on_error="mask") as loader:
        batches = list(loader)
        assert loader.report().bad_samples == tuple(range(30, 40))
    (said,) = (one.getMessage() for one in caplog.records if "masked" in one.getMessage())
    assert "samples of the chunks of array 'x' at rows 30 to 40 of dataset" in said
    mask = torch.cat([batch["_mask"] for batch in batches])
    assert (~mask).nonzero().reshape(-1).tolist() == list(range(30, 40))
    assert torch.cat([batch["x"] for batch in batches])[mask].tolist() == [
        n for n in range(100) if not 30 <= n < 40
    ]


@settings(max_examples=20)
@given(
    st.sampled_from(["none", "full", "block"]),
    st.integers(20, 190),
    st.sampled_from([(0, 1), (0, 2), (2, 3)]),
    st.sampled_from(["keep", "pad", "drop"]),
    st.integers(0, NUM),
)
def test_the_plan_tells_what_each_step_reads(
    both_of_module: Samples,
    shuffle: Any,
    batch: int,
    rank: tuple[int, int],
    last_batch: Any,
    position: int,
) -> None:
    """Looked up key by key; each key's row as if it were in a shard of its own."""
    reading = ZarrReading(both_of_module, OrderOptions(shuffle))
    parameters = PlanParameters(batch, last_batch, *rank, 1, num_epochs=2)
    course = ZarrCourse(
        both_of_module, both_of_module.arrays(), parameters, lambda epoch: reading.order(epoch, 1)
    )
    wanted: dict[int, set[int]] = {}
    for epoch, first in ((0, position), (1, 0)):
        cut = reading.cut(epoch, first, batch, last_batch, 1)
        for step in cut.steps():
            rows = reading.order(epoch, 1).at(cut.part(step, *rank).positions(NUM))
            keys = {f"image/c/{row // 60}/0/0" for row in rows.tolist()}
            keys |= {f"label/c/{row // 30}" for row in rows.tolist()}
            places = both_of_module.stored.places
            found = {
                both_of_module.stored.shard_of(places[key].row) for key in keys if key in places
            }
            start, stop = cut.bounds(step)
            for at in range(start, stop):
                wanted[epoch * NUM + at] = found
    start = position
    for turn in course.turns(0, position):
        for at in range(start, turn.stop):
            assert set(turn.shards) == wanted.get(at, set())
        start = turn.stop
    assert start in (2 * NUM, position)
    assert start == 2 * NUM or not wanted


def test_turns_that_make_no_plan_are_refused(both: Samples, way: str) -> None:
    transfer = make_transfer(both.endpoint)
    body = {"plan": new_random_name(), "epoch": 0, "position": 0, "loader": "a test"}
    transfer.plan("plan", {**body, "manifest": both.manifest_id, "plan_bytes": 1})
    for turns in ([[1, [99]]], [[1, [-1]]], [[0, [0]]], [[1, ["0"]]], [[1]], {}, None):
        told = {"plan": body["plan"], "page": 0, "turns": turns}
        with pytest.raises(forebay.InvalidRequest, match=r"shards|a range is read|a list 'turns'"):
            transfer.plan("turns", told)
    transfer.plan("turns", {"plan": body["plan"], "page": 0, "turns": [[5, [0]], [1, []]]})
    assert transfer.plan("end_plan", {"plan": body["plan"]}) == {"existed": True}
    with pytest.raises(forebay.NotFound):
        transfer.plan("turns", {"plan": body["plan"], "page": 1, "turns": []})


@pytest.fixture(scope="module")
def both_of_module(store: ForebayStore, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """In a version of several shards, as each commit appends one."""
    one = ForebayStore(
        f"zarr-{new_random_name()}",
        address=store.address,
        session=tmp_path_factory.mktemp("several"),
    )
    root = zarr.create_group(one)
    image = root.create_array(
        "image", shape=IMAGES.shape, chunks=(20, 4, 6), shards=(60, 4, 6), dtype="f4"
    )
    label = root.create_array("label", shape=(NUM,), chunks=(30,), dtype="i8", fill_value=-7)
    for start in range(0, NUM, 240):
        image[start : start + 240] = IMAGES[start : start + 240]
        one.commit()
        label[start + 120 : start + 240] = 1
        one.commit()
    return samples(one)
