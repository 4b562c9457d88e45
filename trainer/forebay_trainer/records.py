"""What each rank writes down about its run: the samples of every optimizer step, line by line.

A rank owns one file per attempt, ``attempt-0001-rank-0.jsonl``. Its first line is the header, every
other line one step. A line is written in one call when its step is done, so SIGKILL leaves whole
lines, except perhaps the last one, which `read` leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self


@dataclass(frozen=True)
class StepRecord:
    """The samples that one rank contributed to one optimizer step, after that step was taken."""

    step: int
    """Counted from 1 over the whole run."""
    epoch: int
    position: int
    """Where the epoch's order stands after the step: samples that all ranks together have got."""
    ids: tuple[int, ...]
    """Row numbers of the dataset version; empty if this rank had no part in the batch."""


@dataclass(frozen=True)
class RankRecord:
    """Everything that one rank of one attempt wrote down."""

    attempt: int
    rank: int
    num_ranks: int
    parent_attempt: int
    """The attempt that saved the generation it started from; 0 for a fresh start."""
    parent_step: int
    """The step of that generation; 0 for a fresh start."""
    steps: tuple[StepRecord, ...] = field(default=())


class RecordWriter:
    """Appends to this rank's file of this attempt; used from one thread, closed by its owner."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        attempt: int,
        rank: int,
        num_ranks: int,
        parent_attempt: int,
        parent_step: int,
    ) -> Self:
        """Starts the file; FileExistsError if this rank has already one of this attempt."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"attempt-{attempt:04d}-rank-{rank}.jsonl"
        writer = cls(path.open("x", buffering=1, encoding="utf-8"))
        header = RankRecord(attempt, rank, num_ranks, parent_attempt, parent_step)
        writer._write({name: value for name, value in asdict(header).items() if name != "steps"})
        return writer

    def append(self, record: StepRecord) -> None:
        """On return the kernel has the line: it survives this process, not the machine."""
        self._write(asdict(record))

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a last line without its end is left out."""
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def read(path: Path) -> RankRecord | None:
    """One rank's record, or None if it died before its header was complete."""
    lines = read_lines(path)
    if not lines:
        return None
    header, *steps = lines
    return RankRecord(**header, steps=tuple(_step(line) for line in steps))


def _step(line: dict[str, Any]) -> StepRecord:
    return StepRecord(line["step"], line["epoch"], line["position"], tuple(line["ids"]))


def read_folder(folder: Path) -> Sequence[RankRecord]:
    """The records of all attempts and ranks, by attempt, then rank."""
    records: Iterable[RankRecord | None] = map(read, folder.glob("attempt-*-rank-*.jsonl"))
    found = [record for record in records if record is not None]
    return sorted(found, key=lambda record: (record.attempt, record.rank))
