"""A pole on a cart that is pushed left or right, many of them side by side.

The equations and constants of Barto, Sutton and Anderson (1983, "Neuronlike adaptive elements
that can solve difficult learning control problems", appendix), friction included. Shape letters:
N carts. A state is position (m), its speed, angle of the pole (rad, 0: upright, right is positive),
its speed; float64, (N, 4).
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

GRAVITY: Final = 9.8
CART_MASS: Final = 1.0
POLE_MASS: Final = 0.1
HALF_LENGTH: Final = 0.5
"""From the joint to the pole's centre of mass."""
CART_FRICTION: Final = 0.0005
POLE_FRICTION: Final = 0.000002
FORCE: Final = 10.0
STEP_SECONDS: Final = 0.02
LARGEST_POSITION: Final = 2.4
LARGEST_ANGLE: Final = math.radians(12)

NUM_STATES: Final = 4
NUM_ACTIONS: Final = 2
"""0 pushes to the left, 1 to the right."""
LARGEST_START: Final = 0.05
"""Each number of a first state lies between minus this and this."""


def moved(state_N4: Tensor, actions_N: Tensor) -> Tensor:
    """The states a step later, by Euler's method."""
    _, speed, angle, turning = state_N4.unbind(dim=1)
    force = torch.where(actions_N == 1, FORCE, -FORCE)
    mass, lever = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
    sine, cosine = angle.sin(), angle.cos()
    rubbing = CART_FRICTION * speed.sign()
    push = (-force - lever * turning**2 * sine + rubbing) / mass
    turning_rate = (GRAVITY * sine + cosine * push - POLE_FRICTION * turning / lever) / (
        HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / mass)
    )
    speed_rate = (force + lever * (turning**2 * sine - turning_rate * cosine) - rubbing) / mass
    rates = torch.stack([speed, speed_rate, turning, turning_rate], dim=1)
    return state_N4 + STEP_SECONDS * rates


def has_failed(state_N4: Tensor) -> Tensor:
    """Whether the pole has fallen, or the cart left the track: (N,)."""
    position, _, angle, _ = state_N4.unbind(dim=1)
    return (position.abs() > LARGEST_POSITION) | (angle.abs() > LARGEST_ANGLE)


def starts(draws_N4: Tensor) -> Tensor:
    """First states from draws in [0, 1)."""
    return (2 * draws_N4.double() - 1) * LARGEST_START
