"""The script of the first page and the examples run as they stand."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.warm import WarmPython

ROOT = Path(__file__).parents[2]
SCRIPT = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "data") as process:
        yield process


class ToFloat(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1) / 255


def test_script_of_the_first_page(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(daemon.data.parent)  # the script connects to "data/"
    [script] = SCRIPT.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)
    model = torch.nn.Sequential(ToFloat(), torch.nn.Linear(784, 10))
    names = {
        "samples": [(rng.integers(0, 256, (28, 28), dtype=np.uint8), i % 10) for i in range(2000)],
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(compile(script, "README.md", "exec"), names)  # noqa: S102 - our own page
    names["client"].close()
    assert names["step"] == 39  # 3 epochs of 1,600 samples in batches of 128
    assert "samples" in capsys.readouterr().out
    with forebay.connect(daemon.address()["rpc"]) as client:
        assert [one.step for one in client.checkpoints("mnist-cnn")] == [20]


def test_script_of_the_page_about_the_data_s_way(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(daemon.data.parent)
    page = "docs/data-path.md"
    [script] = SCRIPT.findall((ROOT / page).read_text(encoding="utf-8"))
    positions: list[int] = []
    names: dict[str, Any] = {
        "weights": [number % 10 for number in range(500)],
        "train": lambda batch: positions.append(names["plan"].position + len(batch["label"])),
    }
    with forebay.connect(daemon.address()["rpc"]) as client:
        with client.create_dataset("mnist", {"label": "int64"}) as writer:
            for number in range(500):
                writer.write(label=number)
        exec(compile(script, page, "exec"), names)  # noqa: S102 - our own page
        names["client"].close()
        assert positions == list(range(100, 2001, 100))
        assert (names["plan"].position, names["plan"].problem) == (2000, "")


def test_scripts_of_the_page_about_the_loader(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(daemon.data.parent)
    page = "docs/loader.md"
    scripts = SCRIPT.findall((ROOT / page).read_text(encoding="utf-8"))
    kit = [number for number, script in enumerate(scripts) if "conformance" in script]
    with forebay.connect(daemon.address()["rpc"]) as client:
        image = np.arange(784, dtype=np.uint8).reshape(28, 28)
        with client.create_dataset("mnist") as writer:
            for number in range(300):
                writer.write(image=image, label=number % 10)
    first: dict[str, Any] = {}
    for script in scripts[:2]:
        exec(compile(script, page, "exec"), first)  # noqa: S102 - our own page
    assert float(first["loss"].detach()) > 0.0
    assert next(iter(first["loader"]))["image"].max() == 1.0
    last: dict[str, Any] = {}
    for script in scripts[kit[0] : kit[0] + 2]:
        exec(compile(script, page, "exec"), last)  # noqa: S102 - our own page
    for client in (first["client"], last["client"]):
        client.close()


def test_script_of_the_page_about_files(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(daemon.data.parent)
    page = "docs/files.md"
    [script] = SCRIPT.findall((ROOT / page).read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with forebay.connect(daemon.address()["rpc"]) as client:
        with client.create_dataset("flowers", {"petals": "int64"}) as writer:
            for number in range(500):
                writer.write(petals=number)
        with forebay.Checkpointer(client, "cnn", model=model) as checkpointer:
            checkpointer.save(1).wait("local", timeout=60)
        exec(compile(script, page, "exec"), names)  # noqa: S102 - our own page
    assert "shard-00000.arrow" in capsys.readouterr().out
    assert names["frame"]["petals"].tolist() == list(range(500))
    assert names["table"]["petals"].to_pylist() == list(range(500))
    assert np.array_equal(names["array"], model[0].weight.detach().numpy())
    assert (daemon.data.parent / "copy" / "packs" / "rank-00000.pack").exists()


def test_script_of_the_page_about_zarr(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "docs/zarr.md"
    monkeypatch.chdir(daemon.data.parent)  # the script connects to "data/"
    names: dict[str, Any] = {}
    for script in SCRIPT.findall((ROOT / page).read_text(encoding="utf-8")):
        exec(compile(script, page, "exec"), names)  # noqa: S102 - our own page
    printed = capsys.readouterr().out.split("\n")
    assert printed[:2] == ["version 1", "version 2"]
    assert printed[3:-1] == ["(16, 36, 72)"] * 15
    assert abs(float((names["new"][:] - names["old"][:]).mean()) - 0.15) < 1e-3


RunExample = Callable[..., str]


@pytest.fixture
def run_example(warm_torch: WarmPython) -> RunExample:
    def run(name: str, *arguments: str) -> str:
        done = warm_torch.run([ROOT / "examples" / name, *arguments], timeout=110)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_training_example_goes_on_where_it_was(
    daemon: DaemonProcess, run_example: RunExample
) -> None:
    arguments = ("--data", str(daemon.data), "--epochs", "1")
    first = run_example("train_mnist.py", *arguments)
    assert "starting at step 0" in first
    assert "test accuracy" in first
    assert "starting at step 20" in run_example("train_mnist.py", *arguments)


def test_import_example(daemon: DaemonProcess, tmp_path: Path, run_example: RunExample) -> None:
    table = tmp_path / "flowers.csv"
    table.write_text("name,petals\nrose,5\nlily,6\n", encoding="utf-8")
    run_example("import_csv.py", "flowers", str(table), "--data", str(daemon.data))
    with forebay.connect(daemon.address()["rpc"]) as client:
        batch = client.dataset("flowers").take([0, 1])
        assert batch["name"] == ["rose", "lily"]
        assert batch["petals"].tolist() == [5, 6]


def test_text_example_makes_the_same_again(daemon: DaemonProcess, run_example: RunExample) -> None:
    first = run_example("augment_text.py", "reviews", "--data", str(daemon.data))
    again = run_example("augment_text.py", "others", "--data", str(daemon.data))
    lines = [line for line in first.splitlines() if line.startswith("epoch")]
    assert sorted(lines) == sorted(again.splitlines()[1:])
    with forebay.connect(daemon.address()["rpc"]) as client:
        dataset = client.dataset("reviews")
        assert len(lines) == 2 * len(dataset)
        rows = dataset.take(range(len(dataset)))
    sources, labels, texts = rows["source"].tolist(), rows["label"].tolist(), rows["text"]
    assert sources[:4] == [0, 1, 2, 3]
    assert len(sources) > 8
    assert all(label == labels[source] for label, source in zip(labels, sources, strict=True))
    assert len(set(texts)) == len(texts)
    by_epoch = [{line[9:] for line in lines if line.startswith(f"epoch {n}")} for n in (0, 1)]
    assert by_epoch[0] != by_epoch[1], "texts are rewritten anew each epoch"


def test_script_of_the_page_about_managing_checkpoints(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(daemon.data.parent)
    page = "docs/checkpoints/managing.md"
    [script] = SCRIPT.findall((ROOT / page).read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(script, page, "exec"), names)  # noqa: S102 - our own page
    names["client"].close()
    assert names["kept"] == [2000, 1900, 1800, 1000, 300]
    assert (names["resumed"].run, names["resumed"].step) == ("base", 300)
