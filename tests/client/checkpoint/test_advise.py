"""The interval that is advised is the best one, as a simulation of failures has it, too."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.checkpoint.advise import advise, daly, lost_fraction
from forebay_wire.errors import InvalidRequest


def test_by_hand() -> None:
    found = advise(86400.0, [9.0, 10.0, 200.0])
    assert found.cost_seconds == 10.0
    assert found.young_seconds == pytest.approx(10 + math.sqrt(2 * 10 * 86400))
    ratio = 10 / (2 * 86400)
    by_daly = math.sqrt(2 * 10 * 86400) * (1 + math.sqrt(ratio) / 3 + ratio / 9)
    assert found.interval_seconds == pytest.approx(by_daly)
    assert found.lost_fraction == pytest.approx(
        10 / found.interval_seconds + found.interval_seconds / 2 / 86400
    )


@given(st.floats(1e-3, 1e4), st.floats(1.0, 1e7))
def test_no_other_interval_loses_less(cost: float, mtbf: float) -> None:
    found = advise(mtbf, [cost])
    assert found.interval_seconds > cost
    if cost < mtbf / 100:
        for factor in (0.5, 0.8, 1.25, 2.0):
            other = lost_fraction(found.interval_seconds * factor, cost, mtbf)
            assert other > found.lost_fraction * 0.999


def simulated(interval: float, cost: float, mtbf: float) -> float:
    """Share of the time that is lost, over many failures at random."""
    generator, useful, total = random.Random(1), 0.0, 0.0
    until_failure = generator.expovariate(1 / mtbf)
    for _ in range(200_000):
        if until_failure > interval:
            until_failure -= interval
            total += interval
            useful += interval - cost
        else:
            total += until_failure
            until_failure = generator.expovariate(1 / mtbf)
    return 1 - useful / total


def test_a_simulation_agrees() -> None:
    cost, mtbf = 5.0, 3600.0
    best = advise(mtbf, [cost])
    lost = simulated(best.interval_seconds, cost, mtbf)
    assert lost == pytest.approx(best.lost_fraction, rel=0.1)
    for factor in (0.4, 2.5):
        assert simulated(best.interval_seconds * factor, cost, mtbf) > lost


def test_slowdown_counts_and_long_saves_are_bounded() -> None:
    assert advise(3600.0, [1.0], slowdown_seconds=3.0).cost_seconds == 4.0
    assert daly(100.0, 40.0) == 40.0
    assert advise(3600.0, [1.0], landing_seconds=900.0).is_held_back
    assert not advise(3600.0, [1.0], landing_seconds=9.0).is_held_back


@pytest.mark.parametrize(
    ("mtbf", "costs"), [(0.0, [1.0]), (math.inf, [1.0]), (60.0, []), (60.0, [0.0])]
)
def test_nonsense_is_refused(mtbf: float, costs: list[float]) -> None:
    with pytest.raises(InvalidRequest):
        advise(mtbf, costs)
