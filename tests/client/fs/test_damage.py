"""Damage, and a daemon that is away, are errors of their own: never absence, never other bytes."""

import random
from pathlib import Path

import pytest

import forebay
from forebay.fs import DamagedFile, ForebayFileSystem, _Clients
from forebay.testing.blobs import flip_bit, replica_files
from forebay_server.testing.daemon import DaemonProcess

SHARD = "datasets/flowers/1/shard-00000.arrow"


def test_damaged_bytes_and_a_daemon_that_is_away(
    own_daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rpc = own_daemon.address()["rpc"]
    with forebay.connect(rpc) as client:
        with client.create_dataset("flowers", {"petals": "binary"}) as writer:
            writer.write(petals=random.Random(4).randbytes(5000))  # cannot be encoded smaller
        client.wait_version("flowers", 1, "remote")
    [stored] = replica_files(own_daemon.data)
    copies = [path for path in (own_daemon.data / "object" / "data").rglob("*") if path.is_file()]
    assert copies
    for file in (stored, *copies):
        flip_bit(file, 1000)
    for no_local in ("0", "1"):
        monkeypatch.setenv("FOREBAY_NO_LOCAL", no_local)
        check_damaged(ForebayFileSystem(rpc), tmp_path / "copy")
    own_daemon.kill()
    monkeypatch.setattr("forebay.fs._clients", _Clients())  # one that is connected waits a minute
    away = ForebayFileSystem(rpc, timeout=0.2)
    for look in (away.exists, away.isdir, away.isfile, away.find, away.ls, away.info):
        with pytest.raises(ConnectionError):
            look("datasets/flowers")
    with pytest.raises(ConnectionError):
        away.glob("datasets/*")


def check_damaged(fs: ForebayFileSystem, copy: Path) -> None:
    assert fs.exists(SHARD)  # it is there, and bad
    with fs.open(SHARD) as file:
        for read in (file.read, lambda: file.readinto(bytearray(2000)), file.map):
            with pytest.raises(DamagedFile, match="dataset flowers v1") as error:
                read()
            assert isinstance(error.value, OSError)
            assert isinstance(error.value, forebay.IntegrityError)
    with pytest.raises(OSError, match="blob"):
        fs.cat_file(SHARD)
    assert isinstance(fs.cat_ranges([SHARD], 0, 5)[0], DamagedFile)
    with pytest.raises(DamagedFile):
        fs.get(SHARD, str(copy))
    assert not copy.exists()
