"""``forebay dataset head``: some rows, to look at."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from forebay.cli.output import print_table, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset

MAX_CELL = 60
"""Letters of a value in a table."""


@click.command("head")
@click.argument("name")
@click.option("-n", "count", default=10, show_default=True, help="How many; negative: the last.")
@click.option("--version", default="latest", show_default=True, help="Of which version.")
@click.option("--split", help="Of which split.")
@click.option("--columns", help="Which, separated by commas. Default: all.")
@with_session
def show_rows(
    session: Session, name: str, count: int, version: str, split: str | None, columns: str | None
) -> None:
    """The first rows of dataset NAME, as a table.

    With --json all of each value, bytes in base64.
    """
    with session.connect() as client:
        dataset = client.dataset(name, version, split)
        rows = first_rows(dataset, count, columns.split(",") if columns else None)
    session.show(
        [{key: plain(value) for key, value in row.items()} for row in rows],
        lambda: print_rows(rows),
    )


def first_rows(
    dataset: Dataset, count: int, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The first *count* samples, or the last; each with its number as ``#``."""
    num_rows = min(abs(count), len(dataset))
    start = 0 if count >= 0 else len(dataset) - num_rows
    batch = dataset.take(np.arange(start, start + num_rows), columns)
    return [
        {"#": start + row, **{column: values[row] for column, values in batch.items()}}
        for row in range(num_rows)
    ]


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """As a table; long values are cut."""
    if not rows:
        print("no rows")
        return
    titles = [f">{name}" if name == "#" else name for name in rows[0]]
    print_table(titles, [[cell(value) for value in row.values()] for row in rows])


def cell(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, (bytes, bytearray)):
        return f"{size(len(value))}: {bytes(value[:8]).hex(' ')}{' …' if len(value) > 8 else ''}"
    if isinstance(value, np.ndarray) and value.ndim > 1:
        shape = "×".join(map(str, value.shape))
        return f"{value.dtype} {shape}, {value.min()} to {value.max()}" if value.size else shape
    text = " ".join(str(value.tolist() if isinstance(value, np.ndarray) else value).split())
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 2]} …"


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
