"""What "done" means: a word for each promise, weakest first."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from forebay_wire.errors import InvalidRequest


class Durability(StrEnum):
    """What "done" means, weakest first. Each is equal to its word."""

    NONE = ""
    RAM = "ram"
    """Sealed by all ranks: it survives its trainer while the daemon lives."""
    LOCAL = "local"
    """Committed, and on disk on this node."""
    REPLICATED = "replicated"
    """On a second node, too."""
    REMOTE = "remote"
    """In the object tier, with all that it names."""


_STRENGTH: Final = {state: rank for rank, state in enumerate(Durability)}


def reaches(reached: Durability, wanted: Durability) -> bool:
    """Whether *reached* is at least as durable as *wanted*."""
    return _STRENGTH[reached] >= _STRENGTH[wanted]


def check_durability(text: str, default: Durability = Durability.LOCAL) -> Durability:
    """The durability that a caller named; an empty text means *default*.

    :class:`InvalidRequest` for an unknown one, and for ``replicated``: no daemon has a second node
    to give it yet.
    """
    if not text:
        return default
    try:
        found = Durability(text)
    except ValueError:
        allowed = ", ".join(repr(str(one)) for one in Durability if one)
        raise InvalidRequest(f"durability {text!r} is unknown: use one of {allowed}") from None
    if found is Durability.REPLICATED:
        raise InvalidRequest(
            "durability 'replicated' is not configured: it needs a second node, and this daemon "
            "has none; use 'local', or 'remote' with an object tier"
        )
    return found
