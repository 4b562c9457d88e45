"""Pictures of many runs: losses over seeds."""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from forebay_trainer.metrics.history import Event, History, thinned
from forebay_trainer.metrics.plot import line
from forebay_wire.errors import NotFound

DPI: Final = 80
"""A picture lies in a repository: it stays below 60 KB."""
NUM_COLOURS: Final = 64
MOST_POINTS: Final = 300
MOST_MEANS: Final = 100
MOST_METRICS: Final = 4


def figure_of(num_columns: int, num_rows: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, always as rows of columns; NotFound without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotFound("matplotlib is not here: pip install 'forebay[plot]'") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def mean(runs: Sequence[Sequence[Event]], field: str) -> list[dict[str, float]]:
    """The mean of a field over the runs, at the steps that all of them have."""
    values = [{event["step"]: event[field] for event in run if field in event} for run in runs]
    common = sorted(set.intersection(*(set(each) for each in values)))
    return [
        {"step": step, field: statistics.fmean(each[step] for each in values)} for step in common
    ]


def smooth(points: Sequence[Mapping[str, float]], field: str) -> list[dict[str, float]]:
    """The means of at most `MOST_MEANS` stretches, each at its middle."""
    num = min(MOST_MEANS, len(points))
    bounds = [len(points) * number // num for number in range(num + 1)] if num else []
    parts = [points[first:last] for first, last in itertools.pairwise(bounds)]
    return [
        {name: statistics.fmean(point[name] for point in part) for name in ("step", field)}
        for part in parts
    ]


def losses(runs: Sequence[History], path: Path, title: str) -> None:
    """Writes a PNG: the losses of all runs and their mean, and beneath it each metric that was
    evaluated more than once, on a scale of its own."""
    common = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    is_followed = max(len(run.evaluations) for run in runs) > 1
    common = common[:MOST_METRICS] if is_followed else []
    figure, axes = figure_of(1, 1 + len(common), (8.0, 3.2 + 1.6 * len(common)))
    loss, *below = (axis for (axis,) in axes)
    draw(loss, [run.steps for run in runs], "loss", "training", "C0")
    evaluations = [run.evaluations for run in runs]
    draw(loss, evaluations, "test_loss", "test", "C1", marker="o")
    for number, (axis, name) in enumerate(zip(below, common, strict=True)):
        label = name.removeprefix("test_")
        draw(axis, evaluations, name, label, f"C{number + 2}", marker="o")
        axis.set_ylabel(label)
        axis.sharex(loss)
    loss.set_ylabel("loss")
    for axis in (loss, *below):
        axis.grid(alpha=0.3)
    if loss.get_lines():
        loss.legend()
    (below or [loss])[-1].set_xlabel("step")
    loss.set_title(title)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a PNG of few colours, as those of a diagram are: a third of the bytes."""
    from PIL import Image  # matplotlib has it

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(NUM_COLOURS).save(path, format="PNG", optimize=True)


def draw(
    axis: Any, runs: Sequence[Sequence[Event]], field: str, label: str, color: str, **style: Any
) -> None:
    """Each run thin, and their mean, over some steps where there are many."""
    for run in runs:
        points = thinned(
            [(each["step"], each[field]) for each in run if field in each], MOST_POINTS
        )
        axis.plot(*zip(*points, strict=True), color=color, alpha=0.3, linewidth=0.7)
    means = smooth(mean(runs, field), field)
    line(axis, means, field, label, color=color, linewidth=1.8, markersize=3, **style)
