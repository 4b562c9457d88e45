"""What a loader reports about itself."""

import json

import pytest

from forebay.dataset.report import Meter


def test_a_fresh_loader_reports_nothing():
    report = Meter().report()
    assert (report.samples, report.samples_per_second, report.wait_share) == (0, 0.0, 0.0)
    assert "0 samples in 0 batches" in str(report)


def test_time_is_waiting_and_computing():
    meter = Meter()
    for _ in range(10):
        meter.handed_out(32, 0.25, num_bytes=1000)
        meter.computed(0.75)
    report = meter.report()
    assert report.samples == 320
    assert report.bytes_read == 10_000
    assert report.seconds == pytest.approx(10)
    assert report.wait_share == pytest.approx(0.25)
    assert report.samples_per_second == pytest.approx(32)


def test_quantiles_are_within_a_tenth_of_the_true_ones():
    meter = Meter()
    for milliseconds in range(1, 101):
        meter.handed_out(1, milliseconds / 1000)
    report = meter.report()
    assert report.wait_p50_seconds == pytest.approx(0.050, rel=0.1)
    assert report.wait_p99_seconds == pytest.approx(0.099, rel=0.1)


def test_waits_of_any_length_are_counted():
    meter = Meter()
    for seconds in (0.0, 1e-9, 1e9):
        meter.handed_out(1, seconds)
    assert meter.report().batches == 3


def test_waits_are_shared_out_like_the_reading_of_their_batches():
    meter = Meter()
    meter.handed_out(1, 1.0, {"origin": 3.0, "decode": 1.0})
    assert meter.last.stalls == {"origin": 0.75, "decode": 0.25}
    meter.handed_out(1, 2.0, {"transform": 0.5}, copy_seconds=0.5, ready_seconds=0.25, masked=2)
    assert meter.last.stalls == {"transform": 1.5, "copy": 0.5}
    assert meter.last.read == {"transform": 0.5, "copy": 0.5}
    report = meter.report()
    assert report.stalls == {"origin": 0.75, "decode": 0.25, "transform": 1.5, "copy": 0.5}
    assert report.reading == {"origin": 3.0, "decode": 1.0, "transform": 0.5, "copy": 0.5}
    assert (report.ready_batches, report.ready_seconds, report.masked_samples) == (1, 0.25, 2)
    lines = str(report).splitlines()
    assert lines[1] == "waited for: transform 50 %, origin 25 %, copy 17 %, decode 8 %"
    assert lines[2] == "masked 2 samples that could not be read"


def test_epochs_are_summed_one_by_one_and_their_number_is_bounded():
    meter = Meter()
    for epoch in range(40):
        meter.start_epoch(epoch)
        meter.start_epoch(epoch)
        for _ in range(2):
            meter.handed_out(5, 0.5, {"decode": 1.0}, num_bytes=10)
        meter.computed(1.0)
    report = meter.report()
    assert (report.samples, report.batches, report.bytes_read) == (400, 80, 800)
    assert report.seconds == pytest.approx(80)
    assert [one.epoch for one in report.epochs] == list(range(24, 40))
    assert all(one.samples == 10 and one.seconds == 2.0 for one in report.epochs)
    assert report.epochs[-1].stalls == {"decode": 1.0}


def test_the_slowest_steps_are_kept_with_their_causes():
    meter = Meter()
    meter.start_epoch(3)
    for step in range(1, 101):
        wait = 50.0 + step if step % 10 == 0 else 1.0
        meter.handed_out(1, wait, {f"cause{step % 3}": 1.0}, position=step * 8)
    slow = meter.report().slow_steps
    assert [one.step for one in slow[:10]] == list(range(100, 0, -10))
    assert (slow[0].wait_seconds, slow[0].epoch, slow[0].position) == (150.0, 3, 800)
    assert slow[0].stalls == {"cause1": 150.0}
    assert len(slow) == 16


def test_a_report_is_plain_json():
    meter = Meter()
    meter.handed_out(1, 1.0, {"origin": 3.0})
    found = json.loads(json.dumps(meter.report().to_json()))
    assert found["stalls"] == {"origin": 1.0}
    assert found["wait_share"] == 1.0
    assert found["epochs"][0]["samples"] == found["slow_steps"][0]["step"] == 1
