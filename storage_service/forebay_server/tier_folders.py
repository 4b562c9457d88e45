"""The folders of a daemon's tiers: each one's own, none inside another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Final

from forebay_wire.errors import InvalidRequest

VOLATILE: Final = "memory:"
"""What fsspec keeps in the process."""

_FILE_SCHEMES: Final = ("file://", "local://")


def folder_of(url: str) -> Path | None:
    """The folder that an object URL names; None for one that names something else."""
    for scheme in _FILE_SCHEMES:
        if url.startswith(scheme):
            return Path(url.removeprefix(scheme))
    return None if "://" in url or "::" in url else Path(url)


def check_folders(data: Path, folders: Mapping[str, Path | None]) -> None:
    """:class:`InvalidRequest` unless each of *folders* (setting to folder) is a place of its own.

    They may lie inside the *data* folder, but not be it or hold it: its catalog is not a tier's.
    Links are followed; nothing is made.
    """
    found = {option: folder.resolve() for option, folder in folders.items() if folder is not None}
    home = data.resolve()
    for option, folder in found.items():
        if home.is_relative_to(folder):
            raise InvalidRequest(
                f"{option} = {str(folder)!r} is or holds the data folder {str(home)!r}: give the "
                "tier a folder of its own"
            )
    for (option, folder), (other, beside) in combinations(found.items(), 2):
        if folder.is_relative_to(beside) or beside.is_relative_to(folder):
            relation = "is" if folder == beside else "overlaps with"
            raise InvalidRequest(
                f"{option} = {str(folder)!r} {relation} the folder of {other}, {str(beside)!r}: "
                "give each tier a folder of its own"
            )
