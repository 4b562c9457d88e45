"""What people name: a blob, a dataset or a version of it, a run, a generation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import GenerationId, check_id, check_name

Kind = Literal["blob", "dataset", "run", "generation"]

_BLOB: Final = re.compile(r"[0-9a-f]{64}\Z")
_VERSION: Final = re.compile(r"([^@/\s]+)(?:@(\d+))?\Z")


@dataclass(frozen=True)
class Subject:
    """One thing, with what names it."""

    kind: Kind
    name: str
    """A blob's id, a dataset's or a run's name."""
    version: int = 0
    """Of a dataset; 0: the newest, or all."""
    generation: GenerationId | None = None

    def __str__(self) -> str:
        if self.generation is not None:
            return f"generation {self.generation}"
        version = f"@{self.version}" if self.version else ""
        return f"{self.kind} {self.name}{version}"

    @property
    def owner(self) -> str:
        """What a policy for it is assigned to; empty for a blob."""
        if self.generation is not None:
            return f"run {self.generation.run}"
        return "" if self.kind == "blob" else f"{self.kind} {self.name}"


def parse_subject(text: str) -> Subject:
    """The subject that *text* names, with or without its kind before it; InvalidRequest."""
    kind, _, name = text.strip().rpartition(" ")
    kind = kind or _guess(name)
    if kind == "blob":
        return Subject("blob", check_id("blob", name))
    if kind == "run":
        return Subject("run", check_name("run", name))
    if kind == "generation":
        generation = GenerationId.parse(name)
        return Subject("generation", generation.run, generation=generation)
    found = _VERSION.match(name) if kind == "dataset" else None
    if found is None:
        raise InvalidRequest(
            f"{text!r} names nothing: write a blob's id, a dataset (NAME or NAME@VERSION), "
            "'run NAME', or a generation (RUN@ATTEMPT/STEP)"
        )
    return Subject("dataset", check_name("dataset", found[1]), int(found[2] or 0))


def _guess(name: str) -> str:
    if _BLOB.match(name):
        return "blob"
    return "generation" if "/" in name else "dataset"
