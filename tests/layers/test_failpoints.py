"""Every failpoint is passed by some code and has some test kill there."""

import re
from pathlib import Path

from forebay_wire import failpoints

ROOT = Path(__file__).parents[2]
SOURCES = ("client", "proto", "storage_service", "trainer")
NOT_COUNTED = {
    Path(__file__),
    ROOT / "tests" / "wire" / "test_failpoints.py",
    ROOT / "tests" / "storage_service" / "engine" / "test_engine_machine.py",
}
"""They are about failpoints as such, or draw some by chance."""

GROUPS = {
    name: value
    for name, value in vars(failpoints).items()
    if name.isupper() and isinstance(value, tuple)
}


def named_in(text: str) -> set[str]:
    """The failpoints that a test module names, one by one or as a group."""
    one_by_one = {name for name in failpoints.ALL if re.search(rf"\b{re.escape(name)}\b", text)}
    imported = re.findall(r"^from forebay_wire\.failpoints import ([^(\n]+|\([^)]*\))", text, re.M)
    words = set(re.findall(r"\w+", " ".join(imported)))  # jobs have kinds of the same names
    in_groups = [set(names) for group, names in GROUPS.items() if group in words]
    return one_by_one.union(*in_groups)


def test_every_failpoint_is_in_a_group() -> None:
    assert {name for names in GROUPS.values() for name in names} == failpoints.ALL


def test_every_failpoint_is_used_by_some_test() -> None:
    used: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if path not in NOT_COUNTED:
            used |= named_in(path.read_text())
    assert failpoints.ALL - used == set()


def test_every_failpoint_is_passed_by_some_code() -> None:
    passed: set[str] = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            passed.update(re.findall(r'failpoint\(\s*"([^"]+)"', path.read_text()))
    assert failpoints.ALL - passed == set()
    assert passed - failpoints.ALL == set()
