"""What ``forebay doctor`` looks at: each check is a function that answers a finding."""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import resource
import socket
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

from forebay.cli.output import size
from forebay_wire.limits import GIB, KIB, MAX_OPEN_BLOBS_PER_CLIENT, MAX_UNIX_PATH_BYTES, MIB

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


SLOW_FSYNC_SECONDS: Final = 0.02
SAFE_SQLITE: Final = (3, 51, 3)
OLDEST_SQLITE: Final = (3, 35, 0)
DEFAULT_MAP_COUNT: Final = 65530
NETWORK_FILE_SYSTEMS: Final = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "lustre", "gpfs", "ceph")
REQUIRED: Final = ("blake3", "click", "grpcio", "numpy", "protobuf", "pyarrow", "rich", "xxhash")
DAEMON: Final = ("aiohttp", "sqlalchemy", "fsspec", "prometheus-client")
TORCH: Final = ("torch",)


def run_checks(folder: Path) -> Iterator[Finding]:
    """All findings about this machine, for a data folder at *folder* (which need not exist)."""
    for check in (python, packages, kernel, sqlite, open_files, mappings, memory, shared_memory):
        yield check()
    for check_folder in (file_system, space, fsync, direct_io, sockets, daemon):
        yield _guarded(check_folder, folder)


def _guarded(check: Callable[[Path], Finding], folder: Path) -> Finding:
    try:
        return check(folder)
    except OSError as error:
        return Finding(check.__name__, "fail", f"{error}", "see that the folder can be written")


def python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}")


def packages() -> Finding:
    """Versions of what the client needs; what the daemon and training need is only shown."""
    versions = {name: _version(name) for name in ("forebay", *REQUIRED, *DAEMON, *TORCH)}
    shown = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    missing = [name for name in REQUIRED if versions[name] is None]
    if missing:
        return Finding("packages", "fail", shown, f"pip install {' '.join(missing)}")
    if any(versions[name] is None for name in DAEMON):
        advice = "no daemon can run here: pip install 'forebay[server]'"
        return Finding("packages", "warn", shown, advice)
    if versions["torch"] is None:
        advice = "DataLoader and Checkpointer need PyTorch: pip install 'forebay[torch]'"
        return Finding("packages", "warn", shown, advice)
    return Finding("packages", "ok", shown)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def kernel() -> Finding:
    release = platform.release()
    numbers = release.split("-")[0].split(".")
    if platform.system() != "Linux":
        return Finding("kernel", "fail", platform.system(), "the daemon needs Linux")
    if tuple(int(number) for number in numbers[:2]) < (5, 14):
        advice = "without MADV_POPULATE_READ (Linux 5.14) a bad disk page ends the reading process"
        return Finding("kernel", "warn", release, advice)
    return Finding("kernel", "ok", release)


def sqlite() -> Finding:
    found = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        return Finding("sqlite", "fail", found, "the catalog needs SQLite 3.35 or newer")
    if sqlite3.sqlite_version_info < SAFE_SQLITE:
        note = (
            "has the WAL-reset bug (fixed in 3.51.3), which needs two connections that write or "
            "checkpoint: the daemon uses one for both, so its catalog is safe; open it with other "
            "programs read-only"
        )
        return Finding("sqlite", "ok", f"{found}: {note}")
    return Finding("sqlite", "ok", found)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"soft {_limit(soft)}, hard {_limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < 2 * MAX_OPEN_BLOBS_PER_CLIENT:
        advice = f"raise it (ulimit -n 4096): a client opens up to {MAX_OPEN_BLOBS_PER_CLIENT}"
        return Finding("open files", "fail" if soft < 256 else "warn", found, advice)
    return Finding("open files", "ok", found)


def mappings() -> Finding:
    try:
        count = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return Finding("mappings", "warn", "vm.max_map_count cannot be read")
    if count < DEFAULT_MAP_COUNT:
        advice = f"sysctl vm.max_map_count={DEFAULT_MAP_COUNT}: every open shard is a mapping"
        return Finding("mappings", "warn", f"vm.max_map_count {count}", advice)
    return Finding("mappings", "ok", f"vm.max_map_count {count}")


def memory() -> Finding:
    """Physical memory, the cgroup's limit (page cache and slots count), RLIMIT_AS."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_limit()
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    found = (
        f"{size(physical)} in the machine, cgroup {'no limit' if limit is None else size(limit)}"
    )
    if address_space != resource.RLIM_INFINITY:
        advice = "mapped files count towards it: ulimit -v unlimited"
        return Finding("memory", "warn", f"{found}, RLIMIT_AS {size(address_space)}", advice)
    if min(physical, limit or physical) < 2 * GIB:
        advice = "checkpoints wait in shared memory before they are written: small models only"
        return Finding("memory", "warn", found, advice)
    return Finding("memory", "ok", found)


def _cgroup_limit() -> int | None:
    """The smallest memory limit from this process's cgroup up to the root; None: no limit."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version_one = "memory" in controllers.split(",")
        if controllers and not version_one:
            continue
        root = Path("/sys/fs/cgroup/memory" if version_one else "/sys/fs/cgroup")
        name = "memory.limit_in_bytes" if version_one else "memory.max"
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # "max", or a level without this controller
                continue
    real = [limit for limit in limits if limit < 1 << 60]  # version one's way to say: no limit
    return min(real, default=None)


