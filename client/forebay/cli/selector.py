"""Which generation a user means."""

from __future__ import annotations

from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import GenerationId


def split_run(run: str, generation: str | None) -> tuple[str, str | None]:
    """``(run, generation)`` of RUN and GENERATION, or of RUN@ATTEMPT/STEP in one word."""
    if generation is not None or "@" not in run:
        return run, generation
    found = GenerationId.parse(run)
    return found.run, f"{found.attempt}/{found.step}"


def parse_generation(text: str) -> tuple[int | None, int]:
    """``(attempt or None, step)`` of ATTEMPT/STEP or STEP."""
    attempt, _, step = text.rpartition("/")
    if not step.isdigit() or not (attempt.isdigit() or "/" not in text):
        raise InvalidRequest(f"generation {text!r} is not of the form STEP or ATTEMPT/STEP")
    return (int(attempt) if attempt else None), int(step)
