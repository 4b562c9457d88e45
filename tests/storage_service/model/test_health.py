"""When volumes leave service, and return."""

import errno

import pytest

from forebay_server.model.health import (
    DEVICE,
    GONE,
    MAX_DEVICE_ERRORS,
    PROBES_TO_RETURN,
    WITHIN_SECONDS,
    VolumeHealth,
)


@pytest.mark.parametrize("code", sorted(GONE))
def test_an_error_of_the_whole_volume_is_enough(code: int) -> None:
    found = VolumeHealth().failed(code, "why", 5.0)
    assert (found.in_service, found.reason, found.since) == (False, "why", 5.0)
    assert found.probed().in_service


@pytest.mark.parametrize("code", sorted(DEVICE))
def test_several_device_errors_in_a_short_time_are_enough(code: int) -> None:
    health = VolumeHealth()
    for number in range(MAX_DEVICE_ERRORS - 1):
        health = health.failed(code, "why", float(number))
        assert health.in_service
    health = health.failed(code, "why", float(MAX_DEVICE_ERRORS))
    assert not health.in_service
    for _ in range(PROBES_TO_RETURN):
        assert not health.in_service
        health = health.probed()
    assert health == VolumeHealth()


def test_device_errors_far_apart_are_single_bad_blocks() -> None:
    health = VolumeHealth()
    for number in range(3 * MAX_DEVICE_ERRORS):
        health = health.failed(errno.EIO, "why", number * WITHIN_SECONDS / 2)
        assert health.in_service


def test_other_errors_say_nothing_of_the_volume() -> None:
    health = VolumeHealth()
    for code in (errno.ENOSPC, errno.EMFILE, errno.EACCES, 0):
        for _ in range(2 * MAX_DEVICE_ERRORS):
            health = health.failed(code, "why", 1.0)
    assert health == VolumeHealth()


def test_a_failure_meanwhile_asks_for_more_probes() -> None:
    health = VolumeHealth().failed(errno.EROFS, "why", 1.0).failed(errno.EIO, "worse", 2.0)
    assert (health.reason, health.probed().in_service) == ("why", False)
    assert health.probed().probed().in_service
