"""Which Forebay this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def forebay_version() -> str:
    """The installed distribution's version; ``0+unknown`` when run from bare sources."""
    try:
        return version("forebay")
    except PackageNotFoundError:
        return "0+unknown"
