"""A real daemon for the tests of datasets, read locally and by HTTP."""

import itertools
import tempfile
from pathlib import Path

import pytest

import forebay
from forebay.dataset.dataset import Dataset
from forebay.testing.numbered import write_numbered
from forebay.transfer.local import LocalTransfer
from forebay_server.testing.daemon import DaemonProcess

_numbers = itertools.count()


@pytest.fixture(scope="session")
def daemon():
    with tempfile.TemporaryDirectory() as folder, DaemonProcess(Path(folder) / "data") as process:
        yield process


@pytest.fixture(params=["local", "remote"])
def way(request, monkeypatch):
    """How bytes travel: by descriptors, or by HTTP alone."""
    if request.param == "remote":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    else:
        monkeypatch.delenv("FOREBAY_NO_LOCAL", raising=False)
    return request.param


@pytest.fixture
def client(daemon, way):
    with forebay.connect(daemon.data) as connected:
        assert isinstance(connected.transfer, LocalTransfer) == (way == "local")
        yield connected


@pytest.fixture
def name():
    """A dataset name that no other test uses."""
    return f"dataset-{next(_numbers)}"


@pytest.fixture(scope="session")
def _numbered(daemon):
    with forebay.connect(daemon.data) as connected:
        write_numbered(connected, "numbered")
        connected.dataset("numbered").define_splits({"train": 0.8, "test": 0.2}, seed=3)


@pytest.fixture
def numbered(client, _numbered) -> Dataset:
    """NUM_SAMPLES samples that each carry their number, over several shards and many batches."""
    return client.dataset("numbered")


@pytest.fixture
def train(client, _numbered) -> Dataset:
    """Its larger split."""
    return client.dataset("numbered", split="train")
