"""What is remote comes back from the object tier alone, bit for bit."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess, run_server


def recover(url: str, data: Path) -> subprocess.CompletedProcess[str]:
    return run_server("recover", url, "--data", data, "--json")


@pytest.fixture
def object_folder(tmp_path: Path) -> Path:
    """An object tier that holds a dataset of three versions with splits, and a run; nothing else.

    The second has a column more, the third a row.
    """
    data = tmp_path / "data"
    with DaemonProcess(data) as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        with client.create_dataset("d", schema={"x": "float32", "name": "string"}) as writer:
            for row in range(500):
                writer.write(x=row / 3, name=f"row {row}")
        client.dataset("d").define_splits({"train": 0.8, "test": 0.2}, seed=4)
        client.dataset("d").define_selection("listed", rows=range(7, 500, 3))
        client.dataset("d").define_selection("low", filter=[("x", "<", 10)])
        client.dataset("d").add_columns(lambda rows: {"half": rows["x"] / 2})
        with client.append_dataset("d") as writer:
            writer.write(x=-1.0, name="last", half=0.5)
        with forebay.Checkpointer(client, run="r") as checkpointer:
            checkpointer.save(3, state=state(3), metrics={"loss": 0.5}).wait("remote", timeout=60)
            checkpointer.save(6, state=state(6)).wait("remote", timeout=60)
        for version in (1, 2, 3):
            client.wait_version("d", version, "remote", timeout=60)
        for split in ("train", "test"):
            assert client.dataset("d", split=split).num_rows
        wait_for_idle(client)
    kept = tmp_path / "kept"
    shutil.move(data / "object", kept)
    shutil.rmtree(data)
    return kept


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(64, 1000, generator=generator), "n": torch.tensor(step)}


def wait_for_idle(client: forebay.Client) -> None:
    """Selections become remote by jobs of their own: wait until none is left."""
    import threading

    ticking = threading.Event()
    for _ in range(600):
        if not [job for job in client.status().jobs if job.state in ("queued", "running")]:
            return
        ticking.wait(0.1)
    pytest.fail("background work does not end")


def test_everything_remote_is_recovered(object_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "new"
    done = recover(f"file://{object_folder}", data)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()]
    with DaemonProcess(data) as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        assert client.datasets() == ["d"]
        first = client.dataset("d", version=1)
        batch = first.take(np.arange(500))
        assert np.array_equal(batch["x"], (np.arange(500) / 3).astype(np.float32))
        assert batch["name"] == [f"row {row}" for row in range(500)]
        assert client.dataset("d").num_rows == 501
        assert client.dataset("d", split="train").num_rows == 400
        expected = {"listed": range(7, 500, 3), "low": range(30)}
        for split, rows in expected.items():
            chosen = client.dataset("d", split=split)
            assert chosen.version == 2
            found = chosen.table()
            assert found.drop_columns("half").equals(first.table().take(list(rows)))
            assert np.array_equal(found["half"].to_numpy(), found["x"].to_numpy() / 2)
        assert client.dataset("d").take([0, 500], ["half"])["half"].tolist() == [0, 0.5]
        with forebay.Checkpointer(client, run="r") as checkpointer:
            resumed = checkpointer.restore("latest")
        assert resumed.step == 6
        assert all(torch.equal(resumed.state[name], value) for name, value in state(6).items())
        assert json.loads(client.checkpoints("r")[-1].metrics_json) == {"loss": 0.5}


def test_recovery_refuses_a_folder_in_use(object_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "new"
    assert recover(f"file://{object_folder}", data).returncode == 0
    again = recover(f"file://{object_folder}", data)
    assert again.returncode != 0
    assert "catalog" in again.stderr


def test_a_version_with_a_lost_piece_is_left_out_and_named(
    object_folder: Path, tmp_path: Path
) -> None:
    pieces = sorted((object_folder / "data").rglob("*"), key=lambda path: path.stat().st_size)
    next(path for path in reversed(pieces) if path.is_file()).unlink()
    data = tmp_path / "new"
    done = recover(f"file://{object_folder}", data)
    report = done.stdout + done.stderr
    with DaemonProcess(data) as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        generations = client.checkpoints("r")
        assert len(generations) == 1
        assert client.dataset("d").num_rows == 501
    missing = {3, 6} - {generations[0].step}
    assert f"1/{missing.pop()}" in report


@pytest.mark.parametrize("is_there", [False, True])
def test_a_mistyped_object_url_is_an_error_and_nothing_is_made_there(
    tmp_path: Path, is_there: bool
) -> None:
    wrong = tmp_path / "nowhere" / "at all"
    if is_there:
        wrong.mkdir(parents=True)
    done = recover(f"file://{wrong}", tmp_path / "new")
    assert done.returncode != 0
    assert str(wrong) in done.stderr
    assert "is the URL right" in done.stderr
    assert not any(wrong.iterdir()) if is_there else not wrong.parent.exists()


def test_an_object_url_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "manifests").symlink_to(tmp_path / "manifests")
    done = recover(f"file://{tmp_path}", tmp_path / "new")
    assert done.returncode != 0
    assert f"{tmp_path} failed listing manifests/" in done.stderr


def test_recovery_fences_the_data_folder_that_had_the_object_tier(tmp_path: Path) -> None:
    data, objects = tmp_path / "data", tmp_path / "objects"
    with DaemonProcess(data, "--object-url", f"file://{objects}") as daemon:
        with forebay.connect(daemon.address()["rpc"]) as client:
            with client.create_dataset("d", schema={"x": "float32"}) as writer:
                writer.write(x=1.0)
            client.wait_version("d", 1, "remote", timeout=60)
        daemon.terminate()
        assert recover(f"file://{objects}", tmp_path / "new").returncode == 0
        with DaemonProcess(tmp_path / "new") as second:
            daemon.start()
            assert daemon.wait_exit() != 0
            assert f"belongs to the data folder {tmp_path / 'new'}" in daemon.log()
            with forebay.connect(second.address()["rpc"]) as client:
                assert client.dataset("d").take([0])["x"].tolist() == [1.0]
