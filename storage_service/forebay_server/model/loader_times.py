"""What loaders tell of their time: checked, kept by loader, added up over all of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from forebay_wire.errors import InvalidRequest

MAX_LOADERS: Final = 8192
"""Whose last sums are remembered, so that what they tell next is added once."""

MAX_CAUSES: Final = 32
MAX_CAUSE_CHARACTERS: Final = 32
MAX_TEXT_CHARACTERS: Final = 500

_NUMBERS: Final = ("samples", "batches", "bytes_read", "masked_samples")
_SECONDS: Final = ("seconds", "wait_seconds")
_BY_CAUSE: Final = ("stalls", "reading")


@dataclass(frozen=True)
class LoaderTimes:
    """The sums of one loader since it was made; the field names are those that it tells."""

    name: str
    """Random: of the loader, which may have several plans in its life."""
    samples: int = 0
    batches: int = 0
    bytes_read: int = 0
    masked_samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    stalls: Mapping[str, float] = field(default_factory=dict)
    """Cause to seconds that the training loop waited."""
    reading: Mapping[str, float] = field(default_factory=dict)
    """Cause to seconds in the threads or workers that read."""
    advice: str = ""
    covers: str = ""

    @classmethod
    def parse(cls, told: object) -> LoaderTimes:
        """From the JSON object *told*; InvalidRequest for what is none. Unknown keys, of a newer
        client, are left out."""
        if not isinstance(told, dict):
            raise InvalidRequest("a loader's times are an object")
        name = told.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_CAUSE_CHARACTERS:
            raise InvalidRequest("a loader's times need its name")
        numbers = {key: int(_number(told, key)) for key in _NUMBERS}
        seconds = {key: _number(told, key) for key in _SECONDS}
        by_cause = {key: _causes(told, key) for key in _BY_CAUSE}
        texts = {key: str(told.get(key, ""))[:MAX_TEXT_CHARACTERS] for key in ("advice", "covers")}
        return cls(name, **numbers, **seconds, **by_cause, **texts)  # type: ignore[arg-type]


class LoaderTotals:
    """What all loaders together told since the start. Sums only grow."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, LoaderTimes] = OrderedDict()
        self.samples = 0
        self.masked_samples = 0
        self.stalls: dict[str, float] = {}
        """Cause to seconds."""
        self.reading: dict[str, float] = {}

    def add(self, times: LoaderTimes) -> None:
        """Add what is new since the loader last told its sums."""
        before = self._last.pop(times.name, LoaderTimes(times.name))
        self._last[times.name] = times
        if len(self._last) > MAX_LOADERS:
            self._last.popitem(last=False)
        self.samples += max(0, times.samples - before.samples)
        self.masked_samples += max(0, times.masked_samples - before.masked_samples)
        _add_new(self.stalls, times.stalls, before.stalls)
        _add_new(self.reading, times.reading, before.reading)


def _add_new(
    total: dict[str, float], now: Mapping[str, float], before: Mapping[str, float]
) -> None:
    for cause, seconds in now.items():
        if cause in total or len(total) < MAX_CAUSES:
            total[cause] = total.get(cause, 0.0) + max(0.0, seconds - before.get(cause, 0.0))


def _number(told: Mapping[str, object], key: str) -> float:
    value = told.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"a loader's times: {key!r} is a number, not {value!r}")
    if not math.isfinite(value) or value < 0:
        raise InvalidRequest(f"a loader's times: {key!r} is {value!r}")
    return value


def _causes(told: Mapping[str, object], key: str) -> dict[str, float]:
    value = told.get(key, {})
    if not isinstance(value, dict) or len(value) > MAX_CAUSES:
        raise InvalidRequest(f"a loader's times: {key!r} is an object of some causes")
    if not all(isinstance(cause, str) and cause.isidentifier() for cause in value):
        raise InvalidRequest(f"a loader's times: {key!r} has causes with names")
    return {cause[:MAX_CAUSE_CHARACTERS]: _number(value, cause) for cause in value}
