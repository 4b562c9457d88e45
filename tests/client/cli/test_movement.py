"""Pins, warm holds, policies, the trash, jobs and stories, against a real daemon."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay_server.testing.daemon import DaemonProcess

SSD_BYTES = 24 << 20

CONFIG = """
[policies.mine]
land = ["hdd"]
copies = { ssd = 0 }
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with a small ssd tier, a policy of its own, and a dataset."""
    folder = tmp_path_factory.mktemp("movement")
    (folder / "forebay.toml").write_text(CONFIG)
    config = ("--config", str(folder / "forebay.toml"), "--ssd-bytes", str(SSD_BYTES))
    with DaemonProcess(folder / "data", *config) as process:
        with forebay.connect(process.address()["rpc"]) as client:
            write(client, "small", 100)
            client.wait_version("small", 1, "remote")
        yield process


def write(client: forebay.Client, name: str, rows: int, row_bytes: int = 1000) -> None:
    schema = {"noise": forebay.Array("uint8", (row_bytes,))}
    with client.create_dataset(name, schema=schema) as writer:
        for row in range(rows):
            writer.write(noise=[row % 251] * row_bytes)


def connect(process: DaemonProcess) -> forebay.Client:
    return forebay.connect(process.address()["rpc"])


def test_a_warm_dataset_and_its_token(forebay_command, filled: DaemonProcess) -> None:
    done = forebay_command(
        "dataset", "warm", "small", "--hold", "2h", "--data", filled.data, "--json"
    )
    assert done.status == 0, done.err
    found = done.json
    assert (found["still_warm"], found["tier"], found["target"]) == (True, "ssd", "dataset small@1")
    with connect(filled) as client:
        state = client.is_warm(found["token"])
        assert state.still_warm
        assert state.expires_unix > 0
    shown = forebay_command("pins", found["token"], "--data", filled.data)
    assert "still warm" in shown.out
    assert "small" in forebay_command("pins", "--data", filled.data).out
    why = forebay_command("why", "small", "--data", filled.data)
    assert "pinned in ssd" in why.out
    assert forebay_command("unpin", found["token"], "--data", filled.data).status == 0
    gone = forebay_command("pins", found["token"], "--data", filled.data)
    assert "no, because it was unpinned" in gone.out


def test_warm_that_cannot_fit_says_what_is_needed_and_what_holds_the_room(
    forebay_command, filled: DaemonProcess
) -> None:
    with connect(filled) as client:
        client.set_policy("dataset large", "mine")
        write(client, "large", 50, 1 << 20)  # twice the ssd tier; it landed in hdd
    refused = forebay_command("dataset", "warm", "large", "--tier", "ssd", "--data", filled.data)
    assert refused.status == ExitCode.FAILURE
    assert "bytes do not fit into tier ssd" in refused.err
    assert "Pins hold" in refused.err
    assert forebay_command("unpin", "large", "--data", filled.data).status == ExitCode.NOT_FOUND


def test_new_bytes_land_where_the_policy_says_and_are_copied_where_it_wants(
    forebay_command, filled: DaemonProcess, wait_until
) -> None:
    told = forebay_command("policy", "set", "dataset placed", "mine", "--data", filled.data).out
    assert told.startswith("dataset placed: policy mine")
    assert "does not exist yet" in told
    told = forebay_command("policy", "set", "small", "default", "--data", filled.data).out
    assert "does not exist yet" not in told
    with connect(filled) as client:
        write(client, "placed", 10)
        first = client.why("placed").copies
        assert "hdd" in {copies.tier for copies in first}
        assert client.why("placed").policy == "mine"

        def is_in_ssd() -> bool:
            return "ssd" in {one.tier for one in client.why("placed").copies}

        wait_until(is_in_ssd, "the copy that the policy wants is there")
    shown = forebay_command("policy", "list", "--data", filled.data)
    for part in ("hot", "warm", "cold", "mine", "dataset placed", "a copy is made in ssd"):
        assert part in shown.out
    one = forebay_command("policy", "show", "mine", "--data", filled.data, "--json").json
    assert "dataset placed" in one["owners"]


def test_an_unknown_policy_or_tier_or_pin_is_one_clear_error(
    forebay_command, filled: DaemonProcess
) -> None:
    bad = forebay_command("policy", "set", "small", "lukewarm", "--data", filled.data)
    assert bad.status == ExitCode.USAGE
    assert "there is no policy 'lukewarm'" in bad.err
    bad = forebay_command("pin", "small", "--tier", "tape", "--data", filled.data)
    assert bad.status == ExitCode.USAGE
    assert "there is no tier 'tape'" in bad.err
    bad = forebay_command("unpin", "0" * 32, "--data", filled.data)
    assert bad.status == ExitCode.NOT_FOUND
    bad = forebay_command("dataset", "warm", "small", "--hold", "soon", "--data", filled.data)
    assert bad.status == ExitCode.USAGE
    assert "is no duration" in bad.err


def test_a_deleted_dataset_comes_back_from_the_trash(
    forebay_command, filled: DaemonProcess
) -> None:
    with connect(filled) as client:
        write(client, "mistake", 5)
        blob = client.dataset("mistake").manifest.shards[0].blob
    deleted = forebay_command("dataset", "delete", "mistake", "--yes", "--data", filled.data)
    assert 'forebay trash restore "dataset mistake" brings it back' in deleted.out
    assert "It is in the trash until 20" in deleted.out
    with connect(filled) as client, pytest.raises(forebay.NotFound):
        client.dataset("mistake")
    (entry,) = forebay_command("trash", "list", "--data", filled.data, "--json").json
    assert entry["target"] == "dataset mistake"
    assert "trash: dataset mistake" in forebay_command("why", blob, "--data", filled.data).out
    restored = forebay_command("trash", "restore", "mistake", "--data", filled.data)
    assert restored.out.startswith("Restored dataset mistake, deleted 20")
    with connect(filled) as client:
        assert len(client.dataset("mistake")) == 5
    forebay_command("dataset", "delete", "mistake", "--yes", "--data", filled.data)
    again = forebay_command("dataset", "delete", "mistake", "--yes", "--data", filled.data)
    assert again.status == ExitCode.NOT_FOUND
    emptied = forebay_command("trash", "empty", "--yes", "--data", filled.data)
    assert "1 deletion can no longer be undone" in emptied.out
    events = forebay_command("why", "mistake", "--data", filled.data).out
    for event in ("trashed", "restored", "deleted"):
        assert event in events
    with connect(filled) as client:
        write(client, "mistake", 5)
    gone = forebay_command("dataset", "delete", "mistake", "--yes", "--now", "--data", filled.data)
    assert "It is gone for good." in gone.out


def test_jobs_and_the_story_of_what_never_was(forebay_command, filled: DaemonProcess) -> None:
    found = forebay_command("jobs", "--all", "--data", filled.data, "--json").json
    assert "plan" in {job["kind"] for job in found}
    assert forebay_command("jobs", "--data", filled.data).status == 0
    missing = forebay_command("why", "nothing", "--data", filled.data)
    assert missing.status == ExitCode.NOT_FOUND
    assert "there is no dataset nothing" in missing.err


@pytest.fixture
def wait_until():
    """Waits for a condition with a deadline."""
    import threading

    def wait(condition, what: str) -> None:
        ticking = threading.Event()
        for _ in range(1200):
            if condition():
                return
            ticking.wait(0.05)
        pytest.fail(f"not within 60 s: {what}")

    return wait


def test_a_policy_file_that_is_wrong_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "forebay.toml").write_text("[policies.bad]\nland = ['ssd', 'ssd']\n")
    daemon = DaemonProcess(tmp_path / "data", "--config", str(tmp_path / "forebay.toml"))
    daemon.start()
    assert daemon.wait_exit() == 2
    assert "land names a tier twice" in daemon.log()
