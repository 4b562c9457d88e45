"""The picture of a run: loss, waiting for data, and checkpoint stall over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forebay_wire.errors import NotFound

Event = dict[str, Any]

PANELS = (
    ("loss", "loss", 1.0),
    ("data_wait_seconds", "data wait (ms)", 1000.0),
    ("stall_seconds", "checkpoint stall (ms)", 1000.0),
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
    zero = starts[0]["time"]
    for panel, (field, label, scale) in zip(axes, PANELS, strict=True):
        for index, start in enumerate(starts):
            later = starts[index + 1] if index + 1 < len(starts) else None
            _draw_attempt(panel, events, start, later, field, scale, zero)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    axes[0].legend(loc="upper right")
    axes[-1].set_xlabel("seconds since the first start")
    figure.suptitle("Training through Forebay: killed, resumed on other ranks, exactly once")
    figure.savefig(path, dpi=110)


def _draw_attempt(
    panel: Any,
    events: Sequence[Event],
    start: Event,
    later: Event | None,
    field: str,
    scale: float,
    zero: float,
) -> None:
    attempt = start["attempt"]
    steps = [e for e in events if e["event"] == "step" and e["attempt"] == attempt]
    kept = [step for step in steps if later is None or step["step"] <= later["step"]]
    for points, alpha in ((steps, 0.35), (kept, 1.0)):
        panel.plot(
            [point["time"] - zero for point in points],
            [point[field] * scale for point in points],
            color=f"C{(attempt - 1) % 10}",
            alpha=alpha,
            marker=".",
            markersize=3,
            linewidth=1,
            label=f"attempt {attempt}, {start['num_ranks']} ranks" if alpha == 1.0 else None,
        )
    if later is not None:
        panel.axvline(later["time"] - zero, color="black", linestyle="--", linewidth=1)
        panel.annotate(
            f"resumed from step {later['step']} on {later['num_ranks']} rank(s)",
            xy=(later["time"] - zero, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=7,
        )
