"""Volumes that turn read-only, and volumes that are really full."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess

pytestmark = [
    pytest.mark.needs("mount", "umount", package="mount"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount"),
]

VOLUME_MIB = 32


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 32 MiB."""
    folder = tmp_path / "volume"
    folder.mkdir()
    options = f"size={VOLUME_MIB}m"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(command, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def turned_read_only(volume: Path) -> bool:
    """Busy while a file is open for writing."""
    command = ["mount", "-o", "remount,ro", volume]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def ssd_of(client: forebay.Client) -> object:
    return next(tier for tier in client.status().tiers if tier.name == "ssd")


def test_a_volume_that_turns_read_only_is_left_out_until_it_is_back(
    volume: Path,
    tmp_path: Path,
    write_rows: Callable[[forebay.Client, str, int], None],
    check_rows: Callable[[forebay.Client, str, int], None],
    wait_until: Callable[[Callable[[], bool], str], None],
) -> None:
    with (
        DaemonProcess(
            tmp_path / "data", "--ssd-path", str(volume / "ssd"), "--reserve-bytes", "0"
        ) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        write_rows(client, "before", 1)
        on_ssd = ssd_of(client).used_bytes
        assert on_ssd > 0
        wait_until(lambda: turned_read_only(volume), "the volume can be remounted read-only")
        write_rows(client, "during", 2)
        assert "out of service" in ssd_of(client).health
        check_rows(client, "before", 1)
        check_rows(client, "during", 2)
        subprocess.run(["mount", "-o", "remount,rw", volume], check=True)
        wait_until(lambda: ssd_of(client).health == "ok", "the volume serves again")
        write_rows(client, "after", 3)
        check_rows(client, "after", 3)
        assert ssd_of(client).used_bytes > on_ssd
    assert daemon.log().count("is taken out of service") == 1
    assert daemon.log().count("is in service again") == 1


def test_a_full_volume_refuses_early_and_keeps_what_it_has(
    volume: Path,
    tmp_path: Path,
    write_rows: Callable[[forebay.Client, str, int], None],
    check_rows: Callable[[forebay.Client, str, int], None],
) -> None:
    """No limit of its own and nothing kept back: the device itself is full."""
    state = {"weight": torch.arange(3 << 18, dtype=torch.int32)}  # 3 MiB
    with (
        DaemonProcess(
            tmp_path / "data",
            *("--ssd-path", str(volume / "ssd"), "--hdd-path", "none", "--object-url", "none"),
            *("--reserve-bytes", "0"),
        ) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        write_rows(client, "rows", 1)
        (volume / "somebody elses").write_bytes(bytes(8 << 20))
        with forebay.Checkpointer(client, run="r") as checkpointer:
            for step in range(1, 20):
                try:
                    checkpointer.save(step, state=state).wait("local", timeout=60)
                except forebay.ResourceExhausted as error:
                    assert "bytes needed" in str(error)  # noqa: PT017 - the step is not known
                    break
                state["weight"] += 1
            else:
                pytest.fail("32 MiB took 57 MiB")
        assert step > 4
        with forebay.Checkpointer(client, run="r") as checkpointer:
            resumed = checkpointer.restore("latest")
        assert resumed is not None
        assert resumed.step == step - 1
        assert torch.equal(resumed.state["weight"], state["weight"] - 1)
        check_rows(client, "rows", 1)
        (volume / "somebody elses").unlink()
        with forebay.Checkpointer(client, run="r") as checkpointer:
            checkpointer.restore("latest")
            checkpointer.save(step + 1, state=state).wait("local", timeout=60)
