"""What people name."""

import pytest

from forebay_server.model.subjects import parse_subject
from forebay_wire.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "full", "owner"),
    [
        ("mnist", "dataset mnist", "dataset mnist"),
        ("mnist@3", "dataset mnist@3", "dataset mnist"),
        ("dataset mnist@3", "dataset mnist@3", "dataset mnist"),
        ("run r.1", "run r.1", "run r.1"),
        ("r@1/20", "generation r@1/20", "run r"),
        ("generation r@1/20", "generation r@1/20", "run r"),
        ("a" * 64, "blob " + "a" * 64, ""),
    ],
)
def test_a_subject_has_one_full_name(text: str, full: str, owner: str) -> None:
    found = parse_subject(text)
    assert str(found) == full
    assert found.owner == owner
    assert parse_subject(full) == found


@pytest.mark.parametrize(
    "text", ["", "a b", "blob x", "dataset a/b", "run", "tier ssd", "r@x/2", "a@", "a@b", "-a"]
)
def test_what_names_nothing_is_refused(text: str) -> None:
    if text == "run":  # a dataset may be called that
        assert parse_subject(text).kind == "dataset"
        return
    with pytest.raises(InvalidRequest):
        parse_subject(text)
