"""A local volume that goes away, with what lay on it: the other copies serve, and come back."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess

Rows = Callable[[forebay.Client, str, int], None]
Until = Callable[[Callable[[], bool], str], None]

VOLUME_MIB = 32


def run_mount(*arguments: Any) -> bool:
    command = ["mount", *map(str, arguments)]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, mounted; the test may unmount it."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder = tmp_path / "volume"
    folder.mkdir()
    if not run_mount("-t", "tmpfs", "-o", f"size={VOLUME_MIB}m", "tmpfs", folder):
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=False, stderr=subprocess.DEVNULL)


def ssd_of(client: forebay.Client) -> Any:
    return next(tier for tier in client.status().tiers if tier.name == "ssd")


def write_remote(client: forebay.Client, name: str, seed: int, write_rows: Rows) -> None:
    write_rows(client, name, seed)
    client.dataset(name).wait("remote", timeout=60)


@pytest.mark.needs("mount", "umount", package="mount")
def test_a_volume_that_is_unmounted_is_left_out_and_other_copies_serve(
    volume: Path, tmp_path: Path, write_rows: Rows, check_rows: Rows, wait_until: Until
) -> None:
    arguments = ("--ssd-path", str(volume / "ssd"), "--reserve-bytes", "0")
    with (
        DaemonProcess(tmp_path / "data", *arguments) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        write_remote(client, "before", 1, write_rows)
        subprocess.run(["umount", "--lazy", volume], check=True)
        check_rows(client, "before", 1)
        wait_until(lambda: "away" in ssd_of(client).health, "the volume is out of service")
        write_rows(client, "during", 2)
        check_rows(client, "during", 2)
        with forebay.connect(daemon.address()["rpc"]) as other:  # with nothing mapped yet
            check_rows(other, "before", 1)
    assert daemon.log().count("is taken out of service") == 1
    assert "Traceback" not in daemon.log()


@pytest.mark.needs("mount", "umount", package="mount")
def test_a_cache_that_turned_read_only_is_no_worse_than_none(
    volume: Path, tmp_path: Path, write_rows: Rows, check_rows: Rows, wait_until: Until
) -> None:
    """What lies in the object tier alone is read past it."""
    data = tmp_path / "data"
    with DaemonProcess(data) as first, forebay.connect(first.address()["rpc"]) as client:
        write_remote(client, "rows", 1, write_rows)
    for tier in ("ssd", "hdd"):
        shutil.rmtree(data / tier)
    arguments = ("--ssd-path", str(volume / "ssd"), "--reserve-bytes", "0", "--hdd-path", "none")
    with DaemonProcess(data, *arguments, "--replaced", "ssd") as daemon:
        wait_until(
            lambda: run_mount("-o", "remount,ro", volume), "the volume can be remounted read-only"
        )
        with forebay.connect(daemon.address()["rpc"]) as client:
            check_rows(client, "rows", 1)


@pytest.mark.needs("mount", "umount", package="mount")
def test_a_volume_that_is_read_only_at_the_start_serves_what_it_has(
    volume: Path, tmp_path: Path, write_rows: Rows, check_rows: Rows, wait_until: Until
) -> None:
    arguments = ("--ssd-path", str(volume / "ssd"), "--reserve-bytes", "0", "--object-url", "none")
    with (
        DaemonProcess(tmp_path / "data", *arguments) as first,
        forebay.connect(first.address()["rpc"]) as client,
    ):
        write_rows(client, "before", 1)
    assert run_mount("-o", "remount,ro", volume)
    with (
        DaemonProcess(tmp_path / "data", *arguments) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        assert "out of service" in ssd_of(client).health
        check_rows(client, "before", 1)
        write_rows(client, "during", 2)
        check_rows(client, "during", 2)
        assert run_mount("-o", "remount,rw", volume)
        wait_until(lambda: ssd_of(client).health == "ok", "the volume serves again")
        used = ssd_of(client).used_bytes
        assert used > 0
        write_rows(client, "after", 3)
        assert ssd_of(client).used_bytes > used


def test_folders_that_somebody_removed_are_made_again(
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    write_rows: Rows,
    check_rows: Rows,
) -> None:
    """And nothing but what lay in them is called damaged."""
    daemon.start().wait_ready()
    with connect() as client:
        write_remote(client, "before", 1, write_rows)
        shutil.rmtree(daemon.data / "ssd" / "files")
        with connect() as other:
            check_rows(other, "before", 1)
        write_rows(client, "after", 2)
        check_rows(client, "after", 2)
    condemned = [line for line in daemon.log().splitlines() if "is quarantined" in line]
    assert not [line for line in condemned if "in tier ssd" not in line]


def test_a_volume_that_is_lost_for_good_is_replaced_when_somebody_says_so(
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    write_rows: Rows,
    check_rows: Rows,
    wait_until: Until,
) -> None:
    daemon.start().wait_ready()
    with connect() as client:
        write_remote(client, "rows", 1, write_rows)
        used = ssd_of(client).used_bytes
    daemon.terminate()
    shutil.rmtree(daemon.data / "ssd")
    command = [sys.executable, "-m", "forebay_server", "serve", "--data", str(daemon.data)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "--replaced ssd" in refused.stderr
    daemon.arguments = ("--replaced", "ssd")
    daemon.start().wait_ready()
    with connect() as client:
        check_rows(client, "rows", 1)
        wait_until(lambda: ssd_of(client).used_bytes >= used, "the copies are made again")
    daemon.terminate()
    daemon.arguments = ()
    daemon.start().wait_ready()


@pytest.mark.parametrize("lost", ["emptied", "another"])
def test_an_object_tier_that_is_not_the_catalogs_is_refused_until_somebody_says_so(
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    write_rows: Rows,
    check_rows: Rows,
    tmp_path: Path,
    lost: str,
) -> None:
    daemon.start().wait_ready()
    with connect() as client:
        write_remote(client, "rows", 1, write_rows)
    daemon.terminate()
    location = daemon.data / "object" if lost == "emptied" else tmp_path / "other"
    if lost == "emptied":
        shutil.rmtree(location)
    url = ("--object-url", f"file://{location}")
    command = [sys.executable, "-m", "forebay_server", "serve", "--data", str(daemon.data), *url]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "--replaced object" in refused.stderr
    daemon.arguments = (*url, "--replaced", "object")
    daemon.start().wait_ready()
    with connect() as client:
        client.dataset("rows").wait("remote", timeout=60)
        check_rows(client, "rows", 1)
    daemon.terminate()
    shutil.rmtree(daemon.data / "ssd")
    daemon.arguments = (*url, "--replaced", "ssd")
    daemon.start().wait_ready()
    with connect() as client:  # it is really there
        check_rows(client, "rows", 1)
