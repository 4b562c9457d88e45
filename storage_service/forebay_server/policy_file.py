"""Named policies as the configuration file writes them: tables ``[policies.NAME]``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from forebay_server.model.encodings import SETTINGS
from forebay_server.model.placement import BUILT_IN, Policy
from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import check_name

DEFAULT: Final = Policy("default", copies={"object": None})
"""What holds where nothing is assigned: new bytes land in the fastest tier with room, are copied
into the object tier in the background, and leave a tier when it needs the room."""

KEYS: Final = ("land", "copies", "demote-after-seconds", "encoding")
IDLE: Final = "idle"


def all_policies(own: Mapping[str, Policy]) -> dict[str, Policy]:
    """The built-in ones and *own*, which may replace them, by name."""
    return {DEFAULT.name: DEFAULT, **BUILT_IN, **own}


def parse_policies(tables: object, origin: str) -> dict[str, Policy]:
    """The policies that *tables* (of TOML) declare; InvalidRequest names what is wrong in
    *origin*."""
    if not isinstance(tables, Mapping):
        raise InvalidRequest(f"policies in {origin} are no tables: write [policies.NAME]")
    return {name: _parse(name, table, origin) for name, table in tables.items()}


def _parse(name: str, table: object, origin: str) -> Policy:
    where = f"policy {name!r} in {origin}"
    check_name("policy", name)
    if not isinstance(table, Mapping):
        raise InvalidRequest(f"{where} is no table: write [policies.{name}]")
    keys = {str(key).replace("_", "-"): value for key, value in table.items()}
    for key in keys:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(KEYS)}"
            raise InvalidRequest(f"{where}: unknown key {key!r}: {advice}")
    try:
        return Policy(
            name,
            land=_texts(keys.get("land", ["ssd", "hdd"])),
            copies={kind: _within(value) for kind, value in _table(keys, "copies").items()},
            demote_after_seconds={
                kind: _seconds(value)
                for kind, value in _table(keys, "demote-after-seconds").items()
            },
            encoding={kind: _encoding(value) for kind, value in _table(keys, "encoding").items()},
        )
    except ValueError as error:
        raise InvalidRequest(f"{where}: {error}") from error


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError('land is no list of tiers: write land = ["ssd", "hdd"]')
    return tuple(value)


def _table(keys: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = keys.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is no table: write {key} = {{ ssd = 3600 }}")
    return value


def _encoding(value: object) -> str:
    if value not in SETTINGS:
        raise ValueError(f"there is no encoding {value!r}; there are {', '.join(SETTINGS)}")
    return str(value)


def _within(value: object) -> float | None:
    return None if value == IDLE else _seconds(value)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number of seconds (copies may also say {IDLE!r})")
    return float(value)
