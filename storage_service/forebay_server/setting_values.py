"""What people write as the value of a setting; ValueError says what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from forebay_server.model.watermarks import Watermarks

_SIZE: Final = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?\s*$", re.IGNORECASE)
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


def parse_size(value: object) -> int:
    """Bytes of ``512MiB``, ``10GB`` (decimal), ``1048576`` or an integer."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a size: write bytes or a unit, as in 512MiB, 10GB, 1048576")
    number, unit, binary = match.groups()
    power = " kmgtp".index(unit.lower() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number of seconds")
    seconds = float(value)
    if not 0 <= seconds < float("inf"):
        raise ValueError("not a number of seconds, 0 or more")
    return seconds


def parse_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ValueError("neither true nor false")
    return text in _TRUE


def parse_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value.strip()


def parse_path(value: object) -> Path:
    text = str(value) if isinstance(value, Path) else parse_text(value)
    if not text:
        raise ValueError("an empty path")
    return Path(text).expanduser()


def parse_texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, Sequence):
        raise ValueError("not a list of texts")
    return tuple(parse_text(part) for part in value)


def parse_watermarks(value: object) -> str:
    try:
        Watermarks.parse(str(value))
    except ValueError:
        raise ValueError(
            "not three percentages in ascending order, above 0 and at most 100, as in 85,92,97"
        ) from None
    return str(value)
