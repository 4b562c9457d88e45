"""Which deletions a name means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Named(Protocol):
    """What one call deleted."""

    @property
    def deletion(self) -> str:
        """Its own name."""
        ...

    @property
    def target(self) -> str:
        """``dataset NAME``, ``run NAME``, ``generation RUN@ATTEMPT/STEP``."""
        ...


N = TypeVar("N", bound=Named)


def named_by(which: str, deletions: Sequence[N]) -> list[N]:
    """Those of *deletions* that *which* means, in their order: a deletion's own name, else what was
    deleted, else that without its first word. Several targets: the name is ambiguous."""
    return (
        [one for one in deletions if one.deletion == which]
        or [one for one in deletions if one.target == which]
        or [one for one in deletions if one.target.partition(" ")[2] == which]
    )
