"""SIGKILL at every named step of a dataset commit: all of a version is there, or nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess, run_server
from forebay_server.testing.warm import WarmPython
from forebay_wire.failpoints import DATASET_COMMIT, REMOTE_FLUSH, VARIABLE

WRITER = Path(__file__).with_name("write_dataset.py")
Rows = Callable[[forebay.Client, str, int], None]


@pytest.mark.parametrize("point", DATASET_COMMIT)
def test_daemon_killed_in_a_dataset_commit_leaves_all_or_nothing(
    point: str,
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    write_rows: Rows,
    check_rows: Rows,
    in_background: Callable[[Callable[[], Any]], Callable[[], Any]],
    files_of: Callable[[], list[Path]],
    wait_until: Callable[[Callable[[], bool], str], None],
) -> None:
    daemon.start().wait_ready()
    with connect() as client:
        write_rows(client, "kept", 1)
        kept_files = set(files_of())
    daemon.restart(environment={VARIABLE: point})
    with connect() as client:
        outcome = in_background(lambda: write_rows(client, "new", 2))
        assert daemon.wait_exit() == -9, "the failpoint was not passed"
        daemon.start().wait_ready()
        result = outcome()
        committed = "new" in client.datasets()
        assert committed or isinstance(result, forebay.ForebayError)
        if not committed:
            write_rows(client, "new", 2)
        check_rows(client, "new", 2)
        check_rows(client, "kept", 1)
        client.delete_dataset("new", now=True)
        wait_until(lambda: set(files_of()) == kept_files, "left-over bytes are reclaimed")
        check_rows(client, "kept", 1)


@pytest.mark.parametrize("point", ["client.write.after_shard", "client.write.before_commit"])
def test_writer_killed_before_its_commit_leaves_nothing(
    point: str,
    tmp_path: Path,
    warm_torch: WarmPython,
    write_rows: Rows,
    files_of: Callable[[], list[Path]],
    wait_until: Callable[[Callable[[], bool], str], None],
) -> None:
    with DaemonProcess(tmp_path / "data", "--lease-seconds", "2") as daemon:
        writer = warm_torch.run([WRITER, daemon.address()["rpc"]], {VARIABLE: point})
        assert writer.returncode == -9
        with forebay.connect(daemon.address()["rpc"]) as client:
            assert client.datasets() == []
            wait_until(lambda: files_of() == [], "left-over bytes are reclaimed")
            assert client.status().num_uploads == 0


@pytest.mark.parametrize("point", REMOTE_FLUSH)
def test_daemon_killed_in_a_flush_resumes_it_and_the_object_tier_is_complete(
    point: str,
    daemon: DaemonProcess,
    tmp_path: Path,
    connect: Callable[[], forebay.Client],
    write_rows: Rows,
    check_rows: Rows,
) -> None:
    daemon.start(environment={VARIABLE: point}).wait_ready()
    with connect() as client:
        write_rows(client, "new", 3)
        assert daemon.wait_exit() == -9, "the failpoint was not passed"
        daemon.start().wait_ready()
        client.wait_version("new", 1, "remote", timeout=60)
    daemon.terminate()
    recovered = tmp_path / "recovered"
    run_server("recover", daemon.data / "object", "--data", recovered).check_returncode()
    with (
        DaemonProcess(recovered) as second,
        forebay.connect(second.address()["rpc"]) as client,
    ):
        check_rows(client, "new", 3)
