"""Which of a generation's values are wanted, by patterns over their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

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

    def takes(self, name: str) -> bool:
        """Whether what is saved as *name* is wanted."""
        wanted = not self.only or any(_matches(name, pattern) for pattern in self.only)
        return wanted and not any(_matches(name, pattern) for pattern in self.ignore)


ALL = Choice()


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
