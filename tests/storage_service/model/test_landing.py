"""Which tier takes new bytes, and which copy serves."""

from __future__ import annotations

import pytest

from forebay_server.model.landing import Room, choose_landing, reading_order

ROOMS = (Room("ssd", 100), Room("hdd", 1000))


@pytest.mark.parametrize(
    ("num_bytes", "tiers"),
    [(0, ("ssd", "hdd")), (100, ("ssd", "hdd")), (101, ("hdd",)), (1001, ())],
)
def test_bytes_land_in_the_best_tier_with_room(num_bytes: int, tiers: tuple[str, ...]) -> None:
    assert choose_landing(num_bytes, ROOMS) == tiers


@pytest.mark.parametrize(
    ("kinds", "order"),
    [
        ([], []),
        (["object", "hdd", "ssd"], [2, 1, 0]),
        (["hdd", "ssd", "hdd"], [1, 0, 2]),
    ],
)
def test_the_fastest_copy_is_read_first(kinds: list[str], order: list[int]) -> None:
    assert reading_order(kinds) == order
