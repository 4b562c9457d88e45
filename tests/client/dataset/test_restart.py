"""The daemon goes away in mid-training: what is open stays readable, the rest waits for it."""

import pytest

import forebay
from forebay.testing.numbered import NUM_SAMPLES, numbered_sample, write_numbered
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


@pytest.mark.slow
def test_ranks_read_the_same_version_though_the_daemon_was_killed_in_between(own_daemon, dataset):
    def append():
        with (
            forebay.connect(own_daemon.data) as client,
            client.append_dataset("numbered") as writer,
        ):
            writer.write(**numbered_sample(NUM_SAMPLES))

    options = {"global_batch_size": 10, "shuffle": "full", "columns": ["number"]}
    ranks = [
        forebay.DataLoader(dataset, rank=rank, world_size=2, follow="latest", run="r", **options)
        for rank in range(2)
    ]
    append()
    first = [batch["number"].tolist() for batch in ranks[0]]
    own_daemon.restart()
    append()
    second = [batch["number"].tolist() for batch in ranks[1]]
    found = [one + other for one, other in zip(first, second, strict=True)]
    assert sorted(sum(found, [])) == list(range(NUM_SAMPLES + 1))  # noqa: RUF017 - a few batches
    assert {one.dataset.version for one in ranks} == {2}
    for one in ranks:
        one.close()


def test_what_is_mapped_stays_readable_while_the_daemon_is_gone(own_daemon, dataset, way):
    if way == "remote":
        pytest.skip("nothing is mapped over HTTP")
    dataset.take(range(NUM_SAMPLES))
    own_daemon.kill()
    assert dataset.take(range(NUM_SAMPLES))["number"].tolist() == list(range(NUM_SAMPLES))
    own_daemon.start().wait_ready()
