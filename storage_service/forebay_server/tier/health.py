"""A volume that turns read-only, or a store that does not answer, is out of service, alone."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

from forebay_server.model.health import DEVICE, UNREACHABLE, VolumeHealth
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import HEALTHY, Tier, TierReader, TierSpace, TierWriter
from forebay_server.tier.wrap import TierWrapper
from forebay_wire.errors import ForebayError, IntegrityError, StorageError
from forebay_wire.ids import new_random_name

logger = logging.getLogger(__name__)

PROBE_BYTES: Final = 4096
PROBE_SECONDS: Final = 5.0
"""Between two probes of what is out of service."""

ANSWER_SECONDS: Final = 5.0
"""What answered so lately can be reached."""

Changed = Callable[[str, bool, str], object]
"""``changed(tier, is in service, reason)``; called from any thread, once for each change."""


_ASKS: Final = frozenset({"publish", "head", "delete", "read_medium"})
"""Calls that no store can end without an answer of its own: others may not have asked it."""


class GuardedTier(TierWrapper):
    """Counts what the device answers; out of service it takes nothing new.

    Out of service, ``create`` is refused at once, and a file that cannot be read counts as
    unreachable (:class:`StorageError`), not as damaged: another replica serves and nothing is
    condemned for its volume's sake. Reads that work go on. :meth:`probe` brings it back.
    """

    def __init__(
        self,
        inner: Tier,
        changed: Changed = lambda name, in_service, reason: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        may_be_away: bool = False,
    ) -> None:
        """With *may_be_away*, one that does not answer is opened all the same, out of service:
        whoever opens it decides by :attr:`absence`, and gives it a :attr:`confirm`."""
        super().__init__(inner)
        self.absence: ForebayError | None = None
        """Why it could not be opened."""
        self.confirm: Callable[[Tier], object] = lambda tier: None
        """Told the tier once it could be opened after all; raises if it is another than it was."""
        self._may_be_away = may_be_away
        self._changed = changed
        self._clock = clock
        self._lock = threading.Lock()
        self._health = VolumeHealth()
        self._space: TierSpace | None = None
        self._answered = -math.inf
        self._is_open = True

    @property
    def health(self) -> str:
        found = self._health
        return HEALTHY if found.in_service else f"out of service: {found.reason}"

    def listen(self, changed: Changed) -> None:
        """Have *changed* told from now on."""
        self._changed = changed

    def open(self) -> None:
        """As the tier does; one that is read-only is out of service until a probe opens it."""
        self._is_open = False
        try:
            self.inner.open()
            self._is_open = True
            self._space = self.inner.space()
        except ForebayError as error:
            code = self._note(error)
            if code in UNREACHABLE and self._may_be_away:
                self.absence = error
                self._space = TierSpace(0, 0, 0, 0, 0)
                self._be_absent(error)
            elif code != errno.EROFS:
                raise
            logger.error("tier %s starts out of service: %s", self.name, error)

    def create(self, name: str, expected_bytes: int) -> TierWriter:
        found = self._health
        if not found.in_service:
            raise StorageError(
                f"tier {self.name} at {self.location} is out of service ({found.reason}); it is "
                "probed again and again, and serves as soon as it takes a file: see to the disk"
            )
        return super().create(name, expected_bytes)

    def space(self) -> TierSpace:
        """As it was when it was last told, without room, while it is out of service or away."""
        try:
            self._space = self.inner.space()
        except ForebayError as error:
            self._note(error)
            if self._space is None:
                raise
            return replace(self._space, free_bytes=0)
        return self._space if self._health.in_service else replace(self._space, free_bytes=0)

    @property
    def is_doubtful(self) -> bool:
        """Whether the last call was not answered."""
        return self._health.num_unreached > 0

    def answers(self) -> bool:
        if self._is_out() or self.is_doubtful:
            return False
        return self._clock() - self._answered < ANSWER_SECONDS or self.ask()

    def ask(self) -> bool:
        """Look for a file that is not there; whether the place answers, and is in service. What
        it says counts. Blocks."""
        with suppress(ForebayError):
            self.head(self.blob_name(new_random_name()))
            return not self._is_out()
        return False

    def probe(self) -> bool:
        """Write a file, read it back, remove it; whether the tier is in service then. Blocks."""
        name, data = self.inner.blob_name(new_random_name()), os.urandom(PROBE_BYTES)
        try:
            if not self._is_open:
                self._open_late()
            self.inner.put(name, data)
            try:
                good = self.inner.get(name) == data
            finally:
                self.inner.delete(name)
        except ForebayError as error:
            self._note(error)
            return False
        if good:
            self._become(lambda health: health.probed())
        return self._health.in_service

    def _open_late(self) -> None:
        try:
            self.inner.open()
            self.confirm(self.inner)
        except ForebayError as error:
            self.inner.close()
            self._be_absent(error)
            raise
        self._is_open = True
        self.absence = None

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        if operation != "open":
            self._check_confirmed()
        try:
            yield
        except ForebayError as error:
            self._failed(name, error)
            raise
        if operation in _ASKS:
            self._told()

    def read(self, name: str) -> TierReader:
        self._check_confirmed()
        try:
            found = self.inner.read(name)
        except ForebayError as error:
            self._failed(name, error)
            raise
        self._told()
        return self.surround(name, found)

    def _check_confirmed(self) -> None:
        """Nothing is asked of a place that may be another than it was."""
        if self.absence is not None:
            raise StorageError(
                f"tier {self.name} at {self.location} is out of service: {self._health.reason}"
            ) from self.absence.__cause__

    def _told(self) -> None:
        """The place has answered."""
        self._answered = self._clock()
        if self._health.num_unreached:
            self._become(lambda health: health.answered())

    def _failed(self, name: str, error: ForebayError) -> None:
        """Count *error*; :class:`StorageError` if it says more of the volume than of the file."""
        code = self._note(error)
        if isinstance(error, IntegrityError) and code in DEVICE and self._is_out():
            raise StorageError(
                f"tier {self.name} is out of service, nothing is known of file {name}: "
                f"{error.message}"
            ) from error

    def _is_out(self) -> bool:
        return not self._health.in_service

    def _note(self, error: ForebayError) -> int:
        """Count what the system said, if this came from it."""
        cause = error.__cause__
        code = cause.errno or 0 if isinstance(cause, OSError) else 0
        if code:
            now = self._clock()
            self._become(lambda health: health.failed(code, error.message, now))
        return code

    def _be_absent(self, error: ForebayError) -> None:
        self._become(lambda health: health.absent(error.message, self._clock()))

    def _become(self, step: Callable[[VolumeHealth], VolumeHealth]) -> None:
        with self._lock:
            before, self._health = self._health, step(self._health)
            after = self._health
        if before.in_service and not after.in_service:
            logger.error("tier %s is taken out of service: %s", self.name, after.reason)
            self._changed(self.name, False, after.reason)
        elif after.in_service and not before.in_service:
            logger.warning("tier %s is in service again", self.name)
            self._changed(self.name, True, "")


class TierWatch:
    """Probes what is out of service, again and again, asks what gave no answer whether it is there,
    and has every change written down."""

    def __init__(
        self,
        tiers: Tiers,
        write_down: Callable[[str, str, str], Awaitable[object]],
        *,
        interval_seconds: float = PROBE_SECONDS,
    ) -> None:
        """``write_down(tier, event, detail)`` keeps an event; if it fails, it is logged."""
        self._tiers = tiers
        self._write_down = write_down
        self._interval_seconds = interval_seconds

    async def run(self) -> None:
        """Until cancelled."""
        changes: asyncio.Queue[tuple[str, bool, str]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def changed(name: str, in_service: bool, reason: str) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changes.put_nowait, (name, in_service, reason))

        guarded = [tier for tier in self._tiers.all if isinstance(tier, GuardedTier)]
        for tier in guarded:
            tier.listen(changed)
        while True:
            try:
                change = await asyncio.wait_for(changes.get(), self._interval_seconds)
            except TimeoutError:
                for tier in guarded:
                    if tier.health != HEALTHY:
                        await self._tiers.run(tier, tier.probe)
                    elif tier.is_doubtful:
                        await self._tiers.run(tier, tier.ask)
            else:
                await self._keep(*change)

    async def _keep(self, name: str, in_service: bool, reason: str) -> None:
        event = "in service" if in_service else "out of service"
        try:
            await self._write_down(name, event, reason)
        except ForebayError as error:
            logger.warning("tier %s, %s: not written down: %s", name, event, error)
