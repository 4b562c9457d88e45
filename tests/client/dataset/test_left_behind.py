"""After SIGKILL of a trainer nothing stays of it: process, shared memory, file or lease."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import forebay
from forebay.testing.blobs import replica_files
from forebay.testing.numbered import write_numbered
from forebay_server.testing.daemon import DaemonProcess

READY_SECONDS = 60
GONE_SECONDS = 30
"""torch's workers look for their parent every five seconds."""

LEASE_SECONDS = 100
"""An upload that nobody goes on with is given up after a minute."""


def wait_until(is_so, what: str, seconds: float = GONE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: {is_so()}"
        time.sleep(0.05)


def memory_files(processes: list[psutil.Process]) -> set[Path]:
    """What *processes* have open or mapped below /dev/shm, and what was not unlinked yet."""
    found = set()
    for process in processes:
        folder = Path("/proc") / str(process.pid)
        names = [line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()]
        for descriptor in (folder / "fd").iterdir():
            try:
                names.append(os.readlink(descriptor))
            except FileNotFoundError:
                continue
        found |= {Path(name) for name in names if name.startswith("/dev/shm/")}
    return {path for path in found if not path.name.endswith("(deleted)")}


def files_below(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


@pytest.mark.slow  # torch's workers and the lease of an upload take their time
@pytest.mark.timeout(400)
def test_nothing_is_left_of_a_killed_trainer(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with (
        DaemonProcess(tmp_path / "data", "--object-url", "none") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        write_numbered(client, "numbered")
        wait_until(lambda: client.status().num_uploads == 0, "uploads of the test itself")
        before = client.status()
        files = set(replica_files(daemon.data))
        sockets = files_below(Path(daemon.address()["rpc"].removeprefix("unix:")).parent)
        program = Path(__file__).parent / "doomed_trainer.py"
        with (tmp_path / "log").open("wb") as log:
            trainer = subprocess.Popen(
                [sys.executable, str(program), daemon.address()["rpc"], "numbered"],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "TMPDIR": str(scratch)},
            )
        try:
            heard, _, _ = select.select([trainer.stdout], [], [], READY_SECONDS)
            assert heard, "it is not ready"
            assert trainer.stdout.readline() == b"ready\n", (tmp_path / "log").read_text()
            wait_until(lambda: client.status().plans, "it has told its plan")
            family = psutil.Process(trainer.pid).children(recursive=True)
            assert len(family) >= 4  # two workers, and a process each for their calls
            shared = memory_files([psutil.Process(trainer.pid), *family])
            during = client.status()
            assert during.num_uploads >= 1
            assert sum(tier.open_bytes for tier in during.tiers) > 0
        finally:
            trainer.kill()
            trainer.wait()
            trainer.stdout.close()

        wait_until(lambda: not [p.pid for p in family if p.is_running()], "its processes are gone")
        assert [path for path in shared if path.exists()] == []
        assert files_below(scratch) == set()
        assert files_below(Path(daemon.address()["rpc"].removeprefix("unix:")).parent) == sockets
        wait_until(
            lambda: (
                sum(tier.open_bytes for tier in client.status().tiers)
                == sum(tier.open_bytes for tier in before.tiers)
            ),
            "nothing is open for it any more",
        )
        wait_until(
            lambda: client.status().num_uploads == 0, "its upload is given up", LEASE_SECONDS
        )
        wait_until(lambda: not client.status().plans, "its plans are over", LEASE_SECONDS)
        assert set(replica_files(daemon.data)) == files
        assert client.datasets() == ["numbered"]