def shared_memory() -> Finding:
    """memfd with seals is what slots are made of; /dev/shm is what torch's workers use."""
    try:
        descriptor = os.memfd_create("forebay-doctor", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        finally:
            os.close(descriptor)
    except (OSError, AttributeError) as error:
        advice = "slots for checkpoints need memfd_create with seals"
        return Finding("shared memory", "fail", f"memfd: {error}", advice)
    try:
        found = os.statvfs("/dev/shm")  # noqa: S108 - only measured
    except OSError:
        return Finding("shared memory", "warn", "memfd works, no /dev/shm", "mount a tmpfs there")
    num_bytes = found.f_frsize * found.f_blocks
    if num_bytes < GIB:
        advice = "torch DataLoader workers pass batches through it: docker run --shm-size=4g"
        return Finding("shared memory", "warn", f"{size(num_bytes)} in /dev/shm", advice)
    return Finding("shared memory", "ok", f"memfd works, {size(num_bytes)} in /dev/shm")


def file_system(folder: Path) -> Finding:
    kind = _file_system_of(_existing(folder))
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        advice = "the catalog and its lock need a local disk: put the data folder on one"
        return Finding("file system", "fail", f"{folder} is on {kind}", advice)
    if kind in ("tmpfs", "overlay"):
        advice = "what is here is gone with the machine or container: use a real volume"
        return Finding("file system", "warn", f"{folder} is on {kind}", advice)
    return Finding("file system", "ok", f"{folder} is on {kind}")


def _file_system_of(folder: Path) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
        _, mount, found = line.split(" ")[:3]
        prefix = mount.rstrip("/") + "/"
        if f"{folder}/".startswith(prefix) and len(prefix) >= len(best):
            best, kind = prefix, found
    return kind


def space(folder: Path) -> Finding:
    found = os.statvfs(_existing(folder))
    free, total = found.f_frsize * found.f_bavail, found.f_frsize * found.f_blocks
    shown = f"{size(free)} free of {size(total)}"
    if free < GIB:
        return Finding("space", "warn", shown, "datasets and checkpoints lie here: make room")
    return Finding("space", "ok", shown)


def fsync(folder: Path) -> Finding:
    """Median of some small durable writes."""
    times = []
    with _scratch(folder) as path:
        descriptor = os.open(path, os.O_RDWR)
        try:
            for number in range(20):
                started = time.perf_counter()
                os.pwrite(descriptor, os.urandom(4 * KIB), number * 4 * KIB)
                os.fsync(descriptor)
                times.append(time.perf_counter() - started)
        finally:
            os.close(descriptor)
    median = statistics.median(times)
    shown = f"{median * 1000:.2f} ms for 4 KiB (median of {len(times)})"
    if median > SLOW_FSYNC_SECONDS:
        advice = "commits take that long: a disk with power-loss protection is faster"
        return Finding("fsync", "warn", shown, advice)
    return Finding("fsync", "ok", shown)


def direct_io(folder: Path) -> Finding:
    with _scratch(folder) as path:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            return _no_direct_io(error)
        try:
            with mmap.mmap(-1, MIB) as buffer:  # page-aligned
                os.pwrite(descriptor, buffer, 0)
        except OSError as error:
            return _no_direct_io(error)
        finally:
            os.close(descriptor)
    return Finding("direct io", "ok", "O_DIRECT works")


def _no_direct_io(error: OSError) -> Finding:
    advice = "large writes go through the page cache instead: slower beside training, still safe"
    return Finding("direct io", "warn", f"O_DIRECT: {error.strerror}", advice)


def sockets(folder: Path) -> Finding:
    """Where the daemon's sockets lie, that one can be bound there, that descriptors travel."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path(runtime) if runtime else Path(tempfile.gettempdir())
    shown = f"XDG_RUNTIME_DIR {runtime}" if runtime else f"no XDG_RUNTIME_DIR, so below {base}"
    longest = len(os.fsencode(base / "forebay-0123456789abcdef" / "data.sock"))
    if longest > MAX_UNIX_PATH_BYTES:
        advice = f"socket paths end at {MAX_UNIX_PATH_BYTES} bytes: set a shorter XDG_RUNTIME_DIR"
        return Finding("sockets", "fail", shown, advice)
    try:
        with tempfile.TemporaryDirectory(prefix="forebay-", dir=base) as temporary:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
                bound.bind(f"{temporary}/s")
            _pass_descriptor()
    except OSError as error:
        advice = "set XDG_RUNTIME_DIR to a folder of your own, or use FOREBAY_NO_LOCAL=1"
        return Finding("sockets", "fail", f"{shown}: {error}", advice)
    return Finding("sockets", "ok", f"{shown}; descriptors can be handed over")


def _pass_descriptor() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        socket.send_fds(left, [b"x"], [left.fileno()])
        _, descriptors, _, _ = socket.recv_fds(right, 1, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        if not descriptors:
            raise OSError("no descriptor arrived")


def daemon(folder: Path) -> Finding:
    from forebay.daemon_folder import find, is_data_folder

    found = find(folder)
    if found is not None:
        return Finding("daemon", "ok", f"answers for {folder} (node {found.hello.node})")
    if is_data_folder(folder):
        return Finding("daemon", "ok", f"none runs for {folder}; the next client starts one")
    return Finding("daemon", "ok", f"{folder} is no data folder yet")


def _existing(folder: Path) -> Path:
    """*folder*, or what exists of its parents."""
    folder = folder.absolute()
    return next((one for one in (folder, *folder.parents) if one.is_dir()), Path("/"))


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(prefix=".forebay-doctor-", dir=_existing(folder)) as file:
        yield Path(file.name)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
