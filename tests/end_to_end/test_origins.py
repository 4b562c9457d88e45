"""Files that stay where they are: registered, read as a dataset, refused once changed, pinned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess, run_server
from forebay_server.testing.s3 import S3Bucket
from forebay_wire.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    OriginChanged,
    PermissionDenied,
    SchemaMismatch,
)

NUM_ROWS = 4000


def write(path: Path, start: int = 0, num_rows: int = NUM_ROWS, **columns: pa.Array) -> Path:
    table = pa.table(
        columns
        or {
            "x": np.arange(start, start + num_rows, dtype=np.int64),
            "s": [f"row {number}" for number in range(start, start + num_rows)],
        }
    )
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "corpus"
    made.mkdir()
    return made


@pytest.fixture
def daemon(tmp_path: Path, folder: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "data", "--origin-prefixes", str(folder)) as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[forebay.Client]:
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected


def read_all(client: forebay.Client, name: str = "d", version: int | str = "latest") -> list[int]:
    dataset = client.dataset(name, version)
    batch = dataset.take(np.arange(len(dataset)))
    assert [text.removeprefix("row ") for text in batch["s"]] == [str(x) for x in batch["x"]]
    return [int(x) for x in batch["x"]]


def touch_again(path: Path, damage: bytes) -> None:
    """Other bytes in the middle, the same size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(damage)
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


def test_files_in_place_are_read_as_a_dataset(client: forebay.Client, folder: Path) -> None:
    paths = [write(folder / f"{number}.arrow", number * NUM_ROWS) for number in range(3)]
    dataset = client.register_dataset("d", paths, metadata={"from": "elsewhere"})
    assert (len(dataset), dataset.version) == (3 * NUM_ROWS, 1)
    assert dataset.manifest.metadata == {"from": "elsewhere"}
    assert [one.trust for one in client.origins("d")] == ["trusted on first use: not read yet"] * 3
    assert read_all(client) == list(range(3 * NUM_ROWS))
    origins = client.origins("d", 1)
    assert [one.url for one in origins] == [f"file://{path}" for path in paths]
    assert all(one.blob and "verified" in one.trust for one in origins)

    # Shuffled by the loader, split, and appended to.
    dataset.define_splits({"train": 0.5, "test": 0.5})
    train = client.dataset("d", split="train")
    loader = forebay.DataLoader(train, batch_size=100, shuffle="full", seed=3)
    seen = {int(x) for batch in loader for x in batch["x"]}
    assert len(seen) == 3 * NUM_ROWS // 2
    more = write(folder / "more.arrow", 3 * NUM_ROWS)
    assert client.register_dataset("d", [more], append=True).version == 2
    assert read_all(client) == list(range(4 * NUM_ROWS))


def test_what_was_read_once_is_cached_and_verified_after_a_kill(
    client: forebay.Client, daemon: DaemonProcess, folder: Path
) -> None:
    path = write(folder / "a.arrow")
    client.register_dataset("d", [path])
    assert read_all(client) == list(range(NUM_ROWS))
    (first,) = client.origins("d")
    daemon.restart()
    with forebay.connect(daemon.address()["rpc"]) as again:
        assert again.origins("d") == [first]
        assert read_all(again) == list(range(NUM_ROWS))
        path.unlink()  # the cache has it
        assert read_all(again) == list(range(NUM_ROWS))


def test_a_file_is_read_once_however_many_ask(
    client: forebay.Client, daemon: DaemonProcess, folder: Path
) -> None:
    path = write(folder / "a.arrow", num_rows=500_000)
    client.register_dataset("d", [path])
    rpc = daemon.address()["rpc"]

    def read(number: int) -> int:
        with forebay.connect(rpc) as another:
            return int(another.dataset("d").take([number * 1000])["x"][0])

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(read, range(6))) == [number * 1000 for number in range(6)]
    assert float(metric(daemon, 'forebay_fetched_bytes{tier="origin"}')) == path.stat().st_size


