"""``forebay.Checkpointer``: saves a training's state while it goes on, and brings it back."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
import torch.distributed as dist

from forebay.checkpoint.advise import Advice, advise
from forebay.checkpoint.ahead import Ahead, estimate
from forebay.checkpoint.choice import Choice, Patterns
from forebay.checkpoint.components import OptimizerComponent, components
from forebay.checkpoint.group import Ranks
from forebay.checkpoint.handle import Keeper, Saved, SkippedSave
from forebay.checkpoint.lazy import Opened, named, open_generation
from forebay.checkpoint.overlapped import Overlap, SavedBehind
from forebay.checkpoint.restore import Restorer, Resumed
from forebay.checkpoint.save import Saver, SaveRequest, SaveWork
from forebay.checkpoint.service import CheckpointService, Client, parse_fork
from forebay.checkpoint.upload import PackUpload
from forebay.runs import note_json
from forebay.waiting import Deadline
from forebay_wire.errors import ForebayError, InvalidRequest, NotFound
from forebay_wire.ids import GenerationId, check_name
from forebay_wire.keep import Keep, check_tag

_log = logging.getLogger(__name__)

TIMEOUT_SECONDS: Final = 600.0
CLOSE_SECONDS: Final = 60.0
"""How long the end of a program waits for the other ranks to seal."""

KEPT_DURATIONS: Final = 10_000

_GROUP_MARGIN_SECONDS: Final = 30.0
"""A rank may use its whole deadline before it reports that: the others wait a little longer."""


@dataclass(frozen=True)
class CheckpointReport:
    """How much saving held this rank up. Seconds are of ``save()``, which blocks the training."""

    num_saves: int
    save_seconds_p50: float
    save_seconds_p99: float
    save_seconds_max: float
    saved_bytes: int
    num_chunked: int
    """Saves for which the daemon's memory was too small: they block longer."""
    restore_seconds: float
    """Of the last restore; 0 without one."""
    restored_bytes: int
    """Read by this rank in it."""
    num_reused: int = 0
    """Saves by the plan that the ranks had agreed on before."""
    num_planned: int = 0
    """Saves for which all ranks planned anew: the first one, and those after a change."""
    num_skipped: int = 0
    """For earlier saves were still landing; they count nowhere else."""
    num_ahead: int = 0
    """Saves whose memory had been asked for before they began."""
    num_overlapped: int = 0
    overlapped_bytes: int = 0
    """Copied while the training went on."""
    wait_seconds_p50: float = 0.0
    """Of overlapped saves: what ``wait_snapshot()`` and ``optimizer.step()`` waited for each."""
    wait_seconds_p99: float = 0.0
    advice: Advice | None = None
    """How often to save, if ``report`` was told how often the run fails."""


