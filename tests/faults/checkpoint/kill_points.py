"""What is killed at which point of a save, and what must be left: the table of the kill matrix.

``docs/operate/failures.md`` is printed from it: ``python tests/faults/checkpoint/kill_points.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from forebay_wire.failpoints import (
    CLIENT_SAVE,
    GENERATION_BEGIN,
    GENERATION_COMMIT,
    REMOTE_FLUSH,
    SHARING,
)

Outcome = Literal["before", "saved", "whole"]
Victim = Literal["trainer", "daemon", "both", "rank"]

VICTIMS: Final[tuple[Victim, ...]] = ("trainer", "daemon", "both", "rank")

MEANINGS: Final[dict[Outcome, str]] = {
    "before": "The generation before is the newest one; the save is not listed as committed.",
    "saved": "The generation that was being saved is there, whole, and is the newest one.",
    "whole": "One of the two: the save's caller may not have heard of its end, or a rank that went "
    "on ended it.",
}


@dataclass(frozen=True)
class Point:
    """A named place that a save passes."""

    name: str
    process: Literal["trainer", "daemon"]
    when: str
    trainer: Outcome
    """What is left if the trainer, all of its ranks, is killed while the process is there."""
    daemon: Outcome
    """If the daemon is, and started again while the trainer lives."""
    both: Outcome
    rank: Outcome
    """If one of four ranks is, and the others live."""

    def left_by(self, victim: Victim) -> Outcome:
        outcome: Outcome = getattr(self, victim)
        return outcome


POINTS: Final = (
    Point("attempt.before_commit", "daemon", "before the attempt is recorded",
          "before", "whole", "before", "before"),
    Point("attempt.after_commit", "daemon", "the attempt is recorded, nobody told",
          "before", "whole", "before", "before"),
    Point("client.save.after_plan", "trainer", "the ranks agreed who saves what",
          "before", "saved", "before", "before"),
    Point("pack.before_begin", "daemon", "before room is reserved for a rank's pack",
          "before", "saved", "before", "before"),
    Point("pack.after_begin", "daemon", "room is reserved, the slot lent, nobody told",
          "before", "saved", "before", "before"),
    Point("client.save.after_begin", "trainer", "a rank has its slot, and no more than bytes in it",
          "before", "saved", "before", "before"),
    Point("client.save.in_copy", "trainer", "the tensors are copied, their description is not",
          "before", "saved", "before", "before"),
    Point("client.save.after_copy", "trainer", "the copy is complete, not sealed",
          "before", "saved", "before", "before"),
    Point("pack.before_seal", "daemon", "a rank's seal has arrived",
          "whole", "saved", "before", "whole"),
    Point("pack.after_seal", "daemon", "the seal is recorded, the rank not told",
          "saved", "saved", "before", "whole"),
    Point("client.save.after_seal", "trainer", "a rank knows that its pack is sealed",
          "saved", "saved", "whole", "whole"),
    Point("upload.before_publish", "daemon", "the bytes are written, the file has no name",
          "saved", "saved", "before", "whole"),
    Point("upload.after_publish", "daemon", "the file is durable, the catalog does not know it",
          "saved", "saved", "before", "whole"),
    Point("upload.before_list", "daemon", "of a pack that shares bytes: its list is not written",
          "saved", "saved", "before", "whole"),
    Point("upload.after_list", "daemon", "its list is durable, the catalog does not know it",
          "saved", "saved", "before", "whole"),
    Point("generation.before_commit", "daemon", "within the last rank's transaction",
          "saved", "saved", "before", "whole"),
    Point("generation.inside_commit", "daemon", "all rows are written, nothing is committed",
          "saved", "saved", "before", "whole"),
    Point("upload.after_row", "daemon", "committed, the pack's session not ended",
          "saved", "saved", "whole", "whole"),
    Point("generation.after_commit", "daemon", "committed, nobody told",
          "saved", "saved", "saved", "saved"),
    Point("flush.before_blob", "daemon", "local, nothing is in the object tier",
          "saved", "saved", "saved", "saved"),
    Point("flush.after_blob", "daemon", "a pack is in the object tier",
          "saved", "saved", "saved", "saved"),
    Point("flush.after_extents", "daemon", "its list of pieces, too",
          "saved", "saved", "saved", "saved"),
    Point("flush.before_manifest", "daemon", "all but the manifest",
          "saved", "saved", "saved", "saved"),
    Point("flush.after_manifest", "daemon", "the manifest is there, not recorded as remote",
          "saved", "saved", "saved", "saved"),
)  # fmt: skip

PASSED: Final = frozenset(
    [*GENERATION_BEGIN, *GENERATION_COMMIT, *SHARING, *REMOTE_FLUSH, "upload.after_row"]
    + [name for name in CLIENT_SAVE if name.startswith("client.save.")]
)
"""All points that a save passes: each is in the table."""

INTRODUCTION: Final = """\
# What a failure leaves of checkpoints

A test holds a save at each named point below and kills what the column says with SIGKILL, starts a
daemon that died again, and looks at what is left. *Trainer* is all of its ranks, *one rank* is one
of four, whose others go on. Whatever was killed wherever:

- generations that were committed before are restored bit for bit,
- nothing partial is visible: what is listed as committed is restored bit for bit,
- a new attempt restores the newest one and saves on,
- once the run is deleted and garbage collected, no file, catalog row or memory of it is left.

What was sealed by all ranks lands without its trainer; a daemon that died before that is offered
the slot's bytes again by a trainer that lives. So what is left of the save itself depends on who is
killed where:
"""

PAGE: Final = Path(__file__).parents[3] / "docs" / "operate" / "failures.md"


def render() -> str:
    """The page."""
    lines = [INTRODUCTION]
    for outcome, meaning in MEANINGS.items():
        lines.append(f"- **{outcome}**: {meaning}")
    lines += [
        "",
        "| point | reached by | when | trainer killed | daemon killed | both killed "
        "| one rank killed |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in POINTS:
        left = " | ".join(point.left_by(victim) for victim in VICTIMS)
        lines.append(f"| `{point.name}` | {point.process} | {point.when} | {left} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
