"""What the kit found, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["kept", "broken", "not tested"]


@dataclass(frozen=True)
class Outcome:
    """How one promise fared."""

    promise: str
    verdict: Verdict
    meaning: str
    """What is promised."""
    detail: str = ""
    """What was lost or repeated, and after what; or why it was not tested."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All outcomes; ``str()`` is for people."""

    outcomes: Sequence[Outcome]
    seed: int

    @property
    def broken(self) -> list[str]:
        """Names of the promises that were not kept."""
        return [one.promise for one in self.outcomes if one.verdict == "broken"]

    @property
    def is_conformant(self) -> bool:
        """Whether everything was tested and kept."""
        return all(one.verdict == "kept" for one in self.outcomes)

    def check(self) -> None:
        """Raise AssertionError with the whole report if a promise is broken."""
        if self.broken:
            raise AssertionError(f"{len(self.broken)} promises are broken\n{self}")

    def to_json(self) -> str:
        return json.dumps({"seed": self.seed, "outcomes": [asdict(one) for one in self.outcomes]})

    def __str__(self) -> str:
        width = max((len(one.promise) for one in self.outcomes), default=0)
        lines = []
        for one in self.outcomes:
            lines.append(f"{one.verdict:>10}  {one.promise:<{width}}  {one.seconds:5.1f} s")
            if one.verdict == "broken":
                lines.append(f"{'':12}{one.meaning}")
            if one.detail:
                lines.append(f"{'':12}{one.detail}")
        counts = {
            verdict: sum(one.verdict == verdict for one in self.outcomes)
            for verdict in ("kept", "broken", "not tested")
        }
        lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
        lines.append(f"seed {self.seed}")
        return "\n".join(lines)
