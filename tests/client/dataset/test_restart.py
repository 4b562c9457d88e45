"""The daemon goes away in mid-training: what is open stays readable, the rest waits for it."""

import pytest

import forebay
from forebay.testing.numbered import NUM_SAMPLES, write_numbered
from forebay_server.testing.daemon import DaemonProcess


@pytest.fixture
def own_daemon(tmp_path):
    with DaemonProcess(tmp_path / "data") as process:
        yield process


@pytest.fixture
def dataset(own_daemon, way):
    with forebay.connect(own_daemon.data) as client:
        write_numbered(client, "numbered")
        yield client.dataset("numbered")


def test_a_killed_and_restarted_daemon_is_found_again_in_mid_epoch(own_daemon, dataset):
    assert len(dataset.manifest.shards) > 1  # in order, so the last one is opened after the kill
    seen = []
    with forebay.DataLoader(dataset, global_batch_size=10) as loader:
        for step, batch in enumerate(loader):
            if step == 2:
                own_daemon.restart()
            seen += batch["number"].tolist()
    assert seen == list(range(NUM_SAMPLES))


def test_what_is_mapped_stays_readable_while_the_daemon_is_gone(own_daemon, dataset, way):
    if way == "remote":
        pytest.skip("nothing is mapped over HTTP")
    dataset.take(range(NUM_SAMPLES))
    own_daemon.kill()
    assert dataset.take(range(NUM_SAMPLES))["number"].tolist() == list(range(NUM_SAMPLES))
    own_daemon.start().wait_ready()
