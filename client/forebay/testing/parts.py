"""Work for other processes in tests of writing side by side: they import it from here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from forebay.dataset.parallel import WriteSession

SCHEMA: Final = {"n": "int64", "text": "string"}
PART_ROWS: Final = 10


def write_part(session: WriteSession, number: int, *, offset: int = 0) -> bool | None:
    """Write the rows of part *number*, ``n`` moved by *offset*; whether it counts."""
    with session.part(f"part-{number:03d}") as writer:
        for n in range(number * PART_ROWS, (number + 1) * PART_ROWS):
            writer.write(n=n + offset, text=f"row {n}")
    return writer.counted


class FragileWork:
    """Makes a file for each part in *folder*, once; the process dies the first time that it has
    part 2, and whenever it has part 7."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, part: int, report: Callable[[int], None]) -> None:
        died = self.folder / "died"
        if part == 7 or (part == 2 and not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report(part)
        (self.folder / str(part)).touch(exist_ok=False)
