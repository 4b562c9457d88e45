"""What a loader's saved state is checked for, whatever it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forebay_wire.errors import InvalidRequest


def check_is_state(state: Any) -> None:
    """Raise unless *state* may be one at all."""
    if not isinstance(state, Mapping):
        raise InvalidRequest(
            f"a loader state is no {type(state).__name__}: pass what state_dict() returned, "
            "or do not call load_state_dict to start anew"
        )


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless a saved *state* and a loader's *own* mean the same order."""
    check_is_state(state)
    if state.get("kind") != own["kind"] or state.get("format") != own["format"]:
        raise InvalidRequest(
            f"this loader reads a {own['kind']}; the state is of "
            f"{state.get('kind', 'a dataset')!r}, format "
            f"{state.get('format')!r}: pass what state_dict() returned for the same"
        )
    for name, value in own.items():
        if name not in state:
            raise InvalidRequest(f"loader state lacks {name!r}: it is not complete")
        if state[name] != value:
            raise InvalidRequest(
                f"the state was taken with {name}={state[name]!r}, this loader has {value!r}: make "
                "it with the same datasets, versions, weights and options"
            )


def whole_numbers(state: Mapping[str, Any], *names: str) -> list[int]:
    """The numbers called *names* of a loader's *state*."""
    found = [state.get(name) for name in names]
    if any(type(value) is not int or value < 0 for value in found):
        raise InvalidRequest(f"loader state: {', '.join(names)} are numbers from 0 on")
    return [value for value in found if value is not None]
