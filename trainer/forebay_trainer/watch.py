"""Notices that a rank died, failed or hangs, and ends the others with a sentence that says so.

A thread of each rank writes a sign of life to a board that all ranks see, and reads those of the
others. The loop tells it where it is; a rank that has not come further for ``step_seconds`` hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from forebay_trainer.config import setting
from forebay_trainer.meeting import part_of
from forebay_trainer.parallel import Parallel
from forebay_wire.errors import ForebayError, InvalidRequest

EXIT_STATUS: Final = 3
"""Of a rank that was ended because of another one, or because it hung."""

GRACE_SECONDS: Final = 5.0
"""The thread that trains has so long to end by an error of its own."""

ARM_SECONDS: Final = 1.0
"""The timer of the C library is set anew so often: each time is a thread."""

STORE_SECONDS: Final = 20.0

_LOST_CONTACT: Final = re.compile(r"gloo|nccl|connection|broken pipe|rank .* (gone|lost)", re.I)


class RankLost(ForebayError):
    """Another rank died or failed; the message says which, and where the run can go on."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    step_seconds: float = setting(
        600.0, "a rank that comes no further for so long hangs: all ranks end, with their stacks"
    )
    peer_seconds: float = setting(
        30.0, "a rank whose process gives no sign of life for so long is dead: all ranks end"
    )
    beat_seconds: float = setting(1.0, "between two signs of life")

    def __post_init__(self) -> None:
        if not 0 < self.beat_seconds < self.peer_seconds / 2:
            raise InvalidRequest(
                f"beat_seconds must be above 0 and below half of peer_seconds, not "
                f"{self.beat_seconds}"
            )
        if self.step_seconds <= 0:
            raise InvalidRequest(f"step_seconds must be above 0, not {self.step_seconds}")


@dataclass(frozen=True)
class Sign:
    """What a rank tells the others."""

    beat: int = 0
    step: int = 0
    phase: str = "start"
    quiet_seconds: float = 0.0
    """Since the thread that trains came to this phase."""
    state: Literal["running", "failed", "lost", "ended"] = "running"
    """lost: it failed because it lost contact, so another rank is to blame."""
    reason: str = ""

    @property
    def place(self) -> str:
        return f"in step {self.step} ({self.phase})"


class Judge:
    """Decides from the signs of life. Pure: the caller brings the clock."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._fresh: dict[int, tuple[float, int]] = {}

    def look(self, now: float, signs: Mapping[int, Sign]) -> str | None:
        """Why this run has to end, or None."""
        for rank, sign in signs.items():
            if rank not in self._fresh or self._fresh[rank][1] != sign.beat:
                self._fresh[rank] = (now, sign.beat)
        for rank, sign in signs.items():
            if sign.state == "failed":
                return f"rank {rank} failed {sign.place}: {sign.reason}"
        silent = self.silent(now, signs, self._config.peer_seconds)
        if silent:
            return silent
        running = {rank: sign for rank, sign in signs.items() if sign.state == "running"}
        if any(sign.quiet_seconds > self._config.step_seconds for sign in running.values()):
            where = "; ".join(
                f"rank {rank} {sign.place} for {sign.quiet_seconds:.0f} s"
                for rank, sign in running.items()
            )
            return f"no progress for {self._config.step_seconds:.0f} s: {where}"
        return None

    def silent(self, now: float, signs: Mapping[int, Sign], seconds: float) -> str | None:
        """The ranks that should be running and gave no sign for so long, in a sentence."""
        dead = [
            f"rank {rank}, last {sign.place},"
            for rank, sign in signs.items()
            if sign.state == "running" and now - self._fresh[rank][0] > seconds
        ]
        if not dead:
            return None
        return f"{' and '.join(dead)} gave no sign of life for {seconds:.0f} s"


class Board(Protocol):
    """Where ranks leave their signs; used by one thread at a time."""

    def put(self, rank: int, text: str) -> None: ...

    def read(self) -> list[str]:
        """What each rank wrote last, in order of rank."""
        ...


class StoreBoard:
    """The board in torch's rendezvous store, through a connection of its own."""

    def __init__(self, parallel: Parallel) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=STORE_SECONDS)
        store = TCPStore(host, port, is_master=False, timeout=timeout)
        self._store = PrefixStore("watch", part_of(store, parallel.start))
        self._keys = [str(rank) for rank in range(parallel.num_ranks)]

    def put(self, rank: int, text: str) -> None:
        self._store.set(str(rank), text)

    def read(self) -> list[str]:
        return [value.decode() for value in self._store.multi_get(self._keys)]


