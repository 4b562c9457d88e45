"""One flipped bit or a truncation anywhere: another replica serves, or an error names the place."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import forebay
from forebay_server.testing.daemon import DaemonFailed, DaemonProcess, run_server
from forebay_wire.segments import TRAILER, decode_trailer

ROWS = 256


@pytest.fixture(params=["local", "http"])
def daemon(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DaemonProcess]:
    if request.param == "http":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    # Raw, so that each part of a copy can be damaged; encoded ones: test_encodings.
    with DaemonProcess(tmp_path / "data", "--object-encoding", "raw") as process:
        yield process


def write(client: forebay.Client) -> None:
    with client.create_dataset("d", schema={"x": forebay.Array("uint8", (4096,))}) as writer:
        for row in range(ROWS):
            writer.write(x=np.full(4096, row, dtype=np.uint8))


def read(client: forebay.Client) -> None:
    found = client.dataset("d").take(np.arange(ROWS))["x"]
    assert np.array_equal(found[:, 0], np.arange(ROWS, dtype=np.uint8))
    assert (found == found[:, :1]).all()


def files_of(data: Path, tier: str) -> list[Path]:
    return [path for path in (data / tier / "files").rglob("*") if path.is_file()]


def damage(path: Path, kind: str) -> None:
    """Damage a blob file in the way that *kind* says."""
    content = bytearray(path.read_bytes())
    table_offset, _ = decode_trailer(content[-TRAILER.size :], str(path))
    places = {
        "first byte of the data": 0,
        "middle of the data": table_offset // 2,
        "last byte of the data": table_offset - 1,
        "segment table": table_offset + 40,
        "trailer": len(content) - 20,
    }
    path.chmod(0o600)
    if kind in places:
        content[places[kind]] ^= 1 << 3
        path.write_bytes(content)
    elif kind == "cut in the data":
        path.write_bytes(content[: table_offset // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


KINDS = [
    "first byte of the data",
    "middle of the data",
    "last byte of the data",
    "segment table",
    "cut in the data",
    "empty",
    "gone",
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_with_another_replica_is_healed(kind: str, daemon: DaemonProcess) -> None:
    with forebay.connect(daemon.address()["rpc"]) as client:
        write(client)
        client.wait_version("d", 1, "remote", timeout=60)
        for path in files_of(daemon.data, "ssd"):
            damage(path, kind)
        read(client)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_everywhere_is_an_error_that_names_the_place(
    kind: str, daemon: DaemonProcess
) -> None:
    with forebay.connect(daemon.address()["rpc"]) as client:
        write(client)
        blob = client.dataset("d").manifest.shards[0].blob
        client.wait_version("d", 1, "remote", timeout=60)
        copies = [path for path in (daemon.data / "object" / "data").rglob("*") if path.is_file()]
        for path in (*files_of(daemon.data, "ssd"), *copies):
            damage(path, kind)
        if kind == "segment table":  # the object tier has it once more, with the extent list
            read(client)
            return
        with pytest.raises(forebay.IntegrityError) as caught:
            read(client)
    assert blob in str(caught.value)
    assert "dataset d v1" in str(caught.value)


def test_a_damaged_manifest_in_the_object_tier_is_not_recovered(
    tmp_path: Path, daemon: DaemonProcess
) -> None:
    with forebay.connect(daemon.address()["rpc"]) as client:
        write(client)
        client.wait_version("d", 1, "remote", timeout=60)
    daemon.terminate()
    kept = tmp_path / "kept"
    shutil.copytree(daemon.data / "object", kept)
    (manifest,) = [path for path in (kept / "manifests").rglob("*") if path.is_file()]
    content = bytearray(manifest.read_bytes())
    content[-2] ^= 1
    manifest.chmod(0o600)
    manifest.write_bytes(content)
    done = run_server("recover", f"file://{kept}", "--data", tmp_path / "new")
    assert manifest.name in done.stdout + done.stderr
    try:
        with DaemonProcess(tmp_path / "new") as second:
            assert forebay.connect(second.address()["rpc"]).datasets() == []
    except DaemonFailed:
        assert done.returncode != 0
