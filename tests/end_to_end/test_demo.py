"""The demo, shortened, on the code path of ``make demo``: killed, resumed, exactly once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# It takes 25 s alone on two cores, and this suite shares them.
pytestmark = pytest.mark.timeout(280)


def run(*command):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=260, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The finished demo's JSON, with what it printed for people as ``text``."""
    folder = tmp_path_factory.mktemp("demo") / "it"
    done = run("-m", "forebay_trainer.demo", "--short", "--json", "--data", str(folder))
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "text": done.stderr, "folder": folder}


def test_every_epoch_used_every_sample_once_across_a_kill(demo):
    assert demo["holds"]
    assert "exactly once: 2 epochs x 481 samples = 962 uses" in demo["sentence"]
    assert demo["sentence"] in " ".join(demo["text"].split())


def test_the_kill_cost_steps_that_were_taken_again(demo):
    assert 0 < demo["resumed_step"] < demo["killed_step"]
    (lost,) = demo["proof"]["rolled_back"]
    assert lost["attempt"] == 1
    assert lost["first_step"] == demo["resumed_step"] + 1
    assert lost["last_step"] >= demo["killed_step"]
    assert lost["num_samples"] > 0


def test_it_learned_something_and_everything_is_in_the_object_tier(demo):
    assert demo["summary"]["test_accuracy"] > 0.5
    assert demo["durability"] == "remote"
    assert demo["tier_bytes"]["object"] > 0
    assert Path(demo["picture"]).read_bytes().startswith(b"\x89PNG")


def test_no_process_of_it_is_left(demo):
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert str(demo["folder"]) not in command, f"process {entry} is left: {command}"


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    done = run("-m", "forebay_trainer.demo", "--short", "--data", str(tmp_path))
    assert done.returncode == 1
    assert "no demo made it" in " ".join(done.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
