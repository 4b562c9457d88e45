"""``forebay_trainer plot RUN``: pictures of a run from the JSON lines that it wrote."""

from __future__ import annotations

import argparse
import html
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from forebay_trainer.metrics.history import Event, History, history, thinned
from forebay_trainer.records import read_lines
from forebay_wire.errors import ForebayError, NotFound

MOST_POINTS: Final = 2000
FORMATS: Final = ("png", "html")

PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 75em; color: #222; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ text-align: left; padding: 0.2em 1em 0.2em 0; border-bottom: 1px solid #ddd; }}
</style></head><body><h1>{title}</h1>
{summary}
{picture}
<h2>Evaluations</h2>
{evaluations}
</body></html>
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="forebay_trainer plot", description="Draw a run from its metrics.jsonl."
    )
    parser.add_argument("folder", metavar="RUN", help="output.folder of the run, or the file in it")
    parser.add_argument("--run", help="name of the run, where several wrote into the folder")
    parser.add_argument("--out", type=Path, help="file to write (default: plot.* beside the lines)")
    parser.add_argument("--format", choices=FORMATS, help="only this one (default: both)")
    options = parser.parse_args(arguments)
    try:
        for path in plot(Path(options.folder), options.run, options.out, options.format):
            print(path)
    except ForebayError as error:
        print(f"forebay_trainer: {error.message}", file=sys.stderr)
        return 2
    return 0


def plot(folder: Path, run: str | None, out: Path | None, format_: str | None) -> list[Path]:
    """Writes the pictures and answers where. *out*: with any suffix, or none.

    Raises NotFound where there are no metrics, or no matplotlib.
    """
    lines = folder / "metrics.jsonl" if folder.is_dir() else folder
    if not lines.is_file():
        raise NotFound(
            f"no metrics in {folder}: give the output.folder of a run whose metrics.sinks had jsonl"
        )
    found = history(read_lines(lines), run)
    out = lines.parent / "plot" if out is None else out
    figure, written = draw(found), []
    for name in FORMATS if format_ is None else (format_,):
        path = out.with_suffix(f".{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "png":
            figure.savefig(path, dpi=110)
        else:
            path.write_text(page(found, figure), encoding="utf-8")
        written.append(path)
    return written


def draw(found: History) -> Any:
    """A figure of matplotlib; NotFound without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotFound("matplotlib is not here: pip install 'forebay[plot]'") from error
    figure = Figure(figsize=(10, 12), layout="constrained")
    loss, quality, times, waits = figure.subplots(4, 1, sharex=True)

    line(loss, found.steps, "loss", "loss")
    line(loss, found.evaluations, "test_loss", "test loss", marker="o")
    for name in found.metrics:
        line(quality, found.evaluations, name, name.removeprefix("test_"), marker="o")
    line(times, found.steps, "step_seconds", "step (ms)", 1e3)
    saved = {event["step"] for event in found.saves}
    steps = [event for event in found.steps if event["step"] in saved]
    line(times, steps, "step_seconds", "with a save", 1e3, marker="v", linestyle="none")
    line(waits, found.steps, "data_wait_seconds", "data wait (ms)", 1e3)
    line(waits, found.saves, "stall_seconds", "stall of a save (ms)", 1e3, marker="v")

    labels = ("loss", "evaluation", "ms", "ms")
    for axis, label in zip((loss, quality, times, waits), labels, strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.get_lines():
            axis.legend(loc="lower right" if axis is quality else "upper right")
        for start in found.starts[1:]:
            axis.axvline(start["step"], color="black", linestyle=":", linewidth=1)
    for axis in (times, waits):
        if axis.get_lines():
            axis.set_yscale("log")
    waits.set_xlabel("step (dotted: resumed)")
    figure.suptitle(title(found))
    return figure


def line(
    axis: Any, events: Sequence[Event], field: str, label: str, scale: float = 1.0, **style: Any
) -> None:
    points = [(event["step"], event[field] * scale) for event in events if field in event]
    if points:
        steps, values = zip(*thinned(points, MOST_POINTS), strict=True)
        axis.plot(steps, values, **{"linewidth": 1, "markersize": 4, "label": label, **style})


def title(found: History) -> str:
    return f"Run {found.run}: {len(found.starts)} attempt(s), {len(found.steps)} steps"


def page(found: History, figure: Any) -> str:
    """One HTML file that needs nothing else."""
    names = ["test_loss", *found.metrics]
    rows = [
        [str(event["step"]), *(f"{event.get(name, float('nan')):.4f}" for name in names)]
        for event in found.evaluations
    ]
    return PAGE.format(
        title=html.escape(title(found)),
        summary=table(found.summary()),
        picture=vector(figure),
        evaluations=table(rows, ["step", *(name.removeprefix("test_") for name in names)]),
    )


def vector(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    cells = [(row, "td") for row in rows]
    if header:
        cells.insert(0, (header, "th"))
    lines = (
        "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>"
        for row, kind in cells
    )
    return f"<table>{''.join(lines)}</table>"
