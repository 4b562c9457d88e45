"""Scrub, fsck and garbage collection, by commands against a real daemon."""

import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.integrity import flip
from forebay_wire.v1.admin_pb2 import JobStatus


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with a dataset in two tiers."""
    folder = tmp_path_factory.mktemp("integrity")
    with DaemonProcess(folder / "data") as process:
        with forebay.connect(process.address()["rpc"]) as client:
            schema = {"noise": forebay.Array("uint8", (1000,))}
            with client.create_dataset("small", schema=schema) as writer:
                for row in range(50):
                    writer.write(noise=[row] * 1000)
            client.wait_version("small", 1, "remote")
        yield process


def stored(process: DaemonProcess) -> Path:
    (path,) = (path for path in (process.data / "ssd" / "files").rglob("*") if path.is_file())
    return path


def test_what_is_damaged_is_found_and_repaired(forebay_command, filled: DaemonProcess) -> None:
    bad = stored(filled)
    flip(bad, 100)
    done = forebay_command("scrub", "--data", filled.data, "--json")
    assert done.status == ExitCode.OK, done.err
    assert done.json["num_damaged"] == 1
    (found,) = done.json["damaged"]
    assert (found["tier"], found["file"], found["outcome"]) == ("ssd", bad.name, "repaired")
    assert stored(filled) != bad
    again = forebay_command("scrub", "--tier", "ssd", "--data", filled.data)
    assert again.status == ExitCode.OK
    assert "damaged          0" in again.out
    with urllib.request.urlopen(f"{filled.address()['http_url']}/metrics") as answer:
        metrics = answer.read().decode()
    assert 'forebay_repairs{result="repaired"} 1.0' in metrics
    assert 'forebay_scrub_damaged_replicas{tier="ssd"} 1.0' in metrics


def test_fsck_says_what_is_wrong_and_mends_it_on_demand(
    forebay_command, filled: DaemonProcess
) -> None:
    fine = forebay_command("fsck", "--data", filled.data)
    assert (fine.status, fine.out) == (ExitCode.OK, "Nothing is wrong.\n")
    stored(filled).unlink()
    wrong = forebay_command("fsck", "--data", filled.data, "--json")
    assert wrong.status == ExitCode.DAMAGED
    assert [one["kind"] for one in wrong.json["found"]] == ["missing file"]
    assert "missing file" in forebay_command("fsck", "--data", filled.data).out
    mended = forebay_command("fsck", "--repair", "--data", filled.data)
    assert mended.status == ExitCode.OK, mended.out
    assert "1 findings, 0 of them left" in mended.out
    assert stored(filled).is_file()


def test_gc_lists_what_would_go_and_why(forebay_command, filled: DaemonProcess) -> None:
    listed = forebay_command("gc", "--dry-run", "--data", filled.data, "--json")
    assert (listed.status, listed.json["num_doomed"]) == (ExitCode.OK, 0)
    assert "0 things to delete" in forebay_command("gc", "--data", filled.data).out


def test_an_unknown_tier_is_refused_by_name(forebay_command, filled: DaemonProcess) -> None:
    refused = forebay_command("scrub", "--tier", "tape", "--data", filled.data)
    assert refused.status == ExitCode.USAGE
    assert "there is no tier 'tape' on this node; it has ssd, hdd, object" in refused.err


def test_a_background_scrub_does_not_keep_the_daemon_and_goes_on_at_its_next_start(
    tmp_path: Path, wait_until
) -> None:
    slow = DaemonProcess(
        tmp_path / "data", "--scrub-interval-seconds", "0.5", "--scrub-bytes-per-second", "1"
    )
    quick = DaemonProcess(tmp_path / "data", "--scrub-interval-seconds", "0.5")
    try:
        slow.start().wait_ready()
        with forebay.connect(slow.address()["rpc"]) as client:
            with client.create_dataset("d", schema={"n": "int64"}) as writer:
                for row in range(1000):
                    writer.write(n=row)
            wait_until(lambda: any(one.state == "running" for one in scrubs(client)))
        began = time.monotonic()
        slow.terminate()
        assert time.monotonic() - began < 20, "it waited for the scrub"
        quick.start().wait_ready()
        with forebay.connect(quick.address()["rpc"]) as client:
            wait_until(lambda: was_read(quick))
            assert all(not one.error for one in scrubs(client))
    finally:
        slow.kill()
        quick.kill()


def was_read(process: DaemonProcess) -> bool:
    """Whether a scrub of this daemon has read the copy in ssd."""
    with urllib.request.urlopen(f"{process.address()['http_url']}/metrics") as answer:
        return 'forebay_scrubbed_bytes{tier="ssd"} 0.0' not in answer.read().decode()


def scrubs(client: forebay.Client) -> list[JobStatus]:
    return [job for job in client.jobs(everything=True) if job.kind == "scrub"]


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.05)

    return wait
