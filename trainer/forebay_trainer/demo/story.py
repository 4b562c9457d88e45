"""The demo itself: serve, import, train, kill, resume, prove, sum up."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import forebay
from forebay_trainer import records
from forebay_trainer.demo import digits, picture
from forebay_trainer.demo.folder import DemoFolder
from forebay_trainer.demo.proof import Proof, prove
from forebay_trainer.demo.summary import Summary, summarise
from forebay_trainer.metrics.follow import Event, MetricsTail
from forebay_trainer.processes import (
    POLL_SECONDS,
    Child,
    running,
    torchrun,
    wait_until,
)
from forebay_trainer.units import size
from forebay_wire.errors import ForebayError, NotFound
from forebay_wire.v1.checkpoints_pb2 import Generation

RUN: Final = "mnist-cnn"
START_SECONDS: Final = 60.0
TRAIN_SECONDS: Final = 600.0
REMOTE_SECONDS: Final = 60.0
STEPS_AFTER_SAVE: Final = 2
DRAIN_SECONDS: Final = 60.0
# Several ranks share few cores: more threads each would only wait for each other.
ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the demo is."""

    num_digits: int = 5000
    num_epochs: int = 4
    global_batch_size: int = 64
    save_every_steps: int = 10
    num_ranks: int = 2
    num_ranks_resumed: int = 3
    steps_to_kill: int | None = None
    """Kill at this step; None: past the half of the second epoch."""
    min_step_seconds: float = 0.0


SHORT: Final = Plan(
    num_digits=601,  # 481 to train: the last batch holds one sample, so one rank has no part of it
    num_epochs=2,
    global_batch_size=16,
    save_every_steps=8,
    num_ranks_resumed=1,
    min_step_seconds=0.05,  # else so few steps could be over before the kill
)


@dataclass(frozen=True)
class Outcome:
    """What the demo found out."""

    seconds: float
    proof: Proof
    summary: Summary
    killed_step: int
    resumed_step: int
    tier_bytes: dict[str, int]
    last_generation: str
    durability: str
    picture: str
    data: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.proof.holds, "sentence": self.proof.sentence()}


