"""What do data and checkpoints cost a training, beside torch's own means?

The same model, pictures and steps in turns, each contender a process of its own:

* ``forebay``: our DataLoader, and a Checkpointer that saves every 20 steps, on disk (``local``);
* ``torch``: torch's DataLoader, and torch.save with fsync;
* ``dcp``: torch's DataLoader, and dcp.async_save with a stager that is kept, files synced;
* ``limit``: one batch in memory, and no checkpoints;
* ``forebay_object``: ours with an object tier (a folder), to which every save is flushed.

All train the same weights in the same memory: where that lies is worth some per cent of a step.

A *lost* second is one beyond the limit's for the same steps, whatever took it: waiting for data,
the stall of a save, steps that are slower while a save lands. The batch is chosen so that
torch.save takes 20 % of 20 steps. Each contender leaves one core to whatever else there is to do.

* ``lost_time_vs_torch_save``, ``lost_time_vs_dcp_async``: ours over theirs, pair by pair.
* ``step_time_vs_limit``: our steps, saves included, over the limit's.

Values: the share of torch.save, the wait for a batch and the stall of a save, how much slower the
steps are that follow a save, the lost time with the object tier's flush over that of torch.save.
``--plot FILE`` draws the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from children import Family
from harness import Options, Phases, Report, parse_options, percentile

import forebay
from forebay_server.testing.daemon import DaemonProcess

MB = 1_000_000
FLUSHED = "forebay_object"
CONTENDERS = ("forebay", "torch", "dcp", "limit", FLUSHED)
DATASET = "pictures"
PICTURE = (3, 32, 32)
NUM_PICTURES = 20_000

EVERY_STEPS = 20
WANTED_SHARE = 0.2
"""Of torch.save in so many steps."""

SHARES = (0.15, 0.25)
FOLLOWING = 5
"""Steps behind a save that may be slower for it."""

BATCHES = (8, 1024)
TRIED_BATCHES = (16, 64)
TRIED_STEPS = 6
CALIBRATIONS = 1
"""Turns before the first that counts, to find the batch and to use all memory once."""


@dataclass(frozen=True)
class Sizes:
    state_bytes: int
    num_saves: int
    """Of a run: one in each 20 steps."""
    pairs: int
    flushed_turns: int
    """Of the object tier's row, which no ratio needs."""

    @property
    def num_steps(self) -> int:
        return EVERY_STEPS * self.num_saves

    @property
    def saves(self) -> list[int]:
        """Early in each 20, so that what follows a save lies within the run."""
        return [number * EVERY_STEPS + 4 for number in range(self.num_saves)]


@dataclass
class Runs:
    """What the contenders told, run by run."""

    by_name: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, told: dict[str, Any]) -> None:
        self.by_name.setdefault(name, []).append(told)

    def seconds(self, name: str) -> list[float]:
        return [sum(run["steps"]) for run in self.by_name[name]]

    def lost(self, name: str) -> list[float]:
        """Beyond the limit of the same turn, in all turns that it took part in."""
        both = zip(self.seconds(name), self.seconds("limit"), strict=False)
        return [mine - limit for mine, limit in both]

    def all(self, name: str, what: str) -> list[float]:
        return [each for run in self.by_name[name] for each in run[what]]

    def slowdown(self, name: str, saves: Sequence[int]) -> list[float]:
        """Steps behind a save over the other ones, the save itself left out."""
        found = []
        for run in self.by_name[name]:
            behind = {step + number for step in saves for number in range(1, FOLLOWING + 1)}
            after = [run["steps"][step] for step in sorted(behind) if step < len(run["steps"])]
            others = [
                seconds
                for step, seconds in enumerate(run["steps"])
                if step not in behind and step not in saves
            ]
            found.append(statistics.median(after) / statistics.median(others))
        return found


def make_data(folder: Path) -> None:
    """The pictures, as files for the peers."""
    random = np.random.default_rng(0)
    np.save(folder / "images.npy", random.integers(0, 256, (NUM_PICTURES, *PICTURE), np.uint8))
    np.save(folder / "labels.npy", random.integers(0, 10, NUM_PICTURES))


