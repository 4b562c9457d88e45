"""Tells the daemon what a loader is going to read and where it stands, without making it wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from forebay.dataset.advice import PlanFit
from forebay.dataset.heartbeat import SEND_SECONDS, Heartbeat
from forebay.transfer import Transfer, make_transfer
from forebay_wire.errors import DaemonUnavailable, ForebayError, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.protocol import DataEndpoint

CALM_SECONDS: Final = 0.5
"""The daemon is told at most so often where a loader stands that waits for nothing any more."""

ACCOUNT_SECONDS: Final = 0.5
"""The daemon is told a loader's sums at most so often."""


@dataclass(frozen=True)
class PlanNews:
    """What the daemon last said about a plan."""

    problem: str = ""
    """Why there is no plan: the loader reads without one, only slower."""
    waits: Mapping[str, float] = field(default_factory=dict)
    """``num_waits`` and, by reason, ``tier_seconds``, ``queue_seconds``, ``throttle_seconds``,
    ``origin_seconds``: how long blobs were waited for in the daemon, and why; ``longest_seconds``
    of one wait."""
    fit: PlanFit = field(default_factory=PlanFit)
    """How much it reads in an epoch, and how much of that the local tiers can hold."""


@dataclass
class Standing:
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
    account: Callable[[PlanFit], dict[str, Any]] | None = None
    """The loader's sums."""
    accounted_at: float = 0.0
    waited: tuple[float, int] | None = None
    """How often it had waited, and in which epoch that was last more than before."""

    def pause_seconds(self) -> float:
        """Longer where all that is read fits into the local tiers, and an epoch came from there."""
        fit = self.news.fit
        fits = fit.plan_bytes > 0 and bool(fit.tier_bytes) and fit.short_bytes == 0
        is_calm = fits and self.waited is not None and self.place[0] > self.waited[1]
        return CALM_SECONDS if is_calm else SEND_SECONDS

    def send(self) -> float | None:
        """Tell where the loader stands; after how many seconds there is more to tell."""
        place, transfer = self.place, make_transfer(self.endpoint)
        body: dict[str, Any] = {"plan": self.plan, "epoch": place[0], "position": place[1]}
        now, again = time.monotonic(), None
        if self.account is not None:
            again = self.accounted_at + ACCOUNT_SECONDS - now
            if again <= 0.0:
                body["times"] = self.account(self.news.fit)
                self.accounted_at, again = now, None
        answer = None
        if self.sent is not None and place >= self.sent:
            with contextlib.suppress(NotFound):  # of a daemon that was restarted
                answer = self.go_on(transfer, body)
        if answer is None:
            answer = self.begin(transfer, body)
        self.sent = place
        self.news = PlanNews(waits=answer["waits"], fit=_fit(answer.get("fit")))
        num_waits = self.news.waits.get("num_waits", 0)
        if self.waited is None or num_waits != self.waited[0]:
            self.waited = (num_waits, place[0])
        return again

    def begin(self, transfer: Transfer, body: dict[str, Any]) -> dict[str, Any]:
        """Tell the whole plan; *body*: its name, where it stands, and maybe the loader's sums."""
        order = self.make_order()
        return transfer.plan("plan", {**body, "loader": self.loader, "order": order})

    def go_on(self, transfer: Transfer, body: dict[str, Any]) -> dict[str, Any]:
        """Tell where a plan stands that the daemon knows, at least where it stood before."""
        return transfer.plan("position", body)

    def failed(self, error: ForebayError | ValueError) -> None:
        self.sent = None
        if not isinstance(error, DaemonUnavailable):
            self.news = replace(self.news, problem=str(error))

    def end(self) -> None:
        if self.sent is not None:
            body: dict[str, Any] = {"plan": self.plan}
            if self.account is not None:
                body["times"] = self.account(self.news.fit)
            make_transfer(self.endpoint).plan("end_plan", body)


def _fit(told: object) -> PlanFit:
    """What a daemon says of the room for a plan; nothing if it is older."""
    if not isinstance(told, dict):
        return PlanFit()
    return PlanFit(int(told["plan_bytes"]), {str(k): int(v) for k, v in told["tiers"].items()})


class PlanReporter:
    """A loader's plan. Owns a thread from the first :meth:`stand` to :meth:`end` (or until it is
    forgotten). Its methods never block and never raise what the daemon answers."""

    def __init__(
        self, endpoint: DataEndpoint, loader: str, make_order: Callable[[], dict[str, Any]]
    ) -> None:
        """*make_order* gives the order's parameters when they are known; it must not refer to
        whoever owns this object. *loader* says whose plan it is, for people."""
        self._standing = Standing(make_order, loader, endpoint)
        self._heartbeat: Heartbeat | None = None

    def account(self, account: Callable[[PlanFit], dict[str, Any]]) -> None:
        """Have the daemon told *account*'s answer now and then, and at the end: the loader's sums.
        It is called in another thread, and must not refer to whoever owns this object."""
        self._standing.account = account

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
                "forebay-plan",
                standing.send,
                standing.failed,
                standing.end,
                standing.pause_seconds,
            )
        self._heartbeat.beat()

    def end(self) -> None:
        """End the plan. Idempotent."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
