"""Tells the daemon what a loader is going to read and where it stands, without making it wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forebay.dataset.heartbeat import Heartbeat
from forebay.transfer import make_transfer
from forebay_wire.errors import DaemonUnavailable, ForebayError, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.protocol import DataEndpoint


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

    def send(self) -> None:
        place, transfer = self.place, make_transfer(self.endpoint)
        body = {"plan": self.plan, "epoch": place[0], "position": place[1]}
        answer = None
        if self.sent is not None and place >= self.sent:
            with contextlib.suppress(NotFound):  # of a daemon that was restarted
                answer = transfer.plan("position", body)
        if answer is None:
            order = self.make_order()
            answer = transfer.plan("plan", {**body, "loader": self.loader, "order": order})
        self.sent = place
        self.news = PlanNews(waits=answer["waits"])

    def failed(self, error: ForebayError | ValueError) -> None:
        self.sent = None
        if not isinstance(error, DaemonUnavailable):
            self.news = PlanNews(str(error), self.news.waits)

    def end(self) -> None:
        if self.sent is not None:
            make_transfer(self.endpoint).plan("end_plan", {"plan": self.plan})


class PlanReporter:
    """A loader's plan. Owns a thread from the first :meth:`stand` to :meth:`end` (or until it is
    forgotten). Its methods never block and never raise what the daemon answers."""

    def __init__(
        self, endpoint: DataEndpoint, loader: str, make_order: Callable[[], dict[str, Any]]
    ) -> None:
        """*make_order* gives the order's parameters when they are known; it must not refer to
        whoever owns this object. *loader* says whose plan it is, for people."""
        self._standing = _Standing(make_order, loader, endpoint)
        self._heartbeat: Heartbeat | None = None

    @property
    def plan(self) -> str:
        """The plan's random name."""
        return self._standing.plan

    @property
    def news(self) -> PlanNews:
        return self._standing.news

    def stand(self, epoch: int, position: int) -> None:
        """The loader stands at *position* of *epoch*; if that is back, it plans anew."""
        if self._heartbeat is not None and not self._heartbeat.is_ours:
            self._standing = replace(self._standing, plan=new_random_name(), sent=None)
            self._heartbeat = None  # in a child of fork the plan is the parent's
        standing = self._standing
        standing.place = (epoch, position)
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(
                "forebay-plan", standing.send, standing.failed, standing.end
            )
        self._heartbeat.beat()

    def end(self) -> None:
        """End the plan. Idempotent."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
