"""What a rank says when its pack is complete, checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Final

from forebay_wire.errors import InvalidRequest
from forebay_wire.keep import check_tag
from forebay_wire.limits import check_limit

MAX_RANK_JSON_BYTES: Final = 1 << 20
"""Metrics, and dataset with position: they are O(1) in the size of model and data."""


@dataclass(frozen=True)
class PackSeal:
    """What a rank says when its pack is complete."""

    session: str
    sequence: int
    num_bytes: int
    """Of the slot, from its start: the pack's last bytes."""
    cuts: tuple[int, ...]
    description_bytes: int
    """JSON, in the slot right behind ``num_bytes``."""
    metrics_json: str
    """``{"name": number}`` from rank 0, else empty."""
    dataset_json: str
    """Dataset version and position from rank 0, else empty."""
    tags: tuple[str, ...] = ()
    """From rank 0: given to the generation when it is committed."""
    note_json: str = ""
    """An object of the user's own from rank 0, else empty."""
    stall_seconds: float = 0.0
    """How long the save held the rank up; 0: not known."""


def told_by(seal: PackSeal) -> dict[str, str]:
    """What a rank says about its generation, checked, by column of the catalog."""
    tags = [check_tag(tag) for tag in seal.tags]
    told = {
        "metrics": _check_metrics(seal.metrics_json),
        "dataset": _check_dataset(seal.dataset_json),
        "note": check_note(seal.note_json),
        "wanted_tags": json.dumps(tags) if tags else "",
    }
    return {column: text for column, text in told.items() if text}


def _parse_rank_json(what: str, text: str) -> Any:
    check_limit(f"bytes of the {what}", len(text.encode()), MAX_RANK_JSON_BYTES, "save less")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"the {what} are no JSON: {error}") from error


def _check_metrics(text: str) -> str | None:
    """The metrics if they are ``{"name": number}``; None if there are none."""
    if not text:
        return None
    parsed = _parse_rank_json("metrics", text)
    good = isinstance(parsed, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in parsed.values()
    )
    if not good:
        raise InvalidRequest('metrics have to be {"name": number} with finite numbers')
    return text


def _check_dataset(text: str) -> str | None:
    """The dataset version with its position if it is a JSON object; None if there is none."""
    if not text:
        return None
    parsed = _parse_rank_json("dataset and position", text)
    if parsed is not None and not isinstance(parsed, dict):
        raise InvalidRequest("dataset and position have to be a JSON object")
    return text if parsed is not None else None


def check_note(text: str) -> str:
    """*text* if it is a JSON object, or empty."""
    if text and not isinstance(_parse_rank_json("note", text), dict):
        raise InvalidRequest("a note has to be a JSON object")
    return text
