"""The demo's own folder: what lies where in it, and that nothing of anybody else is emptied."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from forebay_trainer.processes import holds_lock
from forebay_wire.errors import AlreadyRunning, InvalidRequest

MARKER = ".forebay-demo"


@dataclass(frozen=True)
class DemoFolder:
    """``root`` holds the marker, the daemon's data folder, logs, records and the picture."""

    root: Path

    @classmethod
    def prepare(cls, root: Path) -> Self:
        """An empty folder of the demo; what an earlier demo left in it is removed.

        InvalidRequest if there is something that no demo left, AlreadyRunning if a daemon runs in
        it; both leave the folder as it was.
        """
        folder = cls(root.resolve())
        if folder.root.exists():
            folder._empty()
        folder.root.mkdir(parents=True, exist_ok=True)
        (folder.root / MARKER).write_text("Made by the Forebay demo, which empties it.\n")
        return folder

    def _empty(self) -> None:
        if not self.root.is_dir():
            raise InvalidRequest(f"{self.root} is not a folder; give another one with --data")
        if not any(self.root.iterdir()):
            return
        if not (self.root / MARKER).is_file():
            raise InvalidRequest(
                f"{self.root} is not empty and no demo made it; give a new folder with --data"
            )
        if holds_lock(self.data / "lock"):
            raise AlreadyRunning(
                f"a daemon runs in {self.data}; stop it, or give another folder with --data"
            )
        # The marker goes last: a removal that is cut short is still ours to finish.
        for entry in self.root.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()

    @property
    def data(self) -> Path:
        """The daemon's data folder."""
        return self.root / "data"

    @property
    def logs(self) -> Path:
        """What the daemon and the trainers print, the metrics, and the ranks' records."""
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    @property
    def records(self) -> Path:
        return self.logs / "records"

    @property
    def picture(self) -> Path:
        return self.root / "training.png"
