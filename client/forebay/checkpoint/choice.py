"""Which of a generation's values are wanted, by patterns over their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from forebay_wire.errors import InvalidRequest

Patterns = str | Iterable[str] | None


@dataclass(frozen=True)
class Choice:
    """Patterns as of :mod:`fnmatch`, matched with case; one takes all below the name it matches."""

    only: tuple[str, ...] = ()
    """Empty: everything."""
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, only: Patterns, ignore: Patterns) -> Choice:
        return cls(_patterns("only", only), _patterns("ignore", ignore))

    @property
    def is_all(self) -> bool:
        return not self.only and not self.ignore

    def __str__(self) -> str:
        """As the user wrote it."""
        given = (("only", self.only), ("ignore", self.ignore))
        return ", ".join(
            f"{word}={(one[0] if len(one) == 1 else list(one))!r}" for word, one in given if one
        )

    def takes(self, name: str) -> bool:
        """Whether what is saved as *name* is wanted."""
        wanted = not self.only or any(_matches(name, pattern) for pattern in self.only)
        return wanted and not any(_matches(name, pattern) for pattern in self.ignore)


ALL = Choice()


def near(wanted: str, names: Iterable[str]) -> str:
    """For an error: those of *names*, or of their beginnings, that *wanted* may mean, or some."""
    every = sorted(names)
    parts = {".".join(one.split(".")[: wanted.count(".") + 1]) for one in every}
    found = difflib.get_close_matches(wanted, sorted(parts), NEAR_NAMES, 0.6)
    if found:
        return f"near it are {', '.join(found)}"
    shown = ", ".join(every[:NEAR_NAMES]) + (", …" if len(every) > NEAR_NAMES else "")
    return f"there are {shown or 'no names'}"


NEAR_NAMES: Final = 5


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _patterns(what: str, given: Patterns) -> tuple[str, ...]:
    if given is None:
        return ()
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not patterns or not all(isinstance(one, str) and one for one in patterns):
        raise InvalidRequest(
            f"{what}={given!r} names nothing: give a pattern such as 'model.*', or a list of them"
        )
    return patterns
