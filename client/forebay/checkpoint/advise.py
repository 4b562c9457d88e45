"""How often to save: the interval that loses the least time, from what a save costs. Pure.

With *M* the mean time between failures and *δ* the time that a save takes from the training (the
stall, and what the steps after it are slower), the time between saves that costs the least is about

- √(2 δ M) (J. W. Young: "A first order approximation to the optimum checkpoint interval",
  Communications of the ACM 17(9), 1974);
- √(2 δ M) · (1 + √(δ / 2M) / 3 + (δ / 2M) / 9) - δ for δ < 2 M, else M (J. T. Daly: "A higher order
  estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems
  22(3), 2006, equation 37).

Both take failures to come at random at a constant rate. A run on n machines fails n times as often
as one of them. Nothing here is ever applied by itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True)
class Advice:
    """An interval, and what it costs. All in seconds."""

    mtbf_seconds: float
    """Mean time between failures of the whole run."""
    cost_seconds: float
    """That one save takes from the training."""
    landing_seconds: float
    """From the end of a save's copy until it is durable: a failure before that loses it."""
    restart_seconds: float
    """From a failure until the training goes on."""
    interval_seconds: float
    """Between the begins of two saves, by Daly."""
    young_seconds: float
    """The same by Young."""
    lost_fraction: float
    """Of all time, lost to saves, to work that is done twice and to restarts."""

    @property
    def is_held_back(self) -> bool:
        """Whether saves take longer to become durable than the interval is long."""
        return self.landing_seconds > self.interval_seconds


def advise(
    mtbf_seconds: float,
    costs_seconds: Sequence[float],
    *,
    slowdown_seconds: float = 0.0,
    landing_seconds: float = 0.0,
    restart_seconds: float = 0.0,
) -> Advice:
    """The advice for a run that fails every *mtbf_seconds* and whose saves held it up for
    *costs_seconds*: of them the median counts, and *slowdown_seconds* on top.

    The interval is never shorter than a save takes. InvalidRequest without a failure rate or cost.
    """
    if not (mtbf_seconds > 0 and math.isfinite(mtbf_seconds)):
        raise InvalidRequest(f"a mean time between failures of {mtbf_seconds} s is none")
    if not costs_seconds:
        raise InvalidRequest("no save has been measured: save some, or say what one costs")
    cost = statistics.median(costs_seconds) + slowdown_seconds
    if not cost > 0:
        raise InvalidRequest(f"a save that takes {cost} s costs nothing: save as often as you like")
    interval = cost + daly(cost, mtbf_seconds)
    lost = lost_fraction(interval, cost, mtbf_seconds, landing_seconds, restart_seconds)
    young = cost + math.sqrt(2 * cost * mtbf_seconds)
    times = mtbf_seconds, cost, landing_seconds, restart_seconds
    return Advice(*times, interval, young, lost)


def daly(cost: float, mtbf: float) -> float:
    """Seconds of training between two saves, by the second paper's equation 37."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def lost_fraction(
    interval: float, cost: float, mtbf: float, landing: float = 0.0, restart: float = 0.0
) -> float:
    """Share of all time that is lost with saves every *interval* seconds: at most 1.

    By the first paper's model, to first order: a save costs its time in every interval, a failure
    half an interval (and what had not landed), and the restart.
    """
    return min(1.0, cost / interval + (interval / 2 + landing + restart) / mtbf)
