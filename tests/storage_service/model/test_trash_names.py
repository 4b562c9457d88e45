"""What a name means in the trash."""

from dataclasses import dataclass

import pytest

from forebay_server.model.trash_names import named_by


@dataclass(frozen=True)
class One:
    deletion: str
    target: str


TRASH = [
    One("d5", "dataset mnist"),
    One("d4", "run mnist"),
    One("d3", "dataset cifar"),
    One("d2", "dataset cifar"),
    One("d1", "generation r@1/2"),
    One("cifar", "dataset other"),
]


@pytest.mark.parametrize(
    ("which", "meant"),
    [
        ("d2", ["d2"]),
        ("dataset mnist", ["d5"]),
        ("dataset cifar", ["d3", "d2"]),
        ("mnist", ["d5", "d4"]),
        ("r@1/2", ["d1"]),
        ("cifar", ["cifar"]),
        ("other", ["cifar"]),
        ("dataset", []),
        ("", []),
    ],
)
def test_own_names_come_before_targets_and_these_before_parts_of_them(
    which: str, meant: list[str]
) -> None:
    assert [one.deletion for one in named_by(which, TRASH)] == meant
