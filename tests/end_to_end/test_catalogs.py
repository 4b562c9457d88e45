"""A daemon on a catalog in PostgreSQL, and a catalog restored from a backup."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess, run_server
from forebay_server.testing.postgresql import PostgresqlServer

ROWS = 200


def write(client: forebay.Client, name: str) -> None:
    with client.create_dataset(name, schema={"row": "int64"}) as writer:
        for row in range(ROWS):
            writer.write(row=row)


def check(client: forebay.Client, name: str) -> None:
    found = client.dataset(name).take(np.arange(ROWS))
    assert np.array_equal(found["row"], np.arange(ROWS))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


class TestPostgresql:
    """All with a server of the test's own, which it may stop."""

    pytestmark = pytest.mark.needs("initdb", "postgres", package="postgresql")

    @pytest.fixture
    def server(self) -> Iterator[PostgresqlServer]:
        with PostgresqlServer() as started:
            yield started

    @pytest.fixture
    def daemon(self, server: PostgresqlServer, data: Path) -> Iterator[DaemonProcess]:
        with DaemonProcess(data, "--catalog", server.new_database()) as started:
            yield started

    def test_what_is_committed_survives_the_end_of_daemon_and_server(
        self, server: PostgresqlServer, daemon: DaemonProcess, data: Path
    ) -> None:
        with forebay.connect(daemon.address()["rpc"]) as client:
            write(client, "first")
        daemon.restart()
        with forebay.connect(daemon.address()["rpc"]) as client:
            check(client, "first")
            server.stop()
            again = threading.Timer(1.0, server.start)
            again.start()
            check(client, "first")  # waits for the server
            again.join()
            write(client, "second")
        daemon.kill()
        server.stop()
        server.start()
        daemon.start().wait_ready()
        with forebay.connect(daemon.address()["rpc"]) as client:
            check(client, "first")
            check(client, "second")
        assert not list(data.glob("catalog.sqlite*"))

    def test_a_second_daemon_on_the_same_catalog_is_refused(
        self, daemon: DaemonProcess, tmp_path: Path
    ) -> None:
        url = daemon.arguments[-1]
        second = run_server("serve", "--data", str(tmp_path / "other"), "--catalog", url)
        assert second.returncode == 3
        assert "another daemon has the catalog" in second.stderr
        advised = run_server("backup", str(tmp_path / "x"), "--catalog", url)
        assert advised.returncode == 2
        assert "pg_dump --format=custom" in advised.stderr


def test_a_backup_taken_while_a_daemon_serves_can_be_restored(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved.sqlite"
    with DaemonProcess(data) as daemon:
        with forebay.connect(daemon.address()["rpc"]) as client:
            write(client, "kept")
            saved = run_server("backup", str(target), "--data", str(data), "--json")
            assert saved.returncode == 0, saved.stderr
            assert json.loads(saved.stdout)["bytes"] == target.stat().st_size
            write(client, "later")
        daemon.terminate()
        for file in data.glob("catalog.sqlite*"):
            file.unlink()
        shutil.copy(target, data / "catalog.sqlite")
        daemon.start().wait_ready()
        with forebay.connect(daemon.address()["rpc"]) as client:
            assert list(client.datasets()) == ["kept"]
            check(client, "kept")
            write(client, "later")
            check(client, "later")
