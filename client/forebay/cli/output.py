"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console


def print_json(value: Any) -> None:
    """*value* as indented JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def record(message: Message) -> dict[str, Any]:
    """A protobuf message as a JSON object with all its fields, numbers as numbers."""
    return {field.name: _plain(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(value: Any) -> Any:
    if hasattr(value, "DESCRIPTOR"):
        return record(value)
    if isinstance(value, (str, int, float, bool)):
        return value
    return [_plain(one) for one in value]


def console() -> Console:
    """Where tables go; plain text unless standard output is a terminal."""
    from rich.console import Console  # not needed for --json and --help

    # Piped output is wide: a table cut at 80 columns would lose what was asked for.
    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, width=width, soft_wrap=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """A table; a column whose title starts with ``>`` is aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=_escaped(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left")
    for row in rows:
        table.add_row(*[_escaped(cell) for cell in row])
    console().print(table)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """``name  value`` lines, aligned."""
    pairs = list(fields)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"{name:<{width}}  {value}")


def _escaped(cell: str) -> str:
    return cell.replace("[", "\\[")


def size(num_bytes: int) -> str:
    """*num_bytes* with a binary unit: ``12.3 MiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def moment(seconds: float) -> str:
    """A point in time, in seconds since 1970, as local time."""
    if not seconds:
        return ""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