class Watch:
    """A context manager around the training on this rank. `at` is called by the loop."""

    def __init__(
        self,
        config: WatchConfig,
        parallel: Parallel,
        last_good: Callable[[], str],
        *,
        make_board: Callable[[Parallel], Board] = StoreBoard,
    ) -> None:
        self._config = config
        self._parallel = parallel
        self._last_good = last_good
        self._make_board = make_board
        self._judge = Judge(config)
        self._sign = Sign()
        self._since = time.monotonic()
        self._armed = -ARM_SECONDS
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._board: Board | None = None
        self._signs: dict[int, Sign] = {}
        self._verdict: str | None = None
        self._thread = threading.Thread(target=self._run, name="forebay-watch", daemon=True)

    def at(self, step: int, phase: str) -> None:
        """The thread that trains has come here. Cheap."""
        self._sign = replace(self._sign, step=step, phase=phase)
        self._since = time.monotonic()
        if self._since - self._armed > ARM_SECONDS:
            self._armed = self._since
            # Should this process hang so that no thread of Python runs, the C library still writes
            # the stacks and ends it.
            margin = ARM_SECONDS + GRACE_SECONDS + 3 * self._config.beat_seconds
            faulthandler.dump_traceback_later(self._config.step_seconds + margin, exit=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        if self._parallel.num_ranks > 1:
            self._board = self._make_board(self._parallel)
            self._board.put(self._parallel.rank, json.dumps(asdict(self._sign)))
            self._parallel.sum([0.0])  # all have written: nobody waits for a key
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if error is not None and not isinstance(error, ForebayError):
            error.add_note(self._last_good())
        if error is None:
            self._leave("ended", "")
        elif self._board is not None and isinstance(error, Exception):
            self._fail(error)
        else:
            self._leave("failed", repr(error))

    def _fail(self, error: Exception) -> None:
        """Tells the others why this rank ends; RankLost if another one is to blame."""
        text = " ".join(str(error).split())
        culprit = self._culprit() if _LOST_CONTACT.search(text) else None
        if culprit is None:
            self._leave("failed", f"{type(error).__name__}: {text}")
            return
        self._leave("lost", text)
        raise RankLost(f"{culprit}; {self._last_good()}") from error

    def _culprit(self) -> str | None:
        """Which rank failed or died, as far as the others' signs tell within a few beats."""
        self._sign = replace(self._sign, state="lost")
        deadline = time.monotonic() + 4 * self._config.beat_seconds + GRACE_SECONDS
        while self._verdict is None and time.monotonic() < deadline:
            self._stopped.wait(self._config.beat_seconds / 4)
        silent_seconds = 3 * self._config.beat_seconds
        return self._verdict or self._judge.silent(time.monotonic(), self._signs, silent_seconds)

    def _leave(self, state: Literal["failed", "lost", "ended"], reason: str) -> None:
        self._sign = replace(self._sign, state=state, reason=reason)
        self._stopped.set()
        self._wake.set()
        self._thread.join(GRACE_SECONDS)

    def _run(self) -> None:
        while True:
            is_last = self._stopped.is_set()
            verdict = self._look()
            if is_last:
                return
            if verdict is not None and self._verdict is None:
                self._verdict = verdict
                if not self._stopped.wait(GRACE_SECONDS):
                    self._give_up(verdict)
            self._wake.wait(self._config.beat_seconds)

    def _look(self) -> str | None:
        now = time.monotonic()
        self._sign = replace(
            self._sign, beat=self._sign.beat + 1, quiet_seconds=round(now - self._since, 3)
        )
        signs = {self._parallel.rank: self._sign}
        if self._board is not None:
            try:
                self._board.put(self._parallel.rank, json.dumps(asdict(self._sign)))
                signs = {r: Sign(**json.loads(text)) for r, text in enumerate(self._board.read())}
            except (RuntimeError, OSError) as error:
                return f"the meeting point of all ranks is gone ({_short(error)})"
        self._signs = signs
        if self._sign.state != "running":  # what became of this rank is no news to it
            signs = {rank: sign for rank, sign in signs.items() if rank != self._parallel.rank}
        return self._judge.look(now, signs)

    def _give_up(self, verdict: str) -> None:
        """The thread that trains cannot be interrupted where it hangs: the process ends."""
        sys.stderr.write(
            f"forebay_trainer, rank {self._parallel.rank}: ended {self._sign.place}, because "
            f"{verdict}; {self._last_good()}\nThe stacks of this rank:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_STATUS)


def _short(error: Any) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
