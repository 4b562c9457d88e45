"""System calls of a running daemon fail: an error or a success, and never half of anything."""

import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.power import Call, parse

pytestmark = pytest.mark.needs("strace", package="strace")

RUN = "r"
TRACED = "openat,close,pwrite64,fsync,fdatasync,ftruncate,fallocate,link,linkat"


@contextmanager
def injected(daemon: DaemonProcess, trace: Path, fault: str) -> Iterator[None]:
    """While this lasts the *fault* (strace's words) hits each of the daemon's threads."""
    command = ["strace", "-f", "-ttt", "-T", "-xx", "-s", "0", "-p", str(daemon.pid)]
    command += ["-e", f"trace={TRACED}", "-e", f"inject={fault}", "-o", str(trace)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracing:
        assert tracing.stderr is not None
        line = tracing.stderr.readline()
        if "not permitted" in line:
            pytest.skip(f"this machine forbids to trace a process: {line.strip()}")
        assert "attached" in line, line
        try:
            yield
        finally:
            tracing.terminate()
            tracing.stderr.read()


def state_at(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((50_000,), float(step))}


def save(client: forebay.Client, step: int) -> None:
    with forebay.Checkpointer(client, run=RUN) as checkpointer:
        checkpointer.restore("latest", missing_ok=True)
        checkpointer.save(step, state=state_at(step)).wait("local", timeout=20)


def check_retries(trace: Path, calls: list[Call]) -> None:
    """No descriptor was fsynced again after a failed fsync, nor written."""
    failed = set()
    text = trace.read_text("ascii")
    for line in text.splitlines():
        closing = re.search(r"\bclose\((\d+)", line)
        if closing is not None:  # its number may be given out again at once
            failed.discard(int(closing[1]))
        done = re.search(r"(\w+)\((\d+).*= (-?\d+)", line)
        if done is None:
            continue
        name, descriptor, result = done[1], int(done[2]), int(done[3])
        if descriptor in failed:
            assert name not in ("fsync", "fdatasync", "pwrite64", "ftruncate"), line
        if name in ("fsync", "fdatasync") and result < 0:
            failed.add(descriptor)
    # Where the catalog's call was the first one, the daemon has ended at once.
    assert calls or "+++ exited" in text, "nothing was recorded"


def run_restarting(daemon: DaemonProcess, action: Callable[[], object]) -> bool:
    """Whether *action* ended well. A daemon that stops meanwhile, as one does whose catalog cannot
    be written, is started again: its clients wait for it."""
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - looked at below
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        assert daemon.process is not None
        if daemon.process.poll() is not None:
            daemon.start().wait_ready()
    (error,) = outcome
    if error is not None:
        assert isinstance(error, forebay.ForebayError), error
        assert len(str(error)) > 20, "it does not say what"
    return error is None


@pytest.mark.parametrize(
    "fault",
    [
        "fsync:error=EIO:when=1",
        "fsync:error=EIO:when=2",
        "fsync:error=ENOSPC:when=1",
        "link:error=EIO:when=1",
        "link:error=ENOSPC:when=1",
        "fallocate:error=ENOSPC:when=1",
        "ftruncate:error=EIO:when=1",
        "pwrite64:error=EIO:when=1",
        "pwrite64:error=ENOSPC:when=2",
        "fdatasync:error=EIO:when=1",
    ],
)
def test_a_failing_call_costs_an_error_and_nothing_else(
    fault: str,
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    write_rows: Callable[[forebay.Client, str, int], None],
    check_rows: Callable[[forebay.Client, str, int], None],
    tmp_path: Path,
) -> None:
    daemon.start().wait_ready()
    trace = tmp_path / "trace"
    done = []
    with connect() as client:
        write_rows(client, "before", 1)
        save(client, 1)
        with injected(daemon, trace, fault):
            for what, action in (
                ("rows", lambda: write_rows(client, "during", 2)),
                ("step", lambda: save(client, 2)),
            ):
                if run_restarting(daemon, action):
                    done.append(what)
    assert "INJECTED" in trace.read_text("ascii"), "no call was hit"
    check_retries(trace, parse(trace))
    daemon.kill()
    daemon.start().wait_ready()
    with connect() as client:
        check_rows(client, "before", 1)
        if "rows" in done:
            check_rows(client, "during", 2)
        write_rows(client, "after", 3)
        check_rows(client, "after", 3)
        with forebay.Checkpointer(client, run=RUN) as checkpointer:
            resumed = checkpointer.restore("latest")
        assert resumed is not None
        assert resumed.step == 2 or "step" not in done
        assert torch.equal(resumed.state["weight"], state_at(resumed.step)["weight"])


SHORT_WRITES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

/* Every third write of a regular file takes its first half only, as the kernel may at any time. */
static unsigned calls;

static size_t shortened(int fd, size_t count) {
    struct stat found;
    if (count < 2 || fstat(fd, &found) || !S_ISREG(found.st_mode)) return count;
    return __sync_add_and_fetch(&calls, 1) % 3 ? count : (count / 2 + 511) & ~511ul;
}

ssize_t pwrite64(int fd, const void *data, size_t count, off_t offset) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (!next) next = dlsym(RTLD_NEXT, "pwrite64");
    size_t some = shortened(fd, count);
    return next(fd, data, some < count ? some : count, offset);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) {
    return pwrite64(fd, data, count, offset);
}

ssize_t write(int fd, const void *data, size_t count) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    size_t some = shortened(fd, count);
    return next(fd, data, some < count ? some : count);
}
"""


@pytest.mark.needs("gcc", package="gcc")
def test_short_writes_are_gone_on_with(
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    write_rows: Callable[[forebay.Client, str, int], None],
    check_rows: Callable[[forebay.Client, str, int], None],
    tmp_path: Path,
) -> None:
    source, shim = tmp_path / "short.c", tmp_path / "short.so"
    source.write_text(SHORT_WRITES)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    daemon.start(environment={"LD_PRELOAD": str(shim)}).wait_ready()
    with connect() as client:
        write_rows(client, "rows", 1)
        save(client, 1)
    daemon.kill()
    daemon.start().wait_ready()
    with connect() as client:
        check_rows(client, "rows", 1)
        with forebay.Checkpointer(client, run=RUN) as checkpointer:
            resumed = checkpointer.restore("latest")
        assert resumed is not None
        assert torch.equal(resumed.state["weight"], state_at(1)["weight"])


def test_a_catalog_that_cannot_be_written_stops_the_daemon(
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    in_background: Callable[[Callable[[], Any]], Callable[[], Any]],
    tmp_path: Path,
) -> None:
    """What a failed commit has left in the log is unknown: only a new start can tell."""
    daemon.start().wait_ready()
    with connect() as client:
        save(client, 1)
        with injected(daemon, tmp_path / "trace", "fdatasync:error=EIO:when=1+"):
            outcome = in_background(lambda: save(client, 2))
            assert daemon.wait_exit(60) > 0
        daemon.start().wait_ready()
        failed = isinstance(outcome(), forebay.ForebayError)
        steps = {one.step for one in client.checkpoints(RUN) if one.state == "committed"}
        assert steps == {1, 2} or (failed and steps == {1})
        save(client, 3)
