"""One worker process of a preparation: it makes the recipe's `Preparation` and runs steps of it."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from forebay_trainer.modules import imported
from forebay_trainer.preparation import SPLIT, TRAIN, Preparation, overrides

PR_SET_PDEATHSIG: Final = 1

BEFORE: Final = ("clean", "normalise")
AFTER: Final = ("tokenise", "augment")


@dataclass(frozen=True)
class Job:
    """A chunk to take through some steps."""

    number: int
    """Of the chunk, from 0."""
    rows: pa.Table
    seed: int
    learnt: str
    """JSON; alike in all jobs of a stage."""


@dataclass(frozen=True)
class Done:
    rows: pa.Table
    counts: Mapping[str, tuple[int, int]]
    """Step to its rows before and after."""
    seconds: Mapping[str, float]


class StepFailed(Exception):
    """A step of the recipe raised; its arguments: step, chunk, what it was."""


_preparation: Preparation | None = None


def make(path: Path, settings: Any) -> Preparation:
    """What ``prepare.py`` at *path* answers for its settings."""
    made = imported(path).prepare(settings)
    if not isinstance(made, Preparation):
        raise TypeError(f"prepare() of {path} returns no Preparation: {made!r}")
    return made


def start(parent: int, path: Path, settings: Mapping[str, Any]) -> None:
    """Runs once in each worker. It ends with its parent, however that ends; Ctrl-C is for that."""
    global _preparation
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            sys.exit(1)
    pa.set_cpu_count(1)  # as many workers as cores are at work already
    _preparation = make(path, config_of(path)(**settings))


def config_of(path: Path) -> type:
    """The dataclass ``Config`` of a ``prepare.py``."""
    config: type = imported(path).Config
    return config


def run(job: Job, names: Sequence[str]) -> Done:
    """Takes a chunk through the steps of these names that the recipe has."""
    assert _preparation is not None
    return run_steps(_preparation, job, names)


@functools.lru_cache(1)
def parsed(learnt: str) -> Mapping[str, Any]:
    return dict(json.loads(learnt))


def run_steps(preparation: Preparation, job: Job, names: Sequence[str]) -> Done:
    rows, counts, seconds = job.rows, {}, {}
    for name in names:
        if not overrides(preparation, name) or rows.num_rows == 0:
            continue
        started, num_before = time.perf_counter(), rows.num_rows
        try:
            rows = _step(preparation, job, name, rows)
        except Exception as error:
            raise StepFailed(name, job.number, f"{type(error).__name__}: {error}") from error
        counts[name] = (num_before, rows.num_rows)
        seconds[name] = time.perf_counter() - started
    return Done(rows, counts, seconds)


def _step(preparation: Preparation, job: Job, name: str, rows: pa.Table) -> pa.Table:
    if name in BEFORE:
        return getattr(preparation, name)(rows)
    learnt = parsed(job.learnt)
    if name == "tokenise":
        return preparation.tokenise(rows, learnt)
    if TRAIN not in rows[SPLIT].to_pylist():
        return rows
    is_train = np.array([each == TRAIN for each in rows[SPLIT].to_pylist()], dtype=bool)
    grown = preparation.augment(
        rows.filter(pa.array(is_train)), learnt, np.random.default_rng([job.seed, job.number])
    )
    return pa.concat_tables([grown, rows.filter(pa.array(~is_train))], promote_options="default")