class Checkpointer:
    """Saves and restores one run's state from all its ranks.

    *model* and *optimizer* are given as objects (or lists of them) and saved by fully qualified
    name, so that another number of ranks, DDP, FSDP2 or none of them can load it. Everything else
    (scheduler, loader, …) is asked by ``state_dict()`` and ``load_state_dict()`` and has to be
    equal on all ranks. Nothing is pickled.

    All ranks of *process_group* (default: all) call ``save``, ``restore`` and ``start`` together;
    planning uses a gloo group of its own. An error of one rank is raised on all of them, and a rank
    that is gone for *timeout* seconds is one. Not thread-safe.
    """

    def __init__(
        self,
        client: Client,
        run: str,
        *,
        model: torch.nn.Module | list[torch.nn.Module] | None = None,
        optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] | None = None,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = TIMEOUT_SECONDS,
        when_busy: str = "wait",
        keep: Keep | None = None,
        fork_from: str | tuple[str, str | int] | None = None,
        **stateful: Any,
    ) -> None:
        """*keep*: what is kept of the run from its next attempt on, the same on all ranks; without
        it nothing changes. *fork_from*: ``"run"``, ``"run@SELECTOR"`` or ``(run, selector)`` of the
        generation of another run that this one begins from if it is new: ``restore()`` brings that
        back until the run has one of its own. *when_busy*, ``"wait"`` or ``"skip"``, the same on
        all ranks: what a save does while the two before it are still landing."""
        self.run = check_name("run", run)
        self._keep_json = None if keep is None else keep.to_json()
        self.timeout = timeout
        self._process_group = process_group
        self._components = components({"model": model, "optimizer": optimizer, **stateful})
        fork = None if fork_from is None else parse_fork(fork_from)
        self._service = CheckpointService(client, run, fork)
        if when_busy not in ("wait", "skip"):
            raise InvalidRequest(f"when_busy={when_busy!r}: use 'wait' or 'skip'")
        self._when_busy = when_busy
        self._overlap = Overlap(self._components)
        self._num_ahead = self._num_overlapped = self._num_skipped = 0
        self._keeper = Keeper()
        self._ranks_: Ranks | None = None
        self._saver: Saver | None = None
        self._ahead_: Ahead | None = None
        self._attempt = 0
        self._last: Saved | None = None
        self._durations: deque[float] = deque(maxlen=KEPT_DURATIONS)
        self._num_saves = self._saved_bytes = self._num_chunked = 0
        self._restored: tuple[float, int] = (0.0, 0)
        self._is_closed = False
        self._at_exit = _close_at_exit(self)

    @property
    def attempt(self) -> int:
        """The attempt that saves go to; 0 until the first ``restore``, ``start`` or ``save``."""
        return self._attempt

    def save(
        self,
        step: int,
        metrics: Mapping[str, float] | None = None,
        state: Mapping[str, Any] | None = None,
        *,
        tags: str | Sequence[str] = (),
        note: Mapping[str, Any] | None = None,
    ) -> Saved:
        """Save the state as generation (run, attempt, *step*) on all ranks.

        On return the state has been copied and may change; every rank has sealed its pack, so the
        generation is ``ram`` and becomes ``local`` without this process. *metrics* and *note* (what
        JSON can say; both rank 0's) are kept with it, *state* takes values of your own. It gets
        rank 0's *tags* when it is committed. Raises AlreadyExists if the step was saved
        in this attempt, Fenced if a newer attempt of the run exists, UnsupportedObject naming what
        cannot be saved, ResourceExhausted without room; then nothing was saved, on any rank. Only
        if a rank is gone (DeadlineExceeded) it may have been saved all the same, whole.

        While the two saves before are still landing this waits for the first of them; with
        ``when_busy="skip"`` it saves nothing then, on any rank, and answers an object that is false
        and ``skipped``.
        """
        started = time.monotonic()
        self.settle_snapshot()
        saver, request = self._begin(step, metrics, state, tags, note)
        upload = saver.save(request)
        if upload is None:
            self._num_skipped += 1
            return SkippedSave(self._service, request.generation)
        saved = Saved(self._service, request.generation, upload, self.timeout)
        self._count(saved, upload)
        self._keeper.follow(saved)
        self._prepare_next(saved, upload)
        self._durations.append(time.monotonic() - started)
        return saved

    def save_overlapped(
        self,
        step: int,
        metrics: Mapping[str, float] | None = None,
        state: Mapping[str, Any] | None = None,
        *,
        tags: str | Sequence[str] = (),
        note: Mapping[str, Any] | None = None,
    ) -> Saved:
        """:meth:`save`, with the large tensors copied while forward and backward go on.

        On return everything has been copied but parameters and optimizer state of 1 MiB and more
        of the optimizers given to this Checkpointer: those must stay as they are until
        :meth:`wait_snapshot`, which every ``optimizer.step()`` calls by itself. If one changes
        before its copy has ended the save fails (Conflict) on all ranks, and nothing is saved.
        What fails after the return is raised by :meth:`wait_snapshot`, and by the object returned.

        The copy of what lies on a GPU runs on a stream of its own. Where the daemon's memory does
        not hold the pack at once, everything is copied before this returns.
        """
        started = time.monotonic()
        self.settle_snapshot()
        saver, request = self._begin(step, metrics, state, tags, note, is_overlapped=True)
        holder: list[SavedBehind] = []
        is_there = threading.Event()

        def sealed(work: SaveWork) -> None:
            is_there.wait()
            holder[0].sealed()
            self._keeper.follow(holder[0])
            self._prepare_next(holder[0], work.upload)

        try:
            begun = self._overlap.start(saver, request, sealed, lambda: Deadline(self.timeout))
            if begun is None:
                self._num_skipped += 1
                return SkippedSave(self._service, request.generation)
            work, snapshot = begun
            saved = SavedBehind(self._service, request.generation, work.upload, self.timeout)
            saved.follow(snapshot)
            holder.append(saved)
        finally:
            is_there.set()
        self._count(saved, work.upload)
        self._num_overlapped += 1
        self._durations.append(time.monotonic() - started)
        return saved

    def _begin(
        self,
        step: int,
        metrics: Mapping[str, float] | None,
        state: Mapping[str, Any] | None,
        tags: str | Sequence[str],
        note: Mapping[str, Any] | None,
        *,
        is_overlapped: bool = False,
    ) -> tuple[Saver, SaveRequest]:
        self._check_step(step)
        deadline = Deadline(self.timeout)
        ranks = self._ranks()
        if not self._attempt:
            self._begin_attempt(ranks, self._forked(ranks))
        if self._saver is None:
            self._saver = Saver(self._service, ranks, self._components, self._ahead(ranks))
        all_tags = (tags,) if isinstance(tags, str) else tags
        said = (tuple(map(check_tag, all_tags)), note_json(note))
        generation = GenerationId(self.run, self._attempt, step)
        may_skip = self._when_busy == "skip"
        return self._saver, SaveRequest(
            generation, metrics, state, deadline, *said, may_skip, is_overlapped
        )

    def _ahead(self, ranks: Ranks) -> Ahead:
        if self._ahead_ is None:
            self._ahead_ = Ahead(self._service, ranks.rank)
        return self._ahead_

    def _prepare_first(self, ranks: Ranks) -> None:
        """Have memory ready for the first save, as large as that is likely to be; without an
        optimizer nobody trains here, most likely."""
        if not any(isinstance(one, OptimizerComponent) for one in self._components):
            return
        self._ahead(ranks).prepare(self._attempt, estimate(self._components, ranks.size))

    def _prepare_next(self, saved: Saved, upload: PackUpload) -> None:
        """Once it is local, have memory ready for a pack of the same size: its own, most often."""
        if self._ahead_ is None or upload.was_chunked:
            return
        prepare = partial(self._ahead_.prepare, saved.generation.attempt, upload.slot_bytes)
        saved.on("local", lambda _: prepare())

    def _count(self, saved: Saved, upload: PackUpload) -> None:
        self._last = saved
        self._num_saves += 1
        self._saved_bytes += saved.num_bytes
        self._num_chunked += upload.was_chunked
        self._num_ahead += upload.was_ahead

    def restore(
        self,
        selector: str | int = "latest",
        *,
        missing_ok: bool = False,
        durability: str = "local",
        state: Mapping[str, Any] | None = None,
        only: Patterns = None,
        ignore: Patterns = None,
    ) -> Resumed | None:
        """Bring back a generation in place, the same one on all ranks, and open a new attempt.

        *selector*: ``"latest"`` (the newest on the current lineage), a step, or
        ``"ATTEMPT/STEP"``. What is damaged is passed over for the newest that all ranks can verify,
        and named in ``.skipped``. *state* may hold DTensors like those given to ``save``, whose
        sharding then applies. None with *missing_ok* if nothing is saved yet; NotFound without, and
        for a step or tag that is not there while others are.

        *durability* ``"local"`` first waits for what all ranks have sealed and is still landing.
        ``"ram"`` reads that out of the daemon's memory at once; until it is ``local`` the daemon's
        end takes it along. ``"remote"``: only what another machine could restore, too.

        *only* and *ignore* are patterns (``"model.*"``, or a list) over the saved names; a pattern
        takes all below the name that it matches. What is not taken stays as it is and is named in
        ``.left``.

        Raises InvalidRequest if the generation does not fit (names, shapes, dtypes: all that
        differ are listed, nothing is cast), before anything of it is written on any rank.
        IntegrityError if nothing could be verified. Whatever is raised after a damaged generation
        was begun says that the tensors here hold a part of that.
        """
        self._check_open()
        self.settle_snapshot()
        started = time.monotonic()
        ranks = self._ranks()
        restorer = Restorer(self._service, ranks, self._components)
        found = restorer.restore(
            named(selector),
            durability,
            state,
            Deadline(self.timeout),
            Choice.of(only, ignore),
        )
        if found is None and not missing_ok:
            raise NotFound(
                f"run {self.run} has no generation {selector} that is {durability}: save one "
                "first, or restore(missing_ok=True) to start afresh"
            )
        parent = GenerationId(found.run, found.attempt, found.step) if found else None
        self._begin_attempt(ranks, parent)
        self._prepare_first(ranks)
        self._restored = (time.monotonic() - started, restorer.bytes_read)
        return found

    def open(self, selector: str | int = "latest", *, durability: str = "local") -> Opened:
        """A generation of this run whose values are read when they are asked for; for this rank
        alone. See :func:`forebay.checkpoint.open`."""
        return open_generation(self._service, named(selector), durability, self.timeout)

    def start(self) -> None:
        """Open a new attempt that stands on nothing: the training begins afresh."""
        self._check_open()
        self.settle_snapshot()
        ranks = self._ranks()
        self._begin_attempt(ranks, None)
        self._prepare_first(ranks)

    def wait_snapshot(self) -> None:
        """Return when the state may change: no copy of it is under way.

        At once, unless :meth:`save_overlapped` copies still; then raises what made that fail, on
        all ranks. Copies from a GPU are waited for by the compute stream and not by the host, and
        their errors are raised by the next call after they are known.
        """
        self._overlap.wait()

    def settle_snapshot(self) -> None:
        """:meth:`wait_snapshot`, and until the ranks know that all of them have sealed."""
        self._overlap.settle()

    def report(self, mtbf: float | None = None) -> CheckpointReport:
        """What saving and restoring cost on this rank so far; with *mtbf*, the seconds between two
        failures of the run, also how often to save (see ``forebay.checkpoint.advise``)."""
        advice = None if mtbf is None else advise(mtbf, list(self._durations))
        durations = np.array(self._durations or [0.0])
        p50, p99 = (float(value) for value in np.percentile(durations, [50, 99]))
        return CheckpointReport(
            self._num_saves,
            p50,
            p99,
            float(durations.max()),
            self._saved_bytes,
            self._num_chunked,
            *self._restored,
            num_reused=self._saver.num_reused if self._saver else 0,
            num_planned=self._saver.num_planned if self._saver else 0,
            num_skipped=self._num_skipped,
            num_ahead=self._num_ahead,
            num_overlapped=self._num_overlapped,
            overlapped_bytes=self._overlap.num_bytes,
            wait_seconds_p50=self._overlap.waited(50),
            wait_seconds_p99=self._overlap.waited(99),
            advice=advice,
        )

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Wait until all ranks have sealed the last save, say what came of it, let go of it all.

        From then on the daemon makes it durable alone. Raises what made it fail, DeadlineExceeded
        if another rank did not seal within *timeout* seconds. Idempotent.
        """
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self._at_exit)
        try:
            self._overlap.close()
            self._say_what_became(timeout)
        finally:
            self._keeper.stop()
            if self._ahead_ is not None:
                self._ahead_.close()
            if self._ranks_ is not None:
                self._ranks_.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except ForebayError:
            if error is None:
                raise
            _log.warning("the last save of run %s failed, too", self.run, exc_info=True)

    def _say_what_became(self, timeout: float) -> None:
        saved = self._last
        if saved is None:
            return
        try:
            saved.wait("ram", timeout)
            outcome = f"is {(durability := saved.durability)}"
            if durability == "ram":
                outcome += ": it becomes local without this process"
        except ForebayError as error:
            if saved.seen != "ram":  # it cannot be asked any more
                _say(f"generation {saved.generation} was {saved.seen} when it was last asked")
                return
            _say(f"generation {saved.generation} FAILED: {error}")
            raise
        if self._ranks_ is not None and self._ranks_.rank == 0:
            _say(f"generation {saved.generation} {outcome}")

    def _begin_attempt(self, ranks: Ranks, parent: GenerationId | None) -> None:
        if self._ahead_ is not None:  # it is the older attempt's
            self._ahead_.forget()
        what = f"begin an attempt of run {self.run}"
        fork = self._service.fork
        told = ranks.exchange(what, [self._keep_json, list(fork) if fork else None])
        if any(one != told[0] for one in told):
            said = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(told))
            raise InvalidRequest(f"the ranks give different keep or fork_from: {said}")
        begin = partial(self._service.begin_attempt, parent, ranks.size, self._keep_json)
        self._attempt = ranks.decide(what, begin)

    def _forked(self, ranks: Ranks) -> GenerationId | None:
        """What a first attempt stands on that restored nothing: the generation to fork from."""
        if self._service.fork is None:
            return None

        def look() -> list[Any] | None:
            if self._service.is_begun():
                return None
            found = self._service.resolve_fork("local", (), self.timeout)
            return [found.run, found.attempt, found.step]

        found = ranks.decide(f"find what run {self.run} is forked from", look)
        return None if found is None else GenerationId(*found)

    def _ranks(self) -> Ranks:
        if self._ranks_ is None:
            self._ranks_ = Ranks.join(self._process_group, self.timeout + _GROUP_MARGIN_SECONDS)
        return self._ranks_

    def _check_step(self, step: int) -> None:
        self._check_open()
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise InvalidRequest(f"step {step!r} is not a whole number from 0")

    def _check_open(self) -> None:
        if self._is_closed:
            raise InvalidRequest(f"the Checkpointer of run {self.run} is closed: make another one")


def _say(text: str) -> None:
    sys.stderr.write(f"forebay: {text}\n")


def _close_at_exit(checkpointer: Checkpointer) -> Any:
    """Registers a close at the end of this process, and of no child of fork."""
    reference, process = weakref.ref(checkpointer), os.getpid()

    def close() -> None:
        alive = reference()
        if alive is None or os.getpid() != process:
            return
        try:
            alive.close()
        except ForebayError:
            _log.debug("closing at exit failed", exc_info=True)  # close() has said so

    atexit.register(close)
    return close
