"""A fine-tuning run in bfloat16, saved often: stored as differences, restored bit for bit."""

from __future__ import annotations

import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import forebay
from forebay_server.model.extents import ObjectBlob
from forebay_server.publish.recovery import recover
from forebay_server.testing.daemon import DaemonProcess

NUM_SAVES = 5


def states() -> list[dict[str, torch.Tensor]]:
    """Weights whose float32 masters move a little from one to the next, and what does not move."""
    generator = torch.Generator().manual_seed(3)
    masters = torch.randn(512, 1024, generator=generator) * 0.02
    frozen = torch.randn(128, 1024, generator=generator)
    found = []
    for step in range(NUM_SAVES):
        found.append(
            {"weight": masters.to(torch.bfloat16), "frozen": frozen, "step": torch.tensor(step)}
        )
        masters = masters + torch.randn(512, 1024, generator=generator) * 1e-5
    return found


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(other[name], value) for name, value in state.items())


def delta_bytes(daemon: DaemonProcess, kind: str) -> float:
    with urllib.request.urlopen(f"{daemon.address()['http_url']}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    [line] = [one for one in lines if one.startswith(f'forebay_delta_bytes{{kind="{kind}"}}')]
    return float(line.split()[-1])


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
async def test_a_run_of_differences_outlives_its_bases_its_node_and_a_scrub(tmp_path: Path) -> None:
    saved = states()
    data = tmp_path / "data"
    with DaemonProcess(data) as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        with forebay.Checkpointer(client, run="r") as checkpointer:
            for step, state in enumerate(saved):
                checkpointer.save(step, state=state).wait("remote", timeout=60)
        assert delta_bytes(daemon, "plain") >= 3 << 20
        assert delta_bytes(daemon, "stored") < delta_bytes(daemon, "plain") / 3
        for step in (0, 2):
            client.delete_checkpoints("r", attempt=1, step=step, now=True)
        wait_for(lambda: len(list((data / "object" / "blobs").iterdir())) == NUM_SAVES - 2)
        state = client.scrub("object")
        assert (state.num_damaged, state.num_unread) == (0, 0)
        assert state.num_copies == NUM_SAVES - 2
        assert list(client.fsck().found) == []
    lists = [
        ObjectBlob.decode(path.read_bytes(), str(path), path.name)
        for path in (data / "object" / "blobs").iterdir()
    ]
    assert any(one.has_layers for one in lists)

    shutil.copytree(data / "object", tmp_path / "object")
    report = await recover(f"file://{tmp_path / 'object'}", tmp_path / "new")
    assert (report.num_generations, report.left_out) == (NUM_SAVES - 2, [])
    with (
        DaemonProcess(tmp_path / "new") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, run="r") as checkpointer,
    ):
        for step in (4, 3, 1):
            assert same(saved[step], checkpointer.restore(step).state)