def write_dataset(address: Path, folder: Path) -> None:
    images = np.load(folder / "images.npy")
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    with forebay.connect(address) as client, client.create_dataset(DATASET) as writer:
        writer.write_table(pa.table({"image": column, "label": np.load(folder / "labels.npy")}))


def batch_for(step_seconds: float, seconds: dict[int, float]) -> int:
    """The batch whose step takes that long, a step's time being a + b · batch."""
    (small, low), (large, high) = sorted(seconds.items())
    slope = max(1e-9, (high - low) / (large - small))
    return int(min(max((step_seconds - low) / slope + small, BATCHES[0]), BATCHES[1]))


def nearest(step_seconds: float, seconds: dict[int, float]) -> dict[int, float]:
    """The two batches whose steps are nearest to that."""
    ordered = sorted(seconds, key=lambda batch: abs(seconds[batch] - step_seconds))
    return {batch: seconds[batch] for batch in ordered[:2]}


def step_seconds(family: Family, batches: Sequence[int]) -> dict[int, float]:
    """Of each batch: a step of the limit."""
    found = {}
    for batch in batches:
        told = family["limit"].ask("time_steps", batch_size=batch, num_steps=TRIED_STEPS)
        found[batch] = statistics.median(told["steps"])
    return found


def wanted_seconds(stalls: Sequence[float]) -> float:
    """Of a step, so that such stalls take the wanted share."""
    return statistics.median(stalls) / WANTED_SHARE / EVERY_STEPS


def take_turn(family: Family, sizes: Sizes, turn: int, runs: Runs) -> None:
    """One run of each, beginning with another one each time."""
    shift = turn % len(CONTENDERS)
    for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
        if name != FLUSHED or turn < sizes.flushed_turns:
            told = family[name].ask("run", num_steps=sizes.num_steps, saves=sizes.saves)
            runs.add(name, told)


def calibrate(family: Family, sizes: Sizes) -> int:
    """Has all load the batches at which torch.save takes a fifth of 20 steps, as it does between
    the others: alone on the disk it is faster. Their size."""
    seconds = step_seconds(family, TRIED_BATCHES)
    stalls = [family["torch"].ask("time_save")["seconds"]]
    tried = Runs()
    for turn in range(CALIBRATIONS + 1):
        batch = batch_for(wanted_seconds(stalls), nearest(wanted_seconds(stalls), seconds))
        for name in CONTENDERS:
            family[name].ask("load", batch_size=batch)
        if turn == CALIBRATIONS:
            break
        seconds |= step_seconds(family, [batch])
        take_turn(family, sizes, turn, tried)  # all that is used for the first time is used here
        stalls = tried.all("torch", "stalls")
    return batch


def measure(sizes: Sizes, work: Path, num_threads: int) -> tuple[Runs, int, int]:
    """All runs, the batch, and the bytes of the state."""
    phases, runs = Phases(), Runs()
    make_data(work)
    plain = DaemonProcess(work / "data", "--object-url", "none")
    flushed = DaemonProcess(work / "data-object", "--object-url", f"file://{work}/objects")
    with contextlib.ExitStack() as stack:
        family = Family(
            "stall_child",
            (*CONTENDERS, "state"),
            log=work / "log",
            data=str(work),
            folder=str(work / "saved"),
            num_threads=num_threads,
        )
        stack.enter_context(family)
        for daemon in (plain, flushed):
            stack.enter_context(daemon)
            write_dataset(daemon.data, work)
        addresses = {"forebay": str(plain.data), FLUSHED: str(flushed.data)}
        told = family["state"].ask("fill", state_bytes=sizes.state_bytes)
        for name in CONTENDERS:
            address, state = addresses.get(name, ""), str(told["state"])
            family[name].ask("open", state=state, state_bytes=sizes.state_bytes, address=address)
        phases.ended("opened")
        batch = calibrate(family, sizes)
        phases.ended(f"calibrated: batches of {batch}")
        for turn in range(sizes.pairs):
            take_turn(family, sizes, turn, runs)
        phases.ended(f"{sizes.pairs} turns of {sizes.num_steps} steps")
        return runs, batch, int(told["num_bytes"])


