"""A PostgreSQL server of a test's own: started, killed, started again, with empty databases."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from forebay_wire.ids import new_random_name

START_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02
UNPRIVILEGED: Final = "nobody"
"""Who runs the server where the tests run as root, whom PostgreSQL refuses."""

GUARDED_USER: Final = "guarded"
"""The one user who needs a password, ``secret``; all others are trusted."""

SHARED: Final = "shared"

_EMPTY: Final = """
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT nspname FROM pg_namespace
        WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema'
    LOOP EXECUTE format('DROP SCHEMA %I CASCADE', name); END LOOP;
    CREATE SCHEMA public;
END $$
"""

_ACCESS: Final = f"local all {GUARDED_USER} scram-sha-256\nlocal all all trust\n"
_SETTINGS: Final = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "max_connections": "60",
    # A killed server process loses nothing by this; only a power cut would.
    "fsync": "off",
}


def find_program(name: str) -> str:
    """The newest ``initdb`` or ``postgres``; Debian keeps them off PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise FileNotFoundError(f"no {name} on this machine (Debian package postgresql)")
    return found


class PostgresqlServer:
    """One server on a Unix socket in a folder below /tmp. A context manager; not thread-safe."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """*settings* of the server that differ from those of tests."""
        self._settings = {**_SETTINGS, **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._has_shared = False

    def __enter__(self) -> Self:
        # Its user must be able to reach it, which pytest's own folders do not allow.
        self._folder = Path(tempfile.mkdtemp(prefix="forebay-pg-"))
        try:
            self._make_cluster()
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        assert self._folder is not None, "not entered"
        return self._folder

    def start(self) -> Self:
        """Start it and wait until it answers."""
        settings = [f"-c{name}={value}" for name, value in self._settings.items()]
        command = [find_program("postgres"), "-D", str(self.folder / "data"), "-k"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, str(self.folder), *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **_identity(),
            )
        deadline = time.monotonic() + START_SECONDS
        ready = [find_program("pg_isready"), "--quiet", "--host", str(self.folder)]
        while subprocess.run(ready, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL does not start:\n{self.log()}")
            time.sleep(POLL_SECONDS)
        return self

    def stop(self) -> None:
        """Break all connections and end at once, as a crash of the whole server does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_SECONDS)
            self._process = None

    def close(self) -> None:
        """Stop it and remove its folder. Idempotent."""
        self.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{new_random_name()}"
        self.run_sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def empty_database(self) -> str:
        """The URL of the one database that tests share in turn, emptied: faster than a new one."""
        if not self._has_shared:
            self.run_sql(f"CREATE DATABASE {SHARED}")
            self._has_shared = True
        self.run_sql(_EMPTY, SHARED)
        return self.url(SHARED)

    def url(self, database: str, user: str = "lab") -> str:
        """The URL of *database* for *user*."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def run_sql(self, statement: str, database: str = "postgres") -> str:
        """What psql answers, without decoration."""
        command = [find_program("psql"), "--no-psqlrc", "--quiet", "-At", "--host"]
        done = subprocess.run(
            [*command, str(self.folder), "--username", "lab", "--command", statement, database],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def log(self) -> str:
        """What the server wrote."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def _make_cluster(self) -> None:
        if os.geteuid() == 0:
            owner = pwd.getpwnam(UNPRIVILEGED)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        data = self.folder / "data"
        make = [find_program("initdb"), "--pgdata", str(data), "--username", "lab"]
        make += ["--auth", "trust", "--no-sync", "--data-checksums", "--encoding", "UTF8"]
        # An order of texts that is not that of their bytes: ours must not depend on it.
        make += ["--locale", "C.UTF-8", "--locale-provider", "icu", "--icu-locale", "en"]
        subprocess.run(
            make,
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            **_identity(),
        )
        (data / "pg_hba.conf").write_text(_ACCESS, encoding="ascii")


def _identity() -> dict[str, Any]:
    """For Popen: another user than root."""
    if os.geteuid() != 0:
        return {}
    owner = pwd.getpwnam(UNPRIVILEGED)
    return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
