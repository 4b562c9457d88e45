"""A daemon ends by itself only when nobody needs it any more."""

import asyncio
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import forebay
from forebay_server.exit_codes import ExitCode
from forebay_server.publish.landing import BlobLanding, PublishedBlob
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.here import serve_here
from forebay_wire.limits import KIB

IDLE_SECONDS = 1.0
LONG_SECONDS = 3.0
"""Three times the idle time: a daemon that is still there has not counted it."""

READER = """
import pickle, sys
from pathlib import Path
dataset = pickle.loads(Path(sys.argv[1]).read_bytes())
print(dataset.take([0])["x"].tolist(), flush=True)
sys.stdin.read()
"""


def write_dataset(address: str) -> bytes:
    """A dataset's pickle; nothing of the client that wrote it is left in this process."""
    with forebay.connect(address) as client:
        with client.create_dataset("d", schema={"x": "float32"}) as writer:
            writer.write(x=1.5)
        return pickle.dumps(client.dataset("d"))


def test_a_worker_that_only_reads_bytes_keeps_the_daemon(tmp_path: Path) -> None:
    """It has the descriptor socket open, and no client."""
    with DaemonProcess(tmp_path / "data", "--idle-exit", str(IDLE_SECONDS)) as daemon:
        address = daemon.address()["rpc"]
        with forebay.connect(address):  # until the worker is there
            (tmp_path / "dataset").write_bytes(write_dataset(address))
            reader = subprocess.Popen(
                [sys.executable, "-c", READER, str(tmp_path / "dataset")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert reader.stdout is not None
            assert reader.stdout.readline() == "[1.5]\n"
        assert daemon.process is not None
        with reader:
            with pytest.raises(subprocess.TimeoutExpired):
                daemon.process.wait(LONG_SECONDS)
            assert "idle for" not in daemon.log()
        assert reader.returncode == 0
        assert daemon.wait_exit() == ExitCode.OK


async def test_what_is_still_landing_keeps_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, publish = threading.Event(), BlobLanding.publish

    def held_publish(landing: BlobLanding) -> PublishedBlob:
        assert may_end.wait(60.0)
        return publish(landing)

    monkeypatch.setattr(BlobLanding, "publish", held_publish)
    async with asyncio.timeout(90), serve_here(tmp_path, idle_exit=IDLE_SECONDS) as here:
        await here.node.begin()
        saved = await here.node.save(1, [os.urandom(KIB)])
        ended, _ = await asyncio.wait([here.life], timeout=LONG_SECONDS)
        assert not ended
        assert here.daemon._state == "serving"
        may_end.set()
        await here.node.wait(saved)
        assert await here.life == ExitCode.OK
