"""Samples that cannot be read are holes where they stand: nothing moves, nothing else is lost."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import forebay
from forebay.dataset.holes import ErrorBudget, Hole
from forebay.testing.numbered import NUM_SAMPLES, expected_batches, write_numbered
from forebay_server.testing.daemon import DaemonProcess

SIZE = 16


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A dataset of which two shards are damaged in all copies, which was found; and their rows."""
    folder = tmp_path_factory.mktemp("holes") / "data"
    with DaemonProcess(folder, "--object-encoding", "raw") as daemon:
        with forebay.connect(str(folder)) as client:
            write_numbered(client, "d")
            client.dataset("d").wait("remote", timeout=60)
            shards = client.dataset("d").manifest.shards
            opened = client.transfer.open([shard.blob for shard in shards])
            contents = [bytes(blob.map()) for blob in opened]
        daemon.terminate()
        damage = Damage(folder, contents, [shard.num_rows for shard in shards])
        damage.flip()
        daemon.start().wait_ready()
        damage.find()
        yield daemon, damage.rows, damage


class Damage:
    """A bit in the middle of the second shard, and one in the footer of the third, in all tiers."""

    def __init__(self, folder: Path, contents: list[bytes], counts: list[int]) -> None:
        self._folder = folder
        second, third = counts[0], counts[0] + counts[1]
        self._parts = [range(second, third), range(third, third + counts[2])]
        self.rows = [row for part in self._parts for row in part]
        self.first_rows = [part[0] for part in self._parts]
        self._places = [
            (path, start + offset)
            for content, offset in (
                (contents[1], len(contents[1]) // 2),
                (contents[2], len(contents[2]) - 8),
            )
            for path in [*(folder / "object").rglob("*"), *(folder / "ssd").rglob("*")]
            if path.is_file() and (start := path.read_bytes().find(content)) >= 0
        ]
        assert len(self._places) == 4

    def flip(self) -> None:
        """Make it, or mend it."""
        for path, offset in self._places:
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.seek(offset)
                [byte] = file.read(1)
                file.seek(offset)
                file.write(bytes([byte ^ 1]))

    def find(self) -> None:
        """Have the daemon know."""
        with forebay.connect(str(self._folder)) as client:
            for part in self._parts:
                with pytest.raises(forebay.IntegrityError):
                    client.dataset("d").take(part)


@pytest.fixture(params=["local", "http"])
def dataset(request, damaged, monkeypatch):
    monkeypatch.setenv("FOREBAY_NO_LOCAL", "1" if request.param == "http" else "")
    with forebay.connect(str(damaged[0].data)) as client:
        yield client.dataset("d")


def check(batches, dataset, bad) -> int:
    """All *batches* of an epoch hold what they must, and holes just where the bad samples stand."""
    expected = expected_batches(dataset, SIZE, shuffle="full", seed=5)
    for batch, rows in zip(batches, expected, strict=True):
        there = [row not in bad for row in rows]
        assert batch["_ids"].tolist() == rows
        assert batch["_mask"].tolist() == there
        for place, row in enumerate(rows):
            is_hole = row in bad
            assert batch["number"][place] == (0 if is_hole else row)
            assert torch.all(batch["image"][place] == (0 if is_hole else row % 256))
            assert batch["text"][place] == (None if is_hole else f"sample {row}")
            if is_hole:
                assert batch["ragged"][place] is None
            else:
                assert batch["ragged"][place].tolist() == list(range(row % 4))
    return sum(int(batch["_mask"].sum()) for batch in batches)


OPTIONS = {
    "global_batch_size": SIZE,
    "shuffle": "full",
    "seed": 5,
    "include_ids": True,
    "on_error": "mask",
    "max_errors": 150,
}


@pytest.mark.parametrize("num_threads", [0, 2])
def test_bad_samples_are_holes_and_nothing_else_changes(dataset, damaged, num_threads, caplog):
    bad = damaged[1]
    with forebay.DataLoader(dataset, num_threads=num_threads, **OPTIONS) as loader:
        batches, states = [], []
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict()["position"])
        assert check(batches, dataset, bad) == NUM_SAMPLES - len(bad)
        assert states == [min(NUM_SAMPLES, (k + 1) * SIZE) for k in range(len(batches))]
        report = loader.report()
        assert report.samples == NUM_SAMPLES - len(bad)
        assert (report.masked_samples, report.bad_samples) == (len(bad), tuple(bad))
        assert f"masked {len(bad)} samples" in str(report)
        for _ in loader:  # the same ones once more: the budget counts each once
            pass
        assert loader.report().masked_samples == 2 * len(bad)
        assert loader.report().bad_samples == tuple(bad)
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 2, "one for each shard"
    assert "shard 1 of dataset d v1" in caplog.text
    assert "shard 2 of dataset d v1" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_holes_in_torchs_loader_too(dataset, damaged, num_workers):
    bad = damaged[1]
    stream = forebay.StreamingDataset(dataset, **OPTIONS | {"max_errors": len(bad)})
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers)
    assert check(list(loader), dataset, bad) == NUM_SAMPLES - len(bad)
    report = stream.report()
    assert (report.masked_samples, report.bad_samples) == (len(bad), tuple(bad))


