"""Which figures count, and which records are not needed any more."""

import pytest

from forebay_server.model.kept_statistics import Record, keep


def record(name: str, columns: str | None) -> Record:
    return Record(name, None if columns is None else frozenset(columns))


@pytest.mark.parametrize(
    ("records", "new", "replaces", "kept", "dropped"),
    [
        ([], "xy", False, "xy", ()),
        ([record("a", "x")], "xy", False, "y", ()),
        ([record("a", "x"), record("b", "y")], "xy", False, "", ()),
        ([record("a", None)], "x", False, "x", ("a",)),
        ([record("a", None), record("b", "x")], "x", False, "", ("a",)),
        ([record("a", "x"), record("b", "yz")], "xy", True, "xy", ("a",)),
        ([record("a", "x")], "", True, "", ()),
    ],
)
def test_the_first_figures_stay_unless_they_are_replaced(
    records: list[Record], new: str, replaces: bool, kept: str, dropped: tuple[str, ...]
) -> None:
    found = keep(records, {name: {"n": name} for name in new}, replaces=replaces)
    assert found.columns == {name: {"n": name} for name in kept}
    assert found.dropped == dropped
