"""Tells the daemon what a loader is going to read and where it stands, without making it wait."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from forebay.transfer import make_transfer
from forebay_wire.errors import DaemonUnavailable, ForebayError, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.protocol import DataEndpoint

SEND_SECONDS: Final = 0.05
"""Positions are sent at most so often: the newest one counts."""

ALIVE_SECONDS: Final = 10.0
"""A loader that stands still says so this often: its plan's lease is longer."""

RETRY_SECONDS: Final = 1.0


@dataclass(frozen=True)
class PlanNews:
    """What the daemon last said about a plan."""

    problem: str = ""
    """Why there is no plan: the loader reads without one, only slower."""
    waits: Mapping[str, float] = field(default_factory=dict)
    """``num_waits`` and, by reason, ``tier_seconds``, ``queue_seconds``, ``throttle_seconds``,
    ``origin_seconds``: how long blobs were waited for in the daemon, and why; ``longest_seconds``
    of one wait."""


@dataclass
class _Standing:
    """What the loader's thread and the sending one share."""

    make_order: Callable[[], dict[str, Any]]
    loader: str
    endpoint: DataEndpoint
    plan: str = field(default_factory=new_random_name)
    place: tuple[int, int] = (0, 0)
    """Epoch and position; replaced as a whole."""
    sent: tuple[int, int] | None = None
    """None: the daemon knows no plan of this loader."""
    news: PlanNews = field(default_factory=PlanNews)
    moved: threading.Event = field(default_factory=threading.Event)
    is_over: bool = False


class PlanReporter:
    """A loader's plan. Owns a thread from the first :meth:`stand` to :meth:`end` (or until it is
    forgotten). Its methods never block and never raise what the daemon answers."""

    def __init__(
        self, endpoint: DataEndpoint, loader: str, make_order: Callable[[], dict[str, Any]]
    ) -> None:
        """*make_order* gives the order's parameters when they are known; it must not refer to
        whoever owns this object. *loader* says whose plan it is, for people."""
        self._standing = _Standing(make_order, loader, endpoint)
        self._pid = 0
        self._thread: threading.Thread | None = None

    @property
    def plan(self) -> str:
        """The plan's random name."""
        return self._standing.plan

    @property
    def news(self) -> PlanNews:
        return self._standing.news

    def stand(self, epoch: int, position: int) -> None:
        """The loader stands at *position* of *epoch*; if that is back, it plans anew."""
        standing = self._standing
        standing.place = (epoch, position)
        if self._pid != os.getpid():
            self._start()
        standing.moved.set()

    def end(self) -> None:
        """End the plan. Idempotent."""
        _finish(self._standing)
        thread, self._thread = self._thread, None
        if thread is not None and self._pid == os.getpid():
            thread.join(timeout=5.0)

    def _start(self) -> None:
        if self._pid:  # in a child of fork the plan is the parent's
            old = self._standing
            self._standing = _Standing(old.make_order, old.loader, old.endpoint, place=old.place)
        self._pid = os.getpid()
        standing = self._standing
        self._thread = threading.Thread(
            target=_send_positions, args=(standing,), name="forebay-plan", daemon=True
        )
        weakref.finalize(self, _finish, standing).atexit = False
        self._thread.start()


def _finish(standing: _Standing) -> None:
    standing.is_over = True
    standing.moved.set()


def _send_positions(standing: _Standing) -> None:
    """The thread: sends the newest position, now and then, until it is over."""
    pause = threading.Event()  # never set: a sleep that does not look like one
    while True:
        standing.moved.wait(ALIVE_SECONDS)
        standing.moved.clear()
        if standing.is_over:
            break
        try:
            _send(standing)
        except DaemonUnavailable:
            standing.sent = None
            pause.wait(RETRY_SECONDS)
            standing.moved.set()
        except ForebayError as error:
            standing.sent = None
            standing.news = PlanNews(error.message, standing.news.waits)
            pause.wait(RETRY_SECONDS)
        pause.wait(SEND_SECONDS)
    if standing.sent is not None:
        with contextlib.suppress(ForebayError):
            make_transfer(standing.endpoint).plan("end_plan", {"plan": standing.plan})


def _send(standing: _Standing) -> None:
    place, transfer = standing.place, make_transfer(standing.endpoint)
    body = {"plan": standing.plan, "epoch": place[0], "position": place[1]}
    answer = None
    if standing.sent is not None and place >= standing.sent:
        with contextlib.suppress(NotFound):  # of a daemon that was restarted
            answer = transfer.plan("position", body)
    if answer is None:
        order = standing.make_order()
        answer = transfer.plan("plan", {**body, "loader": standing.loader, "order": order})
    standing.sent = place
    standing.news = PlanNews(waits=answer["waits"])
