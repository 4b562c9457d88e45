"""Tries calls of an object store again, with back-off and jitter, and says what was tried."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from forebay_server.model.backoff import store_delay_seconds
from forebay_server.tier.course import doing as spending
from forebay_server.tier.store_client import FaultKind, StoreFault
from forebay_wire.errors import (
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    StorageError,
)

T = TypeVar("T")


class CannotGiveRemote(InvalidRequest):
    """The store cannot create an object only if it does not exist: at most it may cache."""


TRIES: Final = 6
"""Tries of one call: with the delays between them about four seconds, plus what each takes."""
LONGEST_SECONDS: Final = 120.0
"""No new try begins after this: timeouts alone may take half a minute each."""

_ADVICE: Final[dict[FaultKind, str]] = {
    "no place": "; make the bucket, or correct object-url",
    "denied": "; check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "object-options) and what they allow",
    "full": "; delete datasets or generations, or give it more room",
    "changed": "; somebody else writes there, and another replica has to serve",
}


_CODES: Final[dict[FaultKind, int]] = {
    "no place": errno.ENODEV,
    "denied": errno.EHOSTUNREACH,
}
"""What says more of the whole store than of the call, in the words of ``model.health``."""


def cause_of(fault: StoreFault) -> OSError | None:
    """The cause of our error for *fault*: with it the error counts against the tier."""
    code = _CODES.get(fault.kind)
    return None if code is None else _system_error(code)


def _system_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Retrier:
    """Thread-safe. Every call that it is given may be made again without harm."""

    def __init__(
        self,
        where: str,
        *,
        tries: int = TRIES,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*where* names the tier in messages."""
        self._where = where
        self._tries = tries
        self._sleep = sleep
        self._clock = clock

    def run(self, doing: str, call: Callable[[], T]) -> T:
        """*call*, again after faults of the kind ``busy``; raises our errors only."""
        try:
            return self.attempt(doing, call)
        except StoreFault as fault:
            raise self.error(doing, fault) from cause_of(fault)

    def attempt(self, doing: str, call: Callable[[], T]) -> T:
        """Like :meth:`run`, but faults that no other try can cure come as they are."""
        began, tried = self._clock(), 0
        while True:
            try:
                return call()
            except StoreFault as fault:
                if fault.kind != "busy":
                    raise
                tried += 1
                passed = self._clock() - began
                if tried >= self._tries or passed > LONGEST_SECONDS:
                    raise StorageError(
                        f"{self._where} failed {doing}: {tried} tries in {passed:.1f} s, the last "
                        f"one: {fault.text}; is the store up, reachable and not overloaded? "
                        "Nothing stored there is given up"
                    ) from _system_error(errno.EHOSTUNREACH)
                with spending("throttle"):
                    self._sleep(store_delay_seconds(tried, random.random()))

    def error(self, doing: str, fault: StoreFault) -> ForebayError:
        """Our error for *fault*, which came while *doing* something."""
        text = f"{self._where} failed {doing}: {fault.text}{_ADVICE.get(fault.kind, '')}"
        if fault.kind == "missing":
            return NotFound(f"there is no such file ({self._where}, {doing})")
        if fault.kind == "full":
            return ResourceExhausted(text)
        if fault.kind == "changed":
            return IntegrityError(text)
        if fault.kind == "not exclusive":
            return CannotGiveRemote(text)
        return StorageError(text)

    def refusal(self, doing: str, fault: StoreFault) -> ForebayError:
        """The same where the tier is just being opened: settings that cannot work are named so."""
        error = self.error(doing, fault)
        if fault.kind in ("no place", "denied", "misconfigured"):
            return InvalidRequest(error.message)
        return error
