"""Takes raw rows through the steps of a recipe, on several processes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from forebay_trainer.preparation import SPLIT, TRAIN, Preparation, overrides
from forebay_trainer.preparation.splitting import Duplicates, Splitter
from forebay_trainer.preparation.worker import (
    AFTER,
    BEFORE,
    Done,
    Job,
    StepFailed,
    make,
    run,
    run_steps,
    start,
)
from forebay_wire.errors import ForebayError, InvalidRequest

CHUNKS_AHEAD: Final = 2
"""Chunks that wait for each worker, the one that it works on included."""


class PreparationFailed(ForebayError):
    """A step of a recipe failed, or a worker died; nothing was written."""


Progress = Callable[[str, int], None]
"""Told the stage and how many rows it has taken so far."""


@dataclass
class Stage:
    """What a step came to, over all chunks."""

    rows_in: int = 0
    rows_out: int = 0
    seconds: float = 0.0
    """Of all processes together."""


@dataclass
class Stages:
    """In the order in which they ran first."""

    stages: dict[str, Stage] = field(default_factory=dict)

    def add(self, name: str, rows_in: int, rows_out: int, seconds: float) -> None:
        stage = self.stages.setdefault(name, Stage())
        stage.rows_in += rows_in
        stage.rows_out += rows_out
        stage.seconds += seconds

    def add_done(self, done: Done) -> None:
        for name, (rows_in, rows_out) in done.counts.items():
            self.add(name, rows_in, rows_out, done.seconds[name])

    def as_dict(self) -> dict[str, Any]:
        return {name: asdict(stage) for name, stage in self.stages.items()}


@dataclass(frozen=True)
class Prepared:
    """Rows ready to be written, chunk by chunk; they can be iterated once."""

    rows: Iterator[pa.Table]
    """With the column ``split``."""
    learnt: Mapping[str, Any]


@dataclass(frozen=True)
class Alone:
    """The steps in this process."""

    preparation: Preparation

    def done(self, jobs: Iterator[Job], names: Sequence[str]) -> Iterator[Done]:
        for job in jobs:
            yield run_steps(self.preparation, job, names)


@dataclass(frozen=True)
class Pool:
    """The steps in other processes; what comes of them keeps the order of the jobs."""

    preparation: Preparation
    executor: ProcessPoolExecutor
    num_processes: int

    def done(self, jobs: Iterator[Job], names: Sequence[str]) -> Iterator[Done]:
        waiting: deque[Future[Done]] = deque()
        for job in jobs:
            waiting.append(self.executor.submit(run, job, names))
            if len(waiting) >= CHUNKS_AHEAD * self.num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


Workers = Alone | Pool


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One preparation. *learnt*: of a dataset that exists and is appended to; None: learn."""

    file: Path
    """The recipe's ``prepare.py``."""
    settings: Any
    """Its ``Config``."""
    seed: int
    num_processes: int
    stages: Stages = field(default_factory=Stages)
    learnt: Mapping[str, Any] | None = None
    before: Callable[[str], Iterable[list[Any]]] = lambda column: ()
    """The values that a column of the dataset has already, for duplicates."""
    progress: Progress = lambda stage, num_rows: None

    @contextmanager
    def prepared(self) -> Iterator[Prepared]:
        """Everything up to the writing. Its processes and temporary files end with the context.

        Raises PreparationFailed, naming step and chunk, for an exception in the recipe.
        """
        preparation = make(self.file, self.settings)
        with (
            tempfile.TemporaryFile(prefix="forebay-prepare-") as file,
            self._workers(preparation) as workers,
        ):
            first = self._mapped(self._read(preparation), workers, {}, BEFORE)
            split = self._split(preparation, first)
            if self.learnt is not None or not overrides(preparation, "learn"):
                learnt = self.learnt or {}
            else:
                # It has no name: whatever ends this process, nothing stays.
                spool = Path(f"/proc/self/fd/{file.fileno()}")
                self._spool(split, spool)
                learnt = self._learn(preparation, spool)
                split = _chunks(spool)
            yield Prepared(self._mapped(split, workers, learnt, AFTER), learnt)

    def _read(self, preparation: Preparation) -> Iterator[pa.Table]:
        chunks, num_rows, number = iter(preparation.read()), 0, 0
        while True:
            started = time.perf_counter()
            try:
                rows = next(chunks, None)
            except ForebayError:
                raise
            except Exception as error:
                raise self._failed("read", number, f"{type(error).__name__}: {error}") from error
            if rows is None:
                break
            num_rows, number = num_rows + rows.num_rows, number + 1
            self.stages.add("read", rows.num_rows, rows.num_rows, time.perf_counter() - started)
            self.progress("read", num_rows)
            yield rows
        if num_rows == 0:
            raise InvalidRequest(f"{self.file}: read() gave no rows; look at prepare.source")

    def _split(self, preparation: Preparation, chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        splitter = Splitter(preparation.splits, self.seed)
        duplicates = None
        if preparation.unique is not None:
            duplicates = Duplicates(preparation.unique)
            for values in self.before(preparation.unique):
                duplicates.add(values)
        for rows in chunks:
            kept = rows
            if duplicates is not None:
                started = time.perf_counter()
                kept = duplicates.drop(rows)
                seconds = time.perf_counter() - started
                self.stages.add("duplicates out", rows.num_rows, kept.num_rows, seconds)
            if kept.num_rows:  # recipes need not think of chunks without rows
                yield splitter.split(kept)

    def _spool(self, chunks: Iterable[pa.Table], path: Path) -> None:
        """Keeps the chunks on disk: a corpus need not fit into memory to be learnt from."""
        writer, schema = None, None
        try:
            for rows in chunks:
                if writer is None:
                    schema = rows.schema
                    writer = pa.ipc.new_file(path, schema)
                (batch,) = rows.cast(schema).combine_chunks().to_batches()
                writer.write_batch(batch)  # one for each chunk: they keep their numbers
        finally:
            if writer is not None:
                writer.close()

    def _learn(self, preparation: Preparation, spool: Path) -> Mapping[str, Any]:
        started, num_rows = time.perf_counter(), 0

        def training_rows() -> Iterator[pa.Table]:
            nonlocal num_rows
            for rows in _chunks(spool):
                wanted = rows.filter(pc.equal(rows[SPLIT], TRAIN))
                num_rows += wanted.num_rows
                self.progress("learn", num_rows)
                yield wanted

        try:
            learnt = dict(preparation.learn(training_rows()))
        except Exception as error:
            raise self._failed("learn", None, f"{type(error).__name__}: {error}") from error
        self.stages.add("learn", num_rows, num_rows, time.perf_counter() - started)
        return learnt

    @contextmanager
    def _workers(self, preparation: Preparation) -> Iterator[Workers]:
        if self.num_processes == 1:
            yield Alone(preparation)
            return
        with ProcessPoolExecutor(
            self.num_processes,
            mp_context=get_context("spawn"),  # this process has threads; forking it is not safe
            initializer=start,
            initargs=(os.getpid(), self.file, asdict(self.settings)),
        ) as pool:
            try:
                yield Pool(preparation, pool, self.num_processes)
            finally:
                pool.shutdown(cancel_futures=True)

    def _mapped(
        self,
        chunks: Iterable[pa.Table],
        workers: Workers,
        learnt: Mapping[str, Any],
        names: tuple[str, ...],
    ) -> Iterator[pa.Table]:
        """The chunks behind the steps of these names, in their order."""
        wanted = [name for name in names if overrides(workers.preparation, name)]
        if not wanted:
            yield from chunks
            return
        text = json.dumps(learnt)
        jobs = (Job(number, rows, self.seed, text) for number, rows in enumerate(chunks))
        num_rows = 0
        try:
            for done in workers.done(jobs, wanted):
                self.stages.add_done(done)
                num_rows += done.rows.num_rows
                self.progress(wanted[-1], num_rows)
                yield done.rows
        except StepFailed as error:
            step, number, said = error.args
            raise self._failed(step, number, said) from error
        except BrokenProcessPool as error:
            raise PreparationFailed(
                f"a worker process was killed during {' and '.join(wanted)}: is the memory "
                f"enough for {self.num_processes} of them? Try --num-processes 1"
            ) from error

    def _failed(self, step: str, chunk: int | None, said: str) -> PreparationFailed:
        place = "" if chunk is None else f" at chunk {chunk} of what read() gives"
        return PreparationFailed(
            f"{step}() of {self.file} failed{place}: {said}; nothing is written"
        )


def _chunks(path: Path) -> Iterator[pa.Table]:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])
