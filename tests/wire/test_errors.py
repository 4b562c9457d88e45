"""Errors cross the wire unchanged; versions that cannot talk say what to upgrade."""

import copy

import pytest

from forebay_wire.errors import (
    ERROR_NAMES,
    HTTP_STATUS,
    STATUS_DEFAULTS,
    DaemonUnavailable,
    ForebayError,
    InvalidRequest,
    VersionMismatch,
    rebuild,
)
from forebay_wire.protocol import agree, protocol_range


@pytest.mark.parametrize("name", sorted(ERROR_NAMES))
def test_every_error_comes_back_as_itself(name):
    error = ERROR_NAMES[name]("what, where, what to do")
    again = rebuild(name, error.status, error.message)
    assert type(again) is type(error)
    assert again.message == "what, where, what to do"
    assert str(again) == "what, where, what to do"


@pytest.mark.parametrize("name", sorted(ERROR_NAMES))
def test_every_error_has_a_status_that_both_tables_know(name):
    status = ERROR_NAMES[name].status
    assert status in STATUS_DEFAULTS
    assert status in HTTP_STATUS


def test_an_answer_without_an_error_name_is_known_by_its_status():
    assert type(rebuild(None, "UNAVAILABLE", "")) is DaemonUnavailable
    assert type(rebuild("NoSuchError", "INVALID_ARGUMENT", "")) is InvalidRequest
    assert type(rebuild(None, "SOMETHING", "")) is ForebayError


def test_an_error_without_a_message_has_its_name():
    assert InvalidRequest().message == "InvalidRequest"


def test_versions_that_overlap_agree_on_the_newest_common_one():
    assert agree("1-3", "2-5", caller="client", here="daemon") == 3
    assert agree(protocol_range(), protocol_range(), caller="client", here="daemon") >= 1


def test_the_older_side_is_told_to_upgrade():
    with pytest.raises(VersionMismatch, match="upgrade the client"):
        agree("1-1", "2-3", caller="client", here="daemon")
    with pytest.raises(VersionMismatch, match=r"upgrade the daemon .* restart"):
        agree("4-5", "2-3", caller="client", here="daemon")


@pytest.mark.parametrize("offered", ["", "1", "x-y", "1-2-3"])
def test_a_caller_without_a_version_is_refused(offered):
    with pytest.raises(VersionMismatch, match="no protocol version"):
        agree(offered, "1-1", caller="client", here="daemon")


@pytest.mark.parametrize("name", sorted(ERROR_NAMES))
def test_an_error_is_rebuilt_from_its_message_alone(name: str) -> None:
    """As torch does with what a worker raised: by that keyword, or by its arguments."""
    error = ERROR_NAMES[name](message="what, where, what to do")
    assert error.message == str(error) == "what, where, what to do"
    again = copy.copy(error)
    assert (type(again), again.message) == (type(error), error.message)
    assert type(error)().message == name
