"""Two data folders that are told to keep their bytes in one place."""

from collections.abc import Callable
from pathlib import Path

from forebay_server.testing.daemon import DaemonProcess

StartDaemon = Callable[..., DaemonProcess]


def refuse(data: Path, *arguments: str) -> str:
    """The log of a daemon that must not start."""
    daemon = DaemonProcess(data, *arguments)
    try:
        assert daemon.start().wait_exit() != 0
        return daemon.log()
    finally:
        daemon.kill()


def test_a_tier_folder_serves_one_data_folder(start_daemon: StartDaemon, tmp_path: Path) -> None:
    shared = ("--ssd-path", str(tmp_path / "shared"))
    first = start_daemon(*shared, data=tmp_path / "first")
    log = refuse(tmp_path / "second", *shared)
    assert f"{tmp_path / 'shared'} is the ssd volume of node" in log
    assert "ssd-path" in log
    first.terminate()
    assert "is the ssd volume of node" in refuse(tmp_path / "second", *shared)
    first.start().wait_ready()


def test_an_object_tier_is_one_catalogs(start_daemon: StartDaemon, tmp_path: Path) -> None:
    shared = ("--object-url", f"file://{tmp_path / 'objects'}")
    first = start_daemon(*shared, data=tmp_path / "first")
    log = refuse(tmp_path / "second", *shared)
    assert f"belongs to the data folder {tmp_path / 'first'}" in log
    assert f"forebay recover file://{tmp_path / 'objects'}" in log
    first.restart()