class Demo:
    """One telling of the story; ``console`` gets all that is for people."""

    def __init__(self, plan: Plan, folder: DemoFolder, console: Console) -> None:
        self.plan = plan
        self.folder = folder
        self.console = console
        self.started = time.monotonic()
        self.events: list[Event] = []
        self.tail = MetricsTail(folder.metrics)
        self.has_generation = False

    def run(self) -> Outcome:
        with self.serve() as daemon, forebay.connect(str(self.folder.data)) as client:
            self.import_data(client)
            killed_step = self.train_and_kill(client)
            resumed_step = self.resume()
            proof = self.prove(client)
            outcome = self.sum_up(client, proof, killed_step, resumed_step)
            client.close()
            self.drain(daemon)
        self.farewell()
        return outcome

    @contextmanager
    def serve(self) -> Iterator[Child]:
        script = Path(sys.executable).with_name("forebay")
        program = [str(script)] if script.exists() else [sys.executable, "-m", "forebay_server"]
        command = [*program, "serve", "--data", str(self.folder.data)]
        log = self.folder.logs / "daemon.log"
        with running("the daemon", command, log, extra_environment={}) as daemon:
            wait_until(lambda: self.is_serving(daemon), START_SECONDS, "the daemon")
            self.say(1, f"daemon: forebay serve --data {self.folder.data} (pid {daemon.pid})")
            yield daemon

    def is_serving(self, daemon: Child) -> bool:
        daemon.check()
        return (self.folder.data / "daemon.json").exists()

    def import_data(self, client: forebay.Client) -> None:
        digits.import_digits(client, self.plan.num_digits)
        parts = {name: len(client.dataset(digits.NAME, split=name)) for name in digits.SPLITS}
        shards = client.dataset(digits.NAME).manifest.shards
        self.say(
            2,
            f"imported {sum(parts.values()):,} MNIST digits into dataset {digits.NAME!r}, "
            f"{len(shards)} shards: "
            + ", ".join(f"{number:,} {name}" for name, number in parts.items()),
        )

    def train_and_kill(self, client: forebay.Client) -> int:
        """Trains on the first ranks until well within an epoch; returns the last step seen."""
        ranks = self.plan.num_ranks
        self.say(3, f"training on {ranks} processes (torchrun, DDP); saving asynchronously")
        with self.trainer(ranks) as trainer:
            self.follow(trainer, ranks, until=lambda: self.is_time_to_kill(client))
            number = trainer.kill_all()
        step = self.last_step()
        self.say(4, f"SIGKILL for all {number} processes of the trainer at step {step}")
        return step

    def is_time_to_kill(self, client: forebay.Client) -> bool:
        if not self.has_generation and any(event["event"] == "save" for event in self.events):
            # Asked once and early: at the step itself every call would make the kill later.
            self.has_generation = newest(client) is not None
        return self.has_generation and self.last_step() >= self.kill_step()

    def kill_step(self) -> int:
        """Past the half of the second epoch, and a little after a save, so that steps get lost."""
        if self.plan.steps_to_kill is not None:
            return self.plan.steps_to_kill
        start = next((event for event in self.events if event["event"] == "start"), None)
        if start is None:
            return sys.maxsize
        every = self.plan.save_every_steps
        half = start["steps_per_epoch"] * 3 // 2 + 1
        return half + (STEPS_AFTER_SAVE - half) % every

    def resume(self) -> int:
        """Trains to the end on other ranks; returns the step it resumed from."""
        ranks = self.plan.num_ranks_resumed
        self.say(4, f"resuming on {ranks} process(es) from the newest generation")
        with self.trainer(ranks) as trainer:
            self.follow(trainer, ranks, until=lambda: self.events[-1]["event"] == "end")
            trainer.wait(TRAIN_SECONDS)
        return int(next(e["step"] for e in reversed(self.events) if e["event"] == "start"))

    @contextmanager
    def trainer(self, num_ranks: int) -> Iterator[Child]:
        plan = self.plan
        command = torchrun(
            num_ranks,
            "forebay_trainer",
            "recipes/mnist_cnn.toml",
            f"run={RUN}",
            f"address={self.folder.data}",
            f"num_epochs={plan.num_epochs}",
            f"min_step_seconds={plan.min_step_seconds}",
            "num_compute_threads=1",
            f"data.dataset={digits.NAME}",
            f"data.global_batch_size={plan.global_batch_size}",
            f"checkpoint.every_steps={plan.save_every_steps}",
            f"output.folder={self.folder.logs}",
        )
        log = self.folder.logs / f"trainer-{num_ranks}-ranks.log"
        with running("the trainer", command, log, extra_environment=ENVIRONMENT) as trainer:
            yield trainer

    def follow(self, trainer: Child, num_ranks: int, *, until: Callable[[], bool]) -> None:
        """Shows the progress of the trainer; returns when ``until`` holds."""
        deadline = time.monotonic() + TRAIN_SECONDS
        columns = (TextColumn("           {task.description}"), BarColumn(), MofNCompleteColumn())
        self.events += self.tail.read()
        quiet = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as progress:
            bar = progress.add_task(f"starting {num_ranks} process(es)", total=None)
            while True:
                ended = trainer.process.poll() is not None
                fresh = self.tail.read()
                self.events += fresh
                for event in fresh:
                    show(progress, bar, event)
                if fresh and until():
                    return
                if ended:
                    raise trainer.failure("ended before its time")
                if time.monotonic() > deadline:
                    raise trainer.failure(f"was not done after {TRAIN_SECONDS:.0f} s")
                time.sleep(POLL_SECONDS)

    def last_step(self) -> int:
        return max((event["step"] for event in self.events if event["event"] == "step"), default=0)

    def prove(self, client: forebay.Client) -> Proof:
        train = client.dataset(digits.NAME, split="train")
        samples = train.rows_at(np.arange(len(train)))
        written = records.read_folder(self.folder.records)
        proof = prove(written, samples.tolist(), self.plan.num_epochs)
        style = "bold green" if proof.holds else "bold red"
        self.say(5, f"[{style}]{proof.sentence()}[/]")
        return proof

    def sum_up(
        self, client: forebay.Client, proof: Proof, killed_step: int, resumed_step: int
    ) -> Outcome:
        last = wait_remote(client)
        summary = summarise(self.events)
        tiers = {tier.name: int(tier.used_bytes) for tier in client.status().tiers}
        picture.draw(self.events, self.folder.picture)
        accuracy = "" if summary.test_accuracy is None else f"{summary.test_accuracy:.1%}"
        first_waits = ", ".join(f"{each:.2f} s" for each in summary.first_waits_seconds)
        lines = {
            "test accuracy": accuracy,
            "throughput": f"{summary.samples_per_second:,.0f} samples/s",
            "waiting for data": f"{summary.data_wait_share:.1%} of the time of all steps "
            f"(first batch of each attempt: {first_waits})",
            "checkpoint stall": f"p50 {summary.stall_p50_seconds * 1000:.1f} ms, p99 "
            f"{summary.stall_p99_seconds * 1000:.1f} ms over {summary.num_saves} saves",
            "bytes per tier": ", ".join(f"{name} {size(used)}" for name, used in tiers.items()),
            "last generation": f"step {last.step} of attempt {last.attempt}: {last.durability}",
            "picture": str(self.folder.picture),
        }
        self.say(6, "summary")
        for name, value in lines.items():
            self.console.print(f"           {name:<18} {value}", highlight=False, soft_wrap=True)
        return Outcome(
            seconds=time.monotonic() - self.started,
            proof=proof,
            summary=summary,
            killed_step=killed_step,
            resumed_step=resumed_step,
            tier_bytes=tiers,
            last_generation=f"{last.attempt}/{last.step}",
            durability=last.durability,
            picture=str(self.folder.picture),
            data=str(self.folder.data),
        )

    def drain(self, daemon: Child) -> None:
        status = daemon.terminate(DRAIN_SECONDS)
        if status != 0:
            raise daemon.failure(f"ended with status {status} after SIGTERM")

    def farewell(self) -> None:
        self.say(7, "daemon drained and stopped; everything is in the folder. Look at it:")
        script = Path(sys.executable).with_name("forebay")
        program = "forebay" if shutil.which("forebay") or not script.exists() else str(script)
        for words in ("status", f"checkpoint list {RUN}", f"dataset show {digits.NAME}"):
            self.console.print(
                f"           {program} {words} --data {self.folder.data}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, chapter: int, text: str) -> None:
        elapsed = time.monotonic() - self.started
        self.console.print(
            f"[{elapsed:5.1f} s] {chapter}/7 {text}", highlight=False, soft_wrap=True
        )


def show(progress: Progress, bar: Any, event: Event) -> None:
    """One event of the trainer on the progress bar, epochs as a line that stays."""
    match event["event"]:
        case "start":
            total = event["steps_per_epoch"] * event["num_epochs"]
            progress.update(bar, total=total, completed=event["step"])
            origin = f"from step {event['step']}" if event["step"] else "afresh"
            progress.console.print(
                f"           attempt {event['attempt']} starts {origin} on {event['num_ranks']} "
                "process(es)",
                highlight=False,
            )
        case "step":
            text = f"epoch {event['epoch']}, loss {event['loss']:.3f}"
            progress.update(bar, completed=event["step"], description=text)
        case "evaluation":
            progress.console.print(
                f"           epoch {event['epoch']} done at step {event['step']}: "
                f"test accuracy {event['test_accuracy']:.1%}",
                highlight=False,
            )


def newest(client: forebay.Client) -> Generation | None:
    """The newest committed generation of the run; None before the first."""
    try:
        generations = client.checkpoints(RUN)
    except NotFound:
        return None
    committed = (each for each in generations if each.state == "committed")
    return max(committed, key=lambda each: (each.attempt, each.step), default=None)


def wait_remote(client: forebay.Client) -> Generation:
    """The newest generation, once the object tier has it."""

    def is_remote() -> bool:
        found = newest(client)
        return found is not None and found.durability == "remote"

    wait_until(is_remote, REMOTE_SECONDS, "the object tier to have the last generation")
    found = newest(client)
    assert found is not None
    return found


def tell(plan: Plan, root: Path, console: Console) -> Outcome:
    """Runs the demo in a folder of its own, which is emptied first if an earlier demo made it."""
    try:
        return Demo(plan, DemoFolder.prepare(root), console).run()
    except ForebayError as error:
        console.print(
            f"[bold red]{type(error).__name__}[/]: {escape(error.message)}", soft_wrap=True
        )
        raise