def test_more_than_the_budget_is_an_error_that_names_the_samples(dataset, damaged):
    bad = damaged[1]
    options = OPTIONS | {"shuffle": "none", "max_errors": 2}
    with forebay.DataLoader(dataset, **options) as loader:
        batches = iter(loader)
        for _ in range(bad[0] // SIZE):
            assert next(batches)["_mask"].all()
        with pytest.raises(forebay.TooManyBadSamples, match=r"max_errors=2") as caught:
            next(batches)
        assert f"rows {bad[0]}, {bad[1]}, {bad[2]};" in str(caught.value)
        assert loader.state_dict()["position"] == bad[0] // SIZE * SIZE


def test_workers_share_one_budget(dataset, damaged):
    budget = len(damaged[1]) - 1
    stream = forebay.StreamingDataset(dataset, **OPTIONS | {"max_errors": budget})
    with pytest.raises(forebay.TooManyBadSamples, match=f"max_errors={budget}"):
        list(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2))


def test_unless_told_otherwise_the_first_bad_sample_raises(dataset):
    options = {name: OPTIONS[name] for name in ("global_batch_size", "shuffle", "seed")}
    with forebay.DataLoader(dataset, **options) as loader, pytest.raises(forebay.ForebayError):
        list(loader)


def test_padding_is_masked_beside_the_holes(dataset, damaged):
    with forebay.DataLoader(dataset, last_batch="pad", **OPTIONS) as loader:
        last = list(loader)[-1]
    num_left = NUM_SAMPLES % SIZE
    rows = last["_ids"].tolist()
    assert len(rows) == SIZE
    there = [place < num_left and row not in damaged[1] for place, row in enumerate(rows)]
    assert last["_mask"].tolist() == there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "skip"}, 'on_error=.skip.: "raise" or "mask"'),
        ({"max_errors": 3}, 'belongs to on_error="mask"'),
        ({"on_error": "mask", "max_errors": -1}, "a number from 0"),
    ],
)
def test_policies_that_are_none_are_refused(dataset, options, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        forebay.DataLoader(dataset, global_batch_size=1, **options)


def test_a_budget_counts_each_sample_once_whoever_meets_it():
    table = np.full(64, -1, np.int64)
    one, two = (ErrorBudget(20, "dataset d", table) for _ in range(2))
    for row in range(20):
        (one, two)[row % 2].spend([Hole(0, row * 64, "torn")] * 3)
        (two, one)[row % 2].spend([Hole(1, row * 64, "torn")])
    assert one.rows == two.rows == tuple(range(0, 20 * 64, 64))
    with pytest.raises(forebay.TooManyBadSamples, match=r"21 samples of dataset d .* row 7: torn"):
        one.spend([Hole(0, 7, "torn")])


@given(
    max_errors=st.integers(0, 40),
    rows=st.lists(st.integers(0, 2**62) | st.integers(0, 60), max_size=80),
)
def test_a_budget_is_a_set_of_rows(max_errors, rows):
    budget, seen = ErrorBudget(max_errors, "d"), set()
    for row in rows:
        seen.add(row)
        if len(seen) > max_errors:
            with pytest.raises(forebay.TooManyBadSamples, match=f"{len(seen)} samples of d"):
                budget.spend([Hole(0, row, "torn")])
            return
        budget.spend([Hole(0, row, "torn")])
        assert budget.rows == tuple(sorted(seen))


@pytest.mark.slow
def test_what_is_repaired_is_no_hole_in_the_next_epoch(damaged, monkeypatch):
    """Also if it was open while it was lost. The daemon reads bad bytes again after a restart."""
    monkeypatch.delenv("FOREBAY_NO_LOCAL", raising=False)
    daemon, bad, damage = damaged
    damage.flip()
    daemon.restart()
    with (
        forebay.connect(str(daemon.data)) as client,
        forebay.DataLoader(client.dataset("d"), num_threads=1, **OPTIONS) as loader,
    ):
        loader.dataset.take(damage.first_rows)  # opens the shards, and looks at nothing else
        damage.flip()
        assert 0 < sum(int((~batch["_mask"]).sum()) for batch in loader) <= len(bad)
        damage.flip()
        daemon.restart()
        assert all(batch["_mask"].all() for batch in loader)
        damage.flip()
        daemon.restart()
    damage.find()


def test_damage_of_an_added_column_masks_its_rows_alone(tmp_path):
    """Not all rows of the other columns' record batches, and none where it is not read."""
    n = 30000
    options = {"shard_bytes": 1 << 16, "batch_bytes": 1 << 11}
    with DaemonProcess(tmp_path / "data", "--object-encoding", "raw") as daemon:
        with forebay.connect(str(daemon.data)) as client:
            with client.create_dataset("d", {"x": "int64"}) as writer:  # one record batch
                writer.write_table(pa.table({"x": range(n)}))
            with client.write_columns("d", {"y": "int64"}, **options) as writer:
                writer.write_table(pa.table({"y": range(n)}))
            client.wait_version("d", 2, "remote", timeout=60)
            dataset = client.dataset("d")
            assert len(dataset.manifest.shards[0].batch_rows) == 1
            first, shard, *_ = dataset.manifest.layers[0].shards
            with client.transfer.open([shard.blob])[0] as blob:
                content = bytes(blob.map())
        daemon.terminate()
        offset = len(content) // 2
        places = [
            (path, start + offset)
            for tier in ("object", "ssd")
            for path in (tmp_path / "data" / tier).rglob("*")
            if path.is_file() and (start := path.read_bytes().find(content)) >= 0
        ]
        assert len(places) == 2
        for path, place in places:
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.seek(place)
                [byte] = file.read(1)
                file.seek(place)
                file.write(bytes([byte ^ 1]))
        daemon.start().wait_ready()
        with forebay.connect(str(daemon.data)) as client:
            dataset = client.dataset("d")
            again = {"batch_size": 100, "on_error": "mask", "max_errors": n, "shuffle": "full"}
            for columns, may_fail in ((["x"], False), (["x", "y"], True)):
                bad = []
                with forebay.DataLoader(
                    dataset, **again, columns=columns, include_ids=True
                ) as loader:
                    for batch in loader:
                        good = batch["_mask"]
                        bad += batch["_ids"][~good].tolist()
                        for column in columns:
                            assert torch.equal(batch[column][good], batch["_ids"][good])
                assert bool(bad) == may_fail
            bad.sort()
            assert first.num_rows <= bad[0] <= bad[-1] < first.num_rows + shard.num_rows
            reason = next(iter(dataset.verify().damaged.values()))
            assert "v2 (columns y), shard 1" in reason
