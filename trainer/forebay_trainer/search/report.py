"""What a sweep came to: a table, a picture, and ``sweep.json``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from forebay_trainer.metrics.console import duration
from forebay_trainer.search.job import toml_text
from forebay_trainer.search.outcome import write_json
from forebay_trainer.search.picture import figure_of, save
from forebay_trainer.search.study import Row

FILE: Final = "sweep.json"
PICTURE: Final = "sweep.png"
COLOURS: Final = {"done": "C0", "pruned": "C7", "failed": "C3"}
NUM_COLUMNS: Final = 3


def write(
    folder: Path,
    rows: Sequence[Row],
    best: Row | None,
    importances: Mapping[str, float],
    *,
    facts: Mapping[str, Any],
    command: Sequence[str] | None,
    title: str,
) -> dict[str, Any]:
    """Writes the picture and the JSON; answers what stands in that."""
    outcome = {
        **facts,
        "trials": [asdict(row) for row in rows],
        "best": None if best is None else asdict(best),
        "importances": dict(importances),
        "command": None if command is None else shlex.join(command),
    }
    draw(rows, importances, outcome, folder / PICTURE, title)
    write_json(folder / FILE, outcome)
    return outcome


def show(console: Console, outcome: Mapping[str, Any]) -> None:
    """The table, the best trial, and how to train it again."""
    best = outcome["best"]
    table = Table(box=None, pad_edge=False)
    names = list(outcome["space"])
    for name in ("trial", "state", outcome["metric"], *names, "steps", "time"):
        table.add_column(name, justify="right" if name != "state" else "left", overflow="fold")
    for row in outcome["trials"]:
        is_best = best is not None and row["number"] == best["number"]
        table.add_row(
            str(row["number"]),
            row["state"],
            "" if row["value"] is None else f"{row['value']:.5g}",
            *(shown(row["values"].get(name)) for name in names),
            str(row["steps"]),
            duration(row["seconds"]),
            style="bold green" if is_best else "dim" if row["state"] != "done" else "",
        )
    console.print(table)
    for row in outcome["trials"]:
        if row["reason"]:
            console.print(f"trial {row['number']} failed: {row['reason']}", markup=False)
    if best is not None:
        text = f"best: trial {best['number']}, {outcome['metric']} {best['value']:.5g}; again by"
        console.print(text, markup=False)
        console.print(f"  {outcome['command']}", markup=False, soft_wrap=True)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value if isinstance(value, str) else toml_text(value)


def draw(
    rows: Sequence[Row],
    importances: Mapping[str, float],
    outcome: Mapping[str, Any],
    path: Path,
    title: str,
) -> None:
    """History of the sweep, each key against the value, and how much each key matters."""
    names = list(outcome["space"])
    num_panels = 1 + len(names) + bool(importances)
    num_rows = -(-num_panels // NUM_COLUMNS)
    columns = min(num_panels, NUM_COLUMNS)
    figure, axes = figure_of(columns, num_rows, (4.0 * columns, 3.0 * num_rows))
    panels = [axis for line in axes for axis in line]
    draw_history(panels[0], rows, outcome)
    for name, axis in zip(names, panels[1:], strict=False):
        draw_key(axis, rows, name, is_log="(log)" in outcome["space"][name])
    if importances:
        axis = panels[len(names) + 1]
        ordered = sorted(importances.items(), key=lambda item: item[1])
        axis.barh([name.rpartition(".")[2] for name, _ in ordered], [value for _, value in ordered])
        axis.set_xlabel("importance (PED-ANOVA)")
    for axis in panels[num_panels:]:
        axis.remove()
    figure.suptitle(title)
    save(figure, path)


def draw_history(axis: Any, rows: Sequence[Row], outcome: Mapping[str, Any]) -> None:
    choose = min if outcome["mode"] == "min" else max
    for state, colour in COLOURS.items():
        found = [
            (row.number, row.value) for row in rows if row.state == state and row.value is not None
        ]
        if found:
            axis.scatter(*zip(*found, strict=True), color=colour, s=14, label=state)
    best: list[tuple[int, float]] = []
    for row in rows:
        if row.state == "done" and row.value is not None:
            value = choose(row.value, best[-1][1]) if best else row.value
            best.append((row.number, value))
    if best:
        axis.step(*zip(*best, strict=True), where="post", color="C1", label="best so far")
        axis.legend()
    axis.set_xlabel("trial")
    axis.grid(alpha=0.3)


def draw_key(axis: Any, rows: Sequence[Row], name: str, *, is_log: bool) -> None:
    done = [row for row in rows if row.value is not None and name in row.values]
    for state, colour in COLOURS.items():
        found = [(row.values[name], row.value) for row in done if row.state == state]
        if found:
            numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x, _ in found)
            points = found if numbers else [(shown(x), y) for x, y in found]
            axis.scatter(*zip(*points, strict=True), color=colour, s=14)
    if is_log and done:
        axis.set_xscale("log")
    axis.set_xlabel(name)
    axis.grid(alpha=0.3)
