"""A real S3 server for tests: SeaweedFS in processes of its own, killed and started again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

START_SECONDS: Final = 60.0
"""For each of the three processes, on a busy machine."""
POLL_SECONDS: Final = 0.05
HOST: Final = "127.0.0.1"
PORTS: Final = range(15_000, 22_000)
"""Below those that the kernel gives out by itself, also with the offset."""
GRPC_PORT_OFFSET: Final = 10_000
"""SeaweedFS's own: its parts find each other by it."""
KEY: Final = "testkey"
SECRET: Final = "testsecret"

_ACTIONS: Final = ["Admin", "Read", "Write", "List", "Tagging"]


class SeaweedFailed(AssertionError):
    """The server did not start; carries the ends of its logs."""


def seaweed_program() -> str | None:
    """The program ``weed``, also that of this environment; None if there is none."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return shutil.which("weed", path=path)


class SeaweedFS:
    """Master, volume server, and filer with S3, in one folder, on free ports of the loopback.

    A context manager. One after another: all in one process, the volume server misses the first
    election and the first object waits for five seconds. Not thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self._ports['s3']}"

    @property
    def metrics_url(self) -> str:
        """What the S3 server counted, as Prometheus reads it: calls and bytes of each bucket."""
        return f"http://{HOST}:{self._ports['metrics']}/metrics"

    def start(self) -> Self:
        """Start it, on its ports and with its data of before, and wait until S3 answers."""
        assert not self._processes, "it runs already"
        for name in ("master", "volume", "filer"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not self._ports:
            self._ports = _free_ports("master", "volume", "filer", "s3", "metrics")
        identity = {"accessKey": KEY, "secretKey": SECRET}
        users = [{"name": "test", "credentials": [identity], "actions": _ACTIONS}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": users}))
        self._start_master()
        self._start_volume()
        self._start_filer()
        return self

    def kill(self) -> None:
        """End it without warning; what it had acknowledged is there after the next start."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def _start_master(self) -> None:
        self._run(
            "master",
            f"-mdir={self.folder / 'master'}",
            "-volumeSizeLimitMB=1024",
            "-telemetry=false",
            "-electionTimeout=200ms",
            "-heartbeatInterval=50ms",
        )
        url = f"http://{HOST}:{self._ports['master']}/cluster/status"
        self._wait(lambda: b'"IsLeader":true' in _get(url), "elect a master")

    def _start_volume(self) -> None:
        self._run(
            "volume",
            f"-dir={self.folder / 'volume'}",
            "-max=50",
            f"-master={self._address('master')}",
            "-preStopSeconds=0",
        )
        url = f"http://{HOST}:{self._ports['master']}/dir/status"
        port = str(self._ports["volume"]).encode()
        self._wait(lambda: port in _get(url), "know its volume server")

    def _start_filer(self) -> None:
        self._run(
            "filer",
            f"-master={self._address('master')}",
            f"-defaultStoreDir={self.folder / 'filer'}",
            "-s3",
            f"-s3.port={self._ports['s3']}",
            f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-metricsPort={self._ports['metrics']}",
        )
        self._wait(lambda: bool(_get(self.endpoint)), "answer S3 calls")

    def _run(self, part: str, *arguments: str) -> None:
        program = seaweed_program()
        assert program is not None, "check seaweed_program() first"
        command = [
            program,
            "-logtostderr",
            "-v=-1",
            part,
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-port={self._ports[part]}",
            *arguments,
        ]
        with (self.folder / f"{part}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self._processes.append(process)

    def _address(self, part: str) -> str:
        return f"{HOST}:{self._ports[part]}"

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_done():
            ended = [process.args for process in self._processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                reason = f"{ended[0]!r} ended" if ended else f"not in {START_SECONDS} s"
                raise SeaweedFailed(f"SeaweedFS did not {what}: {reason}\n{self._log_tails()}")
            time.sleep(POLL_SECONDS)

    def _log_tails(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


def _get(url: str) -> bytes:
    """What the server answers, whatever the status; empty if nobody does."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own address
            return bytes(answer.read()) or b"-"
    except urllib.error.HTTPError as error:
        return error.read() or b"-"
    except OSError:
        return b""


def _free_ports(*names: str) -> dict[str, int]:
    """A free port for each of *names*, whose gRPC port, 10000 above, is free too."""
    with ExitStack() as held:
        ports: dict[str, int] = {}
        for number in random.sample(PORTS, len(PORTS)):
            with suppress(OSError):
                for port in (number, number + GRPC_PORT_OFFSET):
                    held.enter_context(socket.create_server((HOST, port)))
                ports[names[len(ports)]] = number
            if len(ports) == len(names):
                return ports
    raise SeaweedFailed(f"no {2 * len(names)} free ports")
