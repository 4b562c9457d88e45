"""What the client of the object store is told beside the URL; credentials are never shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_SHOWN: Final = frozenset(
    {"addressing_style", "ca_file", "endpoint_url", "profile", "region", "host", "port", "protocol"}
)
"""All others may be credentials of some file system."""


@dataclass(frozen=True)
class ObjectOptions:
    """Names and values, in the order in which they were given."""

    pairs: tuple[tuple[str, Any], ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, value: object) -> ObjectOptions:
        """Of a TOML table, or of ``name=value,name=value``. The error never shows a value."""
        if isinstance(value, ObjectOptions):
            return value
        if isinstance(value, Mapping):
            return cls(tuple((str(name), one) for name, one in value.items()))
        if not isinstance(value, str):
            raise ValueError("neither a table nor name=value,name=value")
        parts = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(name.strip() and sign for name, sign, _ in parts):
            raise ValueError("write name=value,name=value")
        return cls(tuple((name.strip(), one.strip()) for name, _, one in parts))

    def as_dict(self) -> dict[str, Any]:
        return dict(self.pairs)

    def without_credentials(self) -> dict[str, Any]:
        """Those that may be shown, and written where nobody asked for it."""
        return {name: value for name, value in self.pairs if name in _SHOWN}

    def __str__(self) -> str:
        return ",".join(f"{name}={one if name in _SHOWN else '***'}" for name, one in self.pairs)
