"""Damage that one of four ranks meets, and what reading for other ranks costs the disk."""

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess

ALONE = ("--hdd-path", "none", "--object-url", "none")
"""One copy of everything: nothing mends what is damaged."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("alone") / "data", *ALONE) as daemon:
        yield daemon


@pytest.mark.parametrize(
    "kind", ["flipped", pytest.param("cut short", marks=pytest.mark.slow), "gone"]
)
def test_four_ranks_go_back_together_though_one_alone_meets_the_damage(
    alone: DaemonProcess, pool: Any, kind: str
) -> None:
    run = f"run-{kind.replace(' ', '-')}"
    address = alone.address()["rpc"]
    base = 100.0 * len(kind)
    told = {"run": run, "kind": kind, "data": str(alone.data), "base": base}
    pool.run("damaged", 4, address, **told, saves=True)
    alone.restart()
    pool.run("damaged", 4, address, **told, saves=False)
    with forebay.connect(address) as client:
        copies = client.why(f"run {run}").copies
    assert sum(one.num_blobs for one in copies if one.state == "quarantined") == 1


def test_a_damaged_manifest_is_passed_over(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with DaemonProcess(data, *ALONE), forebay.connect(data) as client:
        state = {"w": torch.ones(1000)}
        checkpointer = forebay.Checkpointer(client, "run")
        for step in (1, 2):
            checkpointer.save(step, state={"w": state["w"] * step}).wait("local", 60)
        (newest,) = [one for one in client.checkpoints("run") if one.step == 2]
        (catalog,) = data.rglob("catalog.sqlite")
        with sqlite3.connect(catalog, timeout=30) as connection:
            connection.create_function("forebay_row", -1, lambda *row: 0)  # what triggers call
            ((body,),) = connection.execute(
                "SELECT data FROM manifests WHERE manifest = ?", (newest.manifest,)
            ).fetchall()
            spoilt = bytes([*body[:40], body[40] ^ 1, *body[41:]])
            connection.execute(
                "UPDATE manifests SET data = ? WHERE manifest = ?", (spoilt, newest.manifest)
            )
        connection.close()
        found = checkpointer.restore()
        assert found is not None
        assert (found.step, [one.step for one in found.skipped]) == (1, [2])
        assert found.state["w"].unique().tolist() == [1.0]
        checkpointer.close()


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [0, 1], ids=["rows", "columns"])
def test_eight_ranks_read_each_byte_of_two_from_the_disk_once(
    alone: DaemonProcess, pool: Any, tmp_path: Path, dimension: int
) -> None:
    run, address = f"cut-{dimension}", alone.address()["rpc"]
    shape = [32768, 1024]  # two shards of 64 MiB
    arguments = {"run": run, "shape": shape, "dimension": 0, "folder": str(tmp_path)}
    pool.run("resharded", 2, address, **arguments, saves=True)
    alone.restart()  # else its memory serves
    before = {path: path.stat().st_size for path in alone.data.rglob("*") if path.is_file()}
    for path in before:
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    daemon_before = _read_bytes(alone.pid)
    pool.run("resharded", 8, address, **{**arguments, "dimension": dimension}, saves=False)
    told = [json.loads(path.read_text()) for path in tmp_path.glob(f"*-{dimension}.json")]
    assert len(told) == 8
    needed = sum(one[1] for one in told)
    assert needed == 4 * shape[0] * shape[1]
    read = sum(one[0] for one in told) + _read_bytes(alone.pid) - daemon_before
    if not read:
        pytest.skip("this file system does not count reads, or could not drop its cache")
    assert read <= 1.1 * needed


def _read_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
