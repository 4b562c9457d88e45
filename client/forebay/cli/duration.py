"""Durations as people write them: ``90``, ``45s``, ``30m``, ``2h``, ``1d``."""

from __future__ import annotations

import re
from typing import Any

import click

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Duration(click.ParamType):  # type: ignore[type-arg] # generic in some versions only
    """Seconds, as a float."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(value))
        if found is None:
            self.fail(f"{value!r} is no duration: write 90, 45s, 30m, 2h or 1d", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]
