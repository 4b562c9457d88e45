"""One line a step that a person can read; colours where there is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from forebay_trainer.metrics import Event, MetricsConfig

Print = Callable[[str, str], None]
"""Prints a line of an event."""

SHORTEST_STALL: Final = 1e-3
"""In seconds; each step asks the checkpointer whether it may go on, which takes microseconds."""

STYLES: Final = {"start": "bold", "evaluation": "green", "epoch": "bold", "save": "dim"}
"""Of whole lines, on a terminal."""


class Console:
    """Writes to standard output. At most one step's line in *seconds*; all other events."""

    def __init__(self, print_line: Print, seconds: float = 0.0) -> None:
        self._print = print_line
        self._seconds = seconds
        self._shown = -float("inf")

    @classmethod
    def open(cls, config: MetricsConfig, folder: Path, attempt: int) -> Self:
        print_line = styled() if sys.stdout.isatty() else plain
        return cls(print_line, config.console_seconds)

    def write(self, event: Event) -> None:
        kind = event["event"]
        if kind == "step":
            now = time.monotonic()
            if now < self._shown + self._seconds:
                return
            self._shown = now
        line = LINES[kind](event) if kind in LINES else None
        if line:
            self._print(line, kind)

    def close(self) -> None:
        pass


def plain(line: str, kind: str) -> None:
    print(line, flush=True)


def styled() -> Print:
    from rich.console import Console as Terminal  # only where somebody looks
    from rich.text import Text

    terminal = Terminal(highlight=False)

    def print_line(line: str, kind: str) -> None:
        text = Text(line, style=STYLES.get(kind, ""))
        if kind == "step":
            text.highlight_regex(r"loss \S+", "bold cyan")
            text.highlight_regex(r"(wait|stall) \S+ \S+", "yellow")
        terminal.print(text, soft_wrap=True)

    return print_line


def duration(seconds: float) -> str:
    """As people read it: 3.1 ms, 12.0 s, 2 h 05 min."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def amount(number: float) -> str:
    """Three digits and a thousand's letter: 1.23k, 45.6M."""
    for letter in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1e3
    return f"{number:.3g}T"


def energy(event: Mapping[str, Any]) -> str:
    if "energy_joules" not in event:
        return ""
    joules = event["energy_joules"]
    text = f"{joules / 3.6e6:.3g} kWh" if joules >= 3.6e5 else f"{joules:.3g} J"
    return f"  {text} ({event['energy_source']})"


def start_line(event: Event) -> str:
    """Only what `train` does not print by itself."""
    skipped = event.get("skipped")
    return f"skipped, as not whole: {', '.join(skipped)}" if skipped else ""


def step_line(event: Event) -> str:
    parts = [f"step {event['step']}", f"epoch {event['epoch']}", f"loss {event['loss']:.4f}"]
    parts.append(f"lr {event['learning_rate']:.2e}")
    if "gradient_norm" in event:
        parts.append(f"grad {event['gradient_norm']:.3g}")
    parts.append(f"{amount(event['samples_per_second'])} samples/s")
    if "tokens_per_second" in event:
        parts.append(f"{amount(event['tokens_per_second'])} tokens/s")
    if "flops_utilisation" in event:
        parts.append(f"MFU {event['flops_utilisation'] * 100:.3g}%")
    parts.append(f"wait {duration(event['data_wait_seconds'])}")
    if event["stall_seconds"] >= SHORTEST_STALL:
        parts.append(f"stall {duration(event['stall_seconds'])}")
    if "gpu_peak_bytes" in event:
        parts.append(f"GPU {event['gpu_peak_bytes'] / 2**30:.2f} GiB")
    return "  ".join(parts)


def save_line(event: Event) -> str:
    return f"saved step {event['step']}, which held up {duration(event['stall_seconds'])}"


def evaluation_line(event: Event) -> str:
    found = {key[5:]: value for key, value in event.items() if key.startswith("test_")}
    values = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
    return f"evaluation at step {event['step']}: {values}"


def totals_line(event: Event) -> str:
    is_epoch = event["event"] == "epoch"
    what = f"epoch {event['epoch']}" if is_epoch else f"attempt {event['reason']}"
    loss = f"  mean loss {event['mean_loss']:.4f}" if "mean_loss" in event else ""
    return (
        f"{what}: {event['steps']} steps in {duration(event['seconds'])}{loss}  "
        f"wait {duration(event['data_wait_seconds'])}  stall {duration(event['stall_seconds'])}"
        f"{energy(event)}"
    )


LINES: Final[Mapping[str, Callable[[Event], str]]] = {
    "start": start_line,
    "step": step_line,
    "save": save_line,
    "evaluation": evaluation_line,
    "epoch": totals_line,
    "end": totals_line,
}
