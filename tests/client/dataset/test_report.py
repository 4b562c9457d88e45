"""What a loader reports about itself."""

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
