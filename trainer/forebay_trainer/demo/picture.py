"""The picture of a run: loss, waiting for data, and checkpoint stall over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay_wire.errors import NotFound

Event = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One diagram: a field of one kind of events, times ``scale``."""

    field: str
    label: str
    scale: float = 1.0
    event: str = "step"
    is_logarithmic: bool = False


PANELS = (
    Panel("loss", "loss"),
    # The first batch of an attempt takes far longer than the others.
    Panel("data_wait_seconds", "data wait (ms)", 1000.0, is_logarithmic=True),
    Panel("stall_seconds", "checkpoint stall (ms)", 1000.0, event="save"),
)


def draw(events: Sequence[Event], path: Path) -> None:
    """Writes a PNG; the starts of attempts are marked, rolled-back steps are pale."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotFound("matplotlib is not here: pip install 'forebay[demo]'") from error
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    starts = [event for event in events if event["event"] == "start"]
    for panel, axis in zip(PANELS, axes, strict=True):
        for index, start in enumerate(starts):
            later = starts[index + 1] if index + 1 < len(starts) else None
            _draw_attempt(panel, axis, events, start, later)
        axis.set_ylabel(panel.label)
        axis.set_yscale("log" if panel.is_logarithmic else "linear")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper right")
    axes[-1].set_xlabel("seconds since the first start")
    figure.suptitle("Training through Forebay: killed, resumed on other ranks, exactly once")
    figure.savefig(path, dpi=110)


def _draw_attempt(
    panel: Panel, axis: Any, events: Sequence[Event], start: Event, later: Event | None
) -> None:
    zero, attempt = events[0]["time"], start["attempt"]
    points = [
        (event["time"] - zero, event[panel.field] * panel.scale, event["step"])
        for event in events
        if event["event"] == panel.event and event["attempt"] == attempt
    ]
    kept = [point for point in points if later is None or point[2] <= later["step"]]
    for shown, alpha in ((points, 0.35), (kept, 1.0)):
        axis.plot(
            [time for time, _, _ in shown],
            [value for _, value, _ in shown],
            color=f"C{(attempt - 1) % 10}",
            alpha=alpha,
            marker=".",
            markersize=4,
            linewidth=1,
            label=f"attempt {attempt}, {start['num_ranks']} ranks" if alpha == 1.0 else None,
        )
    if later is not None:
        _mark_resume(axis, later["time"] - zero, later)


def _mark_resume(axis: Any, time: float, start: Event) -> None:
    axis.axvline(time, color="black", linestyle="--", linewidth=1)
    axis.annotate(
        f"resumed from step {start['step']} on {start['num_ranks']} rank(s)",
        xy=(time, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=7,
    )
