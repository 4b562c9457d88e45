"""The trainer on a real daemon: SIGTERM saves and leaves, the next start goes on from there."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_trainer import records
from forebay_trainer.demo.follow import MetricsTail
from forebay_trainer.demo.proof import prove

# Torch takes seconds to import where other tests share the cores.
pytestmark = pytest.mark.timeout(200)

NUM_SAMPLES = 47


@pytest.fixture
def daemon(tmp_path):
    with DaemonProcess(tmp_path / "data") as daemon:
        with forebay.connect(daemon.data) as client:
            write_dataset(client)
        yield daemon


def write_dataset(client):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUM_SAMPLES, 8, 8), dtype=np.uint8)
    table = pa.table(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "label": np.arange(NUM_SAMPLES) % 3,
        }
    )
    with client.create_dataset("tiny") as writer:
        writer.write_table(table)


def trainer(daemon, folder, *overrides):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "forebay_trainer", "mnist_cnn", "run=tiny"),
            *(f"address={daemon.data}", f"output.folder={folder}"),
            *("num_epochs=3", "data.dataset=tiny", "data.train_split=none"),
            *("data.test_split=none", "data.global_batch_size=5", "num_compute_threads=1"),
            *("model.image_shape=[8,8]", "model.num_classes=3", "model.channels=[4]"),
            *("checkpoint.every_steps=0", *overrides),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    return output


def wait_for_step(tail, step, process, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(event.get("step", 0) >= step for event in tail.read()):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within {seconds} s")


def test_sigterm_saves_and_leaves_and_the_next_start_goes_on(daemon, tmp_path):
    folder = tmp_path / "logs"
    process = trainer(daemon, folder, "min_step_seconds=0.05")
    try:
        wait_for_step(MetricsTail(folder / "metrics.jsonl"), 13, process)
        process.send_signal(signal.SIGTERM)
        output = finish(process)
    finally:
        process.kill()
    assert "run tiny: terminated" in output
    second = finish(trainer(daemon, folder))
    assert "run tiny: done" in second

    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first_end, last_end = (event for event in events if event["event"] == "end")
    starts = [event for event in events if event["event"] == "start"]
    assert first_end["reason"] == "terminated"
    assert 13 <= first_end["step"] < 30
    assert starts[1]["step"] == first_end["step"]  # nothing was lost
    assert (last_end["reason"], last_end["step"]) == ("done", 30)

    proof = prove(records.read_folder(folder / "records"), range(NUM_SAMPLES), 3)
    assert proof.holds, proof.sentence()
    assert proof.rolled_back == ()

    # A start after the end finds nothing to do, and saves nothing again.
    third = finish(trainer(daemon, folder))
    assert "from step 30" in third
    with forebay.connect(daemon.data) as client:
        saved = {(each.attempt, each.step) for each in client.checkpoints("tiny")}
    assert saved == {(1, first_end["step"]), (2, 30)}


def test_a_dataset_that_is_not_there_is_named(daemon, tmp_path):
    process = trainer(daemon, tmp_path / "logs", "data.dataset=nowhere")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "NotFound" in output
    assert "nowhere" in output
    assert "Traceback" not in output
