"""What is kept of a run's generations: the policy that people write and the daemon applies."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any, Final

from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import check_name
from forebay_wire.limits import MAX_NAME_BYTES

MODES: Final = ("max", "min")
SELECTORS: Final = ("latest", "best")
"""Words that mean a generation of any run: no tag is called so."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What is kept of a run: whatever any of these rules keeps; the rest is deleted.

        forebay.Keep(last=3, every_steps=10_000, best="accuracy", mode="max", best_k=2)

    Only committed generations of which every byte has a good copy count: what failed, was aborted
    or is damaged takes nobody's place. Whatever the rules: the newest good one stays, what the
    newest attempt stands on, what is pinned, what somebody reads, what a fork still needs, and
    with ``tags`` what has a tag. Rules are about the lineage of the newest attempt, and about each
    that an attempt ended which restored nothing, for itself; generations that a rollback left
    behind go once something newer is committed on theirs, unless ``ttl`` keeps them.
    """

    last: int = 0
    """The newest so many."""
    every_steps: int = 0
    """The first at or after each multiple of so many steps."""
    every_seconds: float | timedelta = 0.0
    """The first, then the next that is at least so much younger, and so on."""
    every_hours: float = 0.0
    """``every_seconds`` in hours; one of the two."""
    best: str = ""
    """The metric by which the best ``best_k`` are kept. One without it, or whose value is not
    finite, is none of them; of equal ones the newer is better. While no generation has it, all
    stay."""
    best_k: int = 1
    mode: str = "max"
    """Whether more of the metric is better (``"max"``) or less (``"min"``)."""
    ttl: float | timedelta = 0.0
    """Seconds that each is kept, counted from its commit."""
    tags: bool = True
    """Whether what has a tag is kept."""

    def __post_init__(self) -> None:
        seconds = _seconds("every_seconds", self.every_seconds)
        hours = _seconds("every_hours", self.every_hours)
        if seconds and hours:
            raise InvalidRequest("Keep: give every_seconds or every_hours, not both")
        object.__setattr__(self, "every_seconds", seconds or hours * 3600.0)
        object.__setattr__(self, "every_hours", 0.0)
        object.__setattr__(self, "ttl", _seconds("ttl", self.ttl))
        for name, least in (("last", 0), ("every_steps", 0), ("best_k", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequest(f"Keep({name}={value!r}): use a whole number from {least}")
        if not isinstance(self.best, str) or len(self.best.encode()) > MAX_NAME_BYTES:
            raise InvalidRequest(f"Keep(best={self.best!r}): use the name of a metric")
        if self.mode not in MODES:
            raise InvalidRequest(f"Keep(mode={self.mode!r}): use 'max' or 'min'")
        if not isinstance(self.tags, bool):
            raise InvalidRequest(f"Keep(tags={self.tags!r}): use True or False")
        if not (self.last or self.every_steps or self.every_seconds or self.best or self.ttl):
            raise InvalidRequest(
                "Keep names no rule (0 is none): give last, every_steps, every_seconds, best "
                "or ttl from 1 on; to keep everything, give no Keep"
            )

    @property
    def interval_seconds(self) -> float:
        """Of ``every_seconds`` or ``every_hours``."""
        assert isinstance(self.every_seconds, float)
        return self.every_seconds

    @property
    def ttl_seconds(self) -> float:
        assert isinstance(self.ttl, float)
        return self.ttl

    def to_json(self) -> str:
        """Canonical: equal policies have equal texts."""
        values = {field.name: field.default for field in fields(self)}
        told = {name: value for name, value in asdict(self).items() if value != values[name]}
        return json.dumps(told, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Keep | None:
        """The inverse; None for an empty text. :class:`InvalidRequest` for anything else."""
        if not text:
            return None
        try:
            told: Any = json.loads(text)
        except ValueError as error:
            raise InvalidRequest(f"what is to be kept is no JSON: {error}") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(told, dict) or not set(told) <= known:
            raise InvalidRequest(f"what is to be kept is no Keep: {text[:200]}")
        return cls(**told)

    def __str__(self) -> str:
        told = json.loads(self.to_json())
        return f"Keep({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def _seconds(name: str, value: float | timedelta) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    good = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not good or not math.isfinite(seconds) or seconds < 0:
        raise InvalidRequest(f"Keep({name}={value!r}): use a number from 0, or a timedelta")
    return float(seconds)


def check_tag(tag: str) -> str:
    """*tag* if a generation may be called so: a name that no selector is."""
    check_name("tag", tag)
    if tag.isdecimal() or tag in SELECTORS:
        raise InvalidRequest(
            f"a tag cannot be called {tag!r}: that means "
            + ("a step" if tag.isdecimal() else f"the {tag} generation")
            + "; choose a name with a letter that is none of 'latest', 'best'"
        )
    return tag


def is_tag(text: str) -> bool:
    """Whether a generation may be called so."""
    try:
        check_tag(text)
    except InvalidRequest:
        return False
    return True
