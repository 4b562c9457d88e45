"""What the state machine of the engine knows about it, and how it does harm."""

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay_wire import failpoints
from forebay_wire.segments import encode_trailer, even_cuts, table_of

FAILPOINTS = sorted(
    {
        *failpoints.DATASET_COMMIT,
        *failpoints.GENERATION_COMMIT,
        *failpoints.REMOTE_FLUSH,
        *failpoints.MOVE,
        *failpoints.EVICT,
        *failpoints.REPAIR,
        *failpoints.COLLECT,
    }
)

Copy = tuple[str, str]
"""Tier and file."""


class Died(Exception):
    """The engine was killed in a call, and works again."""


def survives(step: Callable[..., None]) -> Callable[..., None]:
    """The step may end with the engine's death: what it was about to say is then not known."""

    @functools.wraps(step)
    def run(self: Any, *arguments: Any, **options: Any) -> None:
        with suppress(Died):
            step(self, *arguments, **options)

    return run


def when(condition: Callable[[Any], object]) -> Callable[..., Callable[..., None]]:
    """The step does nothing unless *condition* holds. It is no precondition: what the engine does
    in the background takes its time, and what is drawn must not depend on that."""

    def decorate(step: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(step)
        def run(self: Any, *arguments: Any, **options: Any) -> None:
            if condition(self):
                step(self, *arguments, **options)

        return run

    return decorate


@dataclass(frozen=True)
class Blob:
    """What the oracle knows of a blob."""

    id: str
    data: bytes
    image: bytes
    """Its raw file."""

    @classmethod
    def of(cls, data: bytes, cut_bytes: int) -> "Blob":
        pieces, start = [], 0
        for length in even_cuts(len(data), cut_bytes):
            pieces.append(data[start : start + length])
            start += length
        table = table_of(pieces)
        trailer = encode_trailer(table.total_bytes, len(table.encoded))
        return cls(table.blob_id, data, data + table.encoded + trailer)


@dataclass
class Plan:
    """A registered plan."""

    manifest: str
    num_samples: int
    time: int = 0


def allocated_bytes(folder: Path) -> int:
    """What the files of a tier take on disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob("files/*/*"))


def harm(path: Path, how: str, choice: int) -> None:
    """Remove, truncate, or flip a bit of a file."""
    position = choice % path.stat().st_size
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, position)
    else:
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ (1 << choice % 8)]))