def report(runs: Runs, sizes: Sizes) -> Report:
    found = Report("data and checkpoints in a training")
    lost = {name: runs.lost(name) for name in CONTENDERS}
    ours, torch_save = lost["forebay"], lost["torch"]

    def over(theirs: list[float], mine: list[float]) -> list[float]:
        return [one / other for one, other in zip(mine, theirs, strict=False)]

    found.ratio("lost_time_vs_torch_save", over(torch_save, ours), at_most=0.25)
    found.ratio("lost_time_vs_dcp_async", over(lost["dcp"], ours), at_most=0.8)
    steps = over(runs.seconds("limit"), runs.seconds("forebay"))
    found.ratio("step_time_vs_limit", steps, at_most=1.06)
    found.value("lost_time_with_flush_vs_torch_save", over(torch_save, lost[FLUSHED]))
    shares = [
        sum(run["stalls"]) / limit
        for run, limit in zip(runs.by_name["torch"], runs.seconds("limit"), strict=True)
    ]
    found.value("torch_save_share", shares)
    for name in ("forebay", "torch", "dcp"):
        waits, stalls = runs.all(name, "waits"), runs.all(name, "stalls")
        for share in (0.5, 0.99):
            number = round(share * 100)
            found.value(f"{name}_data_wait_p{number}_ms", [1e3 * percentile(waits, share)])
            found.value(f"{name}_stall_p{number}_ms", [1e3 * percentile(stalls, share)])
        found.value(f"{name}_slowdown_after_saves", runs.slowdown(name, sizes.saves))
    found.details["steps"] = {
        name: [run["steps"] for run in told] for name, told in runs.by_name.items()
    }
    return found


def plot(runs: Runs, sizes: Sizes, path: Path) -> None:
    """The median of each step over all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name in CONTENDERS:
        middle = np.median([run["steps"] for run in runs.by_name[name]], axis=0)
        axes.plot(np.arange(1, len(middle) + 1), middle * 1e3, label=name, linewidth=1.2)
    for step in sizes.saves:
        axes.axvline(step + 1, color="0.85", zorder=0)
    axes.set(xlabel="step (lines: a save behind it)", ylabel="milliseconds, save included")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--size", type=float, metavar="MB", help="of the state (100 quick, 300)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the steps: a PNG")
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, len(os.sched_getaffinity(0)) - 1),
        help="that compute; what is left saves and loads (default: all cores but one)",
    )
    given, rest = parser.parse_known_args(argv)
    options: Options = parse_options((__doc__ or "").strip().splitlines()[0], rest)
    pairs = max(7, options.repeats) if "--repeats" in rest else 7
    megabytes = given.size or (100 if options.quick else 300)
    if options.quick:
        sizes = Sizes(int(megabytes * MB), num_saves=1, pairs=pairs, flushed_turns=3)
    else:
        sizes = Sizes(int(megabytes * MB), num_saves=2, pairs=pairs, flushed_turns=pairs)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        runs, batch, num_bytes = measure(sizes, work, given.threads)
    found = report(runs, sizes)
    found.details |= {"batch": batch, "state_bytes": num_bytes, "threads": given.threads}
    found.details["pairs"] = sizes.pairs
    low, high = SHARES
    share = found.values["torch_save_share"] or 0.0
    is_sized = low <= share <= high
    if not is_sized:
        said = f"torch.save took {share:.0%} of 20 steps, not 20 ± 5 %: no fair comparison"
        print(said, file=sys.stderr)
    if given.plot is not None:
        plot(runs, sizes, given.plot)
    options = Options(options.quick, options.json_file, sizes.pairs, options.work)
    return max(found.finish(options), 0 if is_sized else 1)


if __name__ == "__main__":
    sys.exit(main())
