"""Has the ranks of an attempt wait for each other, until they are told how to save a step."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from forebay_server.model.save_rounds import Ask, Ruling, SaveRounds
from forebay_wire.errors import Conflict

WAIT_SECONDS: Final = 10.0
"""How long ranks wait here for the others. One that comes later costs all of them a planning, and
whether it comes at all is what the ranks find out among themselves."""

MAX_ATTEMPTS: Final = 256
"""Attempts whose plans are remembered; of the others all ranks plan anew."""


@dataclass
class _Attempt:
    rounds: SaveRounds
    ruled: dict[int, asyncio.Event] = field(default_factory=dict)
    """Of the rounds in which somebody waits."""


class SaveVerdicts:
    """Belongs to the event loop. Nothing here is durable."""

    def __init__(self, wait_seconds: float = WAIT_SECONDS) -> None:
        self._wait_seconds = wait_seconds
        self._attempts: OrderedDict[tuple[str, int], _Attempt] = OrderedDict()

    async def ask(
        self,
        attempt: tuple[str, int],
        num_ranks: int,
        rank: int,
        number: int,
        ask: Ask,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> Ruling:
        """The common ruling of save *number* of *attempt* (run, attempt).

        Returns when all ranks have asked, one of them has failed, or some did not come in time.
        :class:`Conflict` if the ranks disagree on their number.
        """
        found = self._attempt(attempt, num_ranks)
        ruling = found.rounds.ask(number, rank, ask, busy=is_busy())
        if ruling is not None:
            self._wake(found)
            return ruling
        self._wake(found)  # those of an older round need not wait any longer
        ruled = found.ruled.setdefault(number, asyncio.Event())
        try:
            async with asyncio.timeout(self._wait_seconds):
                await ruled.wait()
        except TimeoutError:
            pass
        ruling = found.rounds.give_up(number, busy=is_busy())
        self._wake(found)
        return ruling

    def forget(self, run: str, newest: int) -> None:
        """Attempts of *run* older than *newest* save no more."""
        for key in [key for key in self._attempts if key[0] == run and key[1] < newest]:
            del self._attempts[key]

    def _attempt(self, key: tuple[str, int], num_ranks: int) -> _Attempt:
        found = self._attempts.setdefault(key, _Attempt(SaveRounds(num_ranks)))
        self._attempts.move_to_end(key)
        if len(self._attempts) > MAX_ATTEMPTS:
            self._attempts.popitem(last=False)
        if found.rounds.num_ranks != num_ranks:
            raise Conflict(
                f"run {key[0]} attempt {key[1]} is saved by {found.rounds.num_ranks} ranks, one "
                f"says {num_ranks}: all ranks must name the same number"
            )
        return found

    def _wake(self, found: _Attempt) -> None:
        rounds = found.rounds
        for number, event in list(found.ruled.items()):
            if number < rounds.number or rounds.ruling is not None:
                event.set()
                del found.ruled[number]
