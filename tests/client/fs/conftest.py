"""A dataset of two versions and a run of three generations, committed once for all tests."""

from typing import Any

import numpy as np
import pytest
import torch

import forebay
from forebay.fs import ForebayFileSystem
from forebay_server.testing.daemon import DaemonProcess

ROWS = 3000


class Values:
    """A stateful that says whatever it was given."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def commit_state(client: forebay.Client, run: str, *states: dict[str, Any]) -> None:
    """Save *states* as the steps 1, 2, … of a new attempt of *run*."""
    for step, state in enumerate(states, 1):
        parts = {name: Values(value) for name, value in state.items()}
        with forebay.Checkpointer(client, run, timeout=60, **parts) as checkpointer:
            checkpointer.save(step).wait("local", timeout=60)


def weights(factor: float) -> torch.Tensor:
    return torch.arange(300_000, dtype=torch.float32).reshape(300, 1000) * factor


@pytest.fixture(scope="session")
def address(daemon: DaemonProcess) -> str:
    """Of a daemon that has the dataset `flowers` and the run `cnn`."""
    rpc = daemon.address()["rpc"]
    with forebay.connect(rpc) as client:
        for begin in (client.create_dataset, client.append_dataset):
            with begin("flowers", shard_bytes=256 << 10, batch_bytes=64 << 10) as writer:
                for number in range(ROWS):
                    writer.write(id=number, petals=np.full(60, number, dtype=np.float32))
        state = {"layer": {"weight": weights(1.0), "bias": torch.ones(3)}, "a/b": torch.zeros(2)}
        objects = {"rate": 0.5, "note": "rosé", "raw": b"\x00\xff", "table": np.eye(2)}
        commit_state(
            client,
            "cnn",
            {"model": state, "other": objects},
            {"model": {**state, "layer": {"weight": weights(2.0)}}},
        )
    return str(rpc)


@pytest.fixture
def fs(address: str, way: str) -> ForebayFileSystem:
    return ForebayFileSystem(address)