def test_a_plan_has_files_read_before_their_turn(
    client: forebay.Client, daemon: DaemonProcess, folder: Path
) -> None:
    paths = [write(folder / f"{number}.arrow", number * NUM_ROWS) for number in range(12)]
    dataset = client.register_dataset("d", paths)
    for name in ("first run", "second run"):
        with forebay.DataLoader(dataset, batch_size=100, shuffle="none") as loader:
            batches = iter(loader)
            assert int(next(batches)["x"][0]) == 0
            wait_until(
                lambda: all(one.blob for one in client.origins("d")), f"{name}: all are read"
            )
            wait_until(
                lambda: (
                    [one.num_files for one in client.status().tiers if one.name == "ssd"] == [12]
                ),
                f"{name}: all are kept",
            )
            for path in paths:
                path.rename(path.with_suffix(".away"))
            assert sum(len(batch["x"]) for batch in batches) == 12 * NUM_ROWS - 100
            for path in paths:
                path.with_suffix(".away").rename(path)
    assert float(metric(daemon, 'forebay_fetched_bytes{tier="origin"}')) == sum(
        path.stat().st_size for path in paths
    )


def test_rows_that_a_reader_plans_are_read_from_their_files_before_their_turn(
    client: forebay.Client, folder: Path
) -> None:
    paths = [write(folder / f"{number}.arrow", number * NUM_ROWS) for number in range(6)]
    dataset = client.register_dataset("d", paths)
    indices = [5 * NUM_ROWS, NUM_ROWS + 1, 5 * NUM_ROWS + 2]
    with dataset.plan(indices) as plan:
        wait_until(
            lambda: (
                [number for number, one in enumerate(client.origins("d")) if one.blob] == [1, 5]
            ),
            "those two files are read",
        )
        for path in paths:
            path.unlink()
        assert dataset.take(indices)["x"].tolist() == indices
        plan.advance(1)
        wait_until(
            lambda: all(one.ready_bytes == one.ahead_bytes > 0 for one in client.status().plans),
            "the files are known by their blobs",
        )


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def metric(daemon: DaemonProcess, name: str) -> str:
    with urllib.request.urlopen(daemon.address()["http_url"] + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    (line,) = [one for one in text.splitlines() if one.startswith(name)]
    return str(line.split()[-1])


def test_a_large_file_that_changes_while_it_is_streamed_is_told(
    tmp_path: Path, folder: Path
) -> None:
    path = write(folder / "a.arrow", num_rows=1_500_000)
    assert path.stat().st_size > 16 << 20
    options = ("--origin-prefixes", str(folder), "--ssd-bytes", "1000000", "--hdd-path", "none")
    with (
        DaemonProcess(tmp_path / "small", *options) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        dataset = client.register_dataset("d", [path])
        assert int(dataset.take([0])["x"][0]) == 0
        touch_again(path, b"changed")
        with pytest.raises(OriginChanged, match=r"a\.arrow has changed"):
            dataset.take(np.arange(len(dataset)))


def test_a_changed_file_is_refused_with_its_name(
    client: forebay.Client, daemon: DaemonProcess, folder: Path
) -> None:
    path, gone = write(folder / "a.arrow"), write(folder / "b.arrow", NUM_ROWS)
    client.register_dataset("d", [path])
    client.register_dataset("gone", [gone])
    touch_again(path, b"changed")
    gone.unlink()
    with pytest.raises(OriginChanged, match=rf"{path} has changed .*mtime_ns \d+, now \d+"):
        read_all(client)
    with pytest.raises(OriginChanged, match=rf"{gone} has changed .*not there"):
        read_all(client, "gone")
    with pytest.raises(OriginChanged):
        client.pin_origins("d")
    assert client.dataset("d").version == 1


def test_a_change_that_hides_its_time_is_never_read_as_the_old_bytes(
    tmp_path: Path, folder: Path
) -> None:
    path = write(folder / "a.arrow", num_rows=200_000)
    options = ("--origin-prefixes", str(folder), "--ssd-bytes", "1000000", "--hdd-path", "none")
    with (
        DaemonProcess(tmp_path / "small", *options) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        client.register_dataset("d", [path])
        assert len(read_all(client)) == 200_000  # by a window: the cache has no room
        before = path.stat()
        touch_again(path, b"changed")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        daemon.restart()
        with (
            forebay.connect(daemon.address()["rpc"]) as again,
            pytest.raises(OriginChanged, match="other bytes than at the first read"),
        ):
            read_all(again)


def test_pinned_files_may_go(client: forebay.Client, daemon: DaemonProcess, folder: Path) -> None:
    paths = [write(folder / f"{number}.arrow", number * NUM_ROWS) for number in range(2)]
    client.register_dataset("d", paths)
    pinned = client.pin_origins("d")
    assert (pinned.version, client.origins("d"), len(client.origins("d", 1))) == (2, [], 2)
    assert client.pin_origins("d").version == 2
    pinned.wait("remote", timeout=60)
    for path in paths:
        path.unlink()
    daemon.restart()
    with forebay.connect(daemon.address()["rpc"]) as again:
        assert read_all(again) == list(range(2 * NUM_ROWS))
        assert read_all(again, version=1) == list(range(2 * NUM_ROWS))


def test_a_dataset_of_origins_is_deleted_and_registered_again(
    client: forebay.Client, folder: Path
) -> None:
    path = write(folder / "a.arrow")
    client.register_dataset("d", [path])
    read_all(client)
    client.delete_dataset("d", now=True)
    assert path.exists()
    client.register_dataset("d", [path])
    assert read_all(client) == list(range(NUM_ROWS))


def test_recovered_datasets_know_their_origins(
    client: forebay.Client, daemon: DaemonProcess, tmp_path: Path, folder: Path
) -> None:
    client.register_dataset("d", [write(folder / "a.arrow")]).wait("remote", timeout=60)
    daemon.kill()
    data, url = tmp_path / "new", f"file://{daemon.data}/object"
    run_server("recover", url, "--data", data).check_returncode()
    with (
        DaemonProcess(data, "--origin-prefixes", str(folder)) as found,
        forebay.connect(found.address()["rpc"]) as again,
    ):
        assert read_all(again) == list(range(NUM_ROWS))


def test_only_what_lies_below_the_prefixes_is_read(
    client: forebay.Client, tmp_path: Path, folder: Path
) -> None:
    secret = write(tmp_path / "secret.arrow")
    (folder / "link.arrow").symlink_to(secret)
    (tmp_path / "corpus-2").mkdir()
    sibling = write(tmp_path / "corpus-2" / "a.arrow")
    for url in (secret, folder / "link.arrow", f"file://{folder}/../secret.arrow", sibling):
        with pytest.raises(PermissionDenied, match="origin-prefixes"):
            client.register_dataset("d", [url])
    with pytest.raises(PermissionDenied, match="origin-prefixes"):
        client.register_dataset("d", ["s3://bucket/key"])
    assert client.datasets() == []


def test_a_file_replaced_by_a_link_after_registering_is_not_followed(
    client: forebay.Client, tmp_path: Path, folder: Path
) -> None:
    (folder / "sub").mkdir()
    path = write(folder / "sub" / "a.arrow")
    client.register_dataset("d", [path])
    (folder / "sub").rename(tmp_path / "moved")
    (folder / "sub").symlink_to(tmp_path / "moved")
    with pytest.raises(PermissionDenied, match="by a link"):
        read_all(client)


@pytest.mark.parametrize("failpoint", ["origin.before_row", "origin.after_row"])
def test_a_first_read_that_is_killed_begins_again(
    tmp_path: Path, folder: Path, failpoint: str
) -> None:
    path = write(folder / "a.arrow")
    killed = DaemonProcess(tmp_path / "data", "--origin-prefixes", str(folder))
    killed.environment["FOREBAY_FAILPOINTS"] = failpoint
    with killed as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        dataset = client.register_dataset("d", [path])
        with ThreadPoolExecutor(1) as threads:
            rows = threads.submit(dataset.take, np.arange(NUM_ROWS))
            assert daemon.wait_exit() == -signal.SIGKILL
            del killed.environment["FOREBAY_FAILPOINTS"]
            daemon.start().wait_ready()
            assert list(rows.result(60)["x"]) == list(range(NUM_ROWS))
        (origin,) = client.origins("d")
        assert origin.blob
        used = {tier.name: tier.num_files for tier in client.status().tiers}
        assert used["ssd"] == 1  # and nothing left over


def test_a_pin_that_is_killed_is_made_again(tmp_path: Path, folder: Path) -> None:
    path = write(folder / "a.arrow")
    killed = DaemonProcess(tmp_path / "data", "--origin-prefixes", str(folder))
    killed.environment["FOREBAY_FAILPOINTS"] = "origin.before_pin"
    with killed as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        client.register_dataset("d", [path])
        with ThreadPoolExecutor(1) as threads:
            pinned = threads.submit(client.pin_origins, "d")
            assert daemon.wait_exit() == -signal.SIGKILL
            del killed.environment["FOREBAY_FAILPOINTS"]
            daemon.start().wait_ready()
            assert pinned.result(60).version == 2
        path.unlink()
        assert read_all(client) == list(range(NUM_ROWS))


def test_missing_numbers_are_told_not_made_up(client: forebay.Client, folder: Path) -> None:
    path = write(folder / "a.arrow", n=pa.array([1, None, 3]))
    dataset = client.register_dataset("d", [path])
    with pytest.raises(SchemaMismatch, match="'n' of int64 has missing values"):
        dataset.take([0])


def test_without_prefixes_nothing_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow")
    with (
        DaemonProcess(tmp_path / "data") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        pytest.raises(InvalidRequest, match="origin-prefixes"),
    ):
        client.register_dataset("d", [path])


def test_what_cannot_be_registered_says_why(client: forebay.Client, folder: Path) -> None:
    good = write(folder / "good.arrow")
    with pytest.raises(NotFound, match=r"missing\.arrow"):
        client.register_dataset("d", [good, folder / "missing.arrow"])
    text = folder / "text.arrow"
    text.write_text("no Arrow at all " * 10)
    with pytest.raises(InvalidRequest, match=r"text\.arrow is no Arrow IPC file"):
        client.register_dataset("d", [text])
    (folder / "sub").mkdir()
    with pytest.raises(InvalidRequest, match="is no file"):
        client.register_dataset("d", [folder / "sub"])
    other = write(folder / "other.arrow", y=pa.array([1, 2, 3]))
    with pytest.raises(SchemaMismatch, match=r"other\.arrow has other columns"):
        client.register_dataset("d", [good, other])
    large = write(folder / "large.arrow", s=pa.array(["a"], pa.large_string()))
    with pytest.raises(SchemaMismatch, match=r"large\.arrow, column 's': large_string"):
        client.register_dataset("d", [large])
    words = write(folder / "words.arrow", s=pa.array(["a", "b"]).dictionary_encode())
    with pytest.raises(SchemaMismatch, match=r"words\.arrow has dictionary"):
        client.register_dataset("d", [words])
    with pytest.raises(InvalidRequest, match="at least one URL"):
        client.register_dataset("d", [])
    assert client.datasets() == []
    client.register_dataset("d", [good])
    with pytest.raises(AlreadyExists):
        client.register_dataset("d", [good])


def test_by_commands(client: forebay.Client, daemon: DaemonProcess, folder: Path) -> None:
    path = write(folder / "a.arrow")

    def run(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "forebay.cli", "dataset", *arguments]
        options = ["--address", daemon.address()["rpc"], "--json"]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=True, timeout=100
        )
        return dict(json.loads(done.stdout))

    made = run("register", "d", str(path))
    assert (made["num_rows"], made["num_origins"]) == (NUM_ROWS, 1)
    (shown,) = run("show", "d")["origins"]  # type: ignore[misc]
    assert (shown["url"], shown["trust"]) == (
        f"file://{path}",
        "trusted on first use: not read yet",
    )
    assert run("pin", "d")["version"] == 2


def test_objects_of_s3_in_place(s3: S3Bucket, tmp_path: Path) -> None:
    files = s3.file_system()
    place = s3.url("corpus")
    urls = [f"{place}/{number}.arrow" for number in range(2)]
    for number, url in enumerate(urls):
        files.put_file(str(write(tmp_path / f"{number}.arrow", number * NUM_ROWS)), url)
    options = ",".join(f"{name}={value}" for name, value in s3.options.items())
    arguments = ("--origin-prefixes", place, "--origin-options", options)
    with (
        DaemonProcess(tmp_path / "data", *arguments) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        client.register_dataset("d", urls)
        client.register_dataset("changing", urls[:1])
        with pytest.raises(NotFound, match=r"missing\.arrow"):
            client.register_dataset("e", [f"{place}/missing.arrow"])
        changed = write(tmp_path / "0.arrow", 7)  # the same size, another ETag
        files.put_file(str(changed), urls[0])
        with pytest.raises(OriginChanged, match=r"0\.arrow has changed .*etag"):
            read_all(client, "changing")
        client.register_dataset("again", urls[1:])
        pinned = client.pin_origins("again")
        files.rm(urls[1])
        assert read_all(client, "again", pinned.version)[0] == NUM_ROWS
    wrong = options.replace(s3.secret, "wrongsecret")
    with (
        DaemonProcess(
            tmp_path / "wrong", "--origin-prefixes", place, "--origin-options", wrong
        ) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        pytest.raises(PermissionDenied, match="origin-options"),
    ):
        client.register_dataset("d", urls)
