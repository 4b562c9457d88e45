"""How long a failed job, or a call of an object store, waits before its next try."""

from __future__ import annotations

from typing import Final

FIRST_SECONDS: Final = 0.5
LONGEST_SECONDS: Final = 120.0
STORE_FIRST_SECONDS: Final = 0.15
STORE_LONGEST_SECONDS: Final = 5.0


def delay_seconds(tries: int, jitter: float) -> float:
    """Seconds to wait after try number *tries* (1 is the first) failed.

    Doubles from half a second up to two minutes; *jitter* in [0, 1) takes up to half of it away,
    so that many jobs that failed together do not come back together.
    """
    exponent = min(max(tries - 1, 0), 32)
    longest: float = min(LONGEST_SECONDS, FIRST_SECONDS * 2**exponent)
    return longest * (1 - jitter / 2)


def store_delay_seconds(tries: int, jitter: float) -> float:
    """Seconds to wait after try number *tries* (1 is the first) of one call of an object store.

    Short, as somebody waits; *jitter* in [0, 1) takes up to half of it away.
    """
    exponent = min(max(tries - 1, 0), 32)
    longest: float = min(STORE_LONGEST_SECONDS, STORE_FIRST_SECONDS * 2**exponent)
    return longest * (1 - jitter / 2)
