"""Episodes that a policy plays with the cart and pole, and what each of its actions came to.

Shape letters: T steps, N carts, A actions. A policy takes observations, float32 (N, 4), and answers
logits (N, A) of the actions and what it expects of the states (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from forebay_trainer.dropout import uniform
from forebay_trainer.environments import cart_pole

Policy = Callable[[Tensor], tuple[Tensor, Tensor]]

LONGEST: Final = 500
"""Steps after which an episode is broken off, standing pole or not."""

FOR_ACTIONS, FOR_STARTS = range(2)
"""What is drawn."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """What was seen and done: (T, N), observations (T, N, 4). Every step is worth a reward of 1."""

    observations: Tensor
    actions: Tensor
    log_probabilities: Tensor
    """Of the actions, under the policy that chose them."""
    values: Tensor
    """What the policy expected of each state."""
    next_values: Tensor
    """And of the state that followed: 0 where it had failed."""
    ends: Tensor
    """Whether the episode ended with this step: failed, or broken off."""


@torch.no_grad()
def play(
    policy: Policy, num_carts: int, num_steps: int, words: tuple[int, ...], device: torch.device
) -> Played:
    """Each cart plays episodes, one after another, for *num_steps* steps. What is drawn is a
    function of *words*, the cart and the step."""
    carts_N = torch.arange(num_carts, device=device)
    draws_NT = uniform((*words, FOR_ACTIONS), carts_N, num_steps)
    starts_NT4 = uniform((*words, FOR_STARTS), carts_N, 4 * num_steps).view(num_carts, -1, 4)
    state_N4 = cart_pole.starts(starts_NT4[:, 0])
    age_N = torch.zeros_like(carts_N)
    seen, done = [], []
    logits_NA, values_N = policy(state_N4.float())
    for step in range(num_steps):
        shares_NA = F.log_softmax(logits_NA, dim=1)
        actions_N = (draws_NT[:, step] >= shares_NA[:, 0].exp()).long()
        chosen_N = shares_NA.gather(1, actions_N[:, None])[:, 0]
        seen.append(state_N4.float())
        state_N4, age_N = cart_pole.moved(state_N4, actions_N), age_N + 1
        failed_N = cart_pole.has_failed(state_N4)
        ends_N = failed_N | (age_N == LONGEST)
        following_N = torch.where(failed_N, 0.0, policy(state_N4.float())[1])
        done.append((actions_N, chosen_N, values_N, following_N, ends_N))
        state_N4 = torch.where(ends_N[:, None], cart_pole.starts(starts_NT4[:, step]), state_N4)
        age_N = torch.where(ends_N, 0, age_N)
        logits_NA, values_N = policy(state_N4.float())
    actions, chosen, values, following, ends = map(torch.stack, zip(*done, strict=True))
    return Played(
        observations=torch.stack(seen),
        actions=actions,
        log_probabilities=chosen,
        values=values,
        next_values=following,
        ends=ends,
    )


def advantages(played: Played, discount: float, trace: float) -> Tensor:
    """By how much each action did better than expected: (T, N).

    The sum of the errors of the expectations, r + discount · v(s') - v(s), from this step to the
    end of its episode, each weighted (discount · trace)^steps (Schulman et al., 2015, arXiv
    1506.02438, equation 16). *trace* 1: the discounted rewards minus the baseline v(s), as in
    REINFORCE with baseline; 0: one step's error, as in one-step actor-critic (Sutton and Barto,
    2018, sections 13.4 and 13.5). Where playing or an episode was broken off, v stands for what
    would have come.
    """
    errors_TN = 1.0 + discount * played.next_values - played.values
    sum_N = torch.zeros_like(errors_TN[0])
    found = torch.empty_like(errors_TN)
    for step in reversed(range(len(errors_TN))):
        sum_N = errors_TN[step] + discount * trace * torch.where(played.ends[step], 0.0, sum_N)
        found[step] = sum_N
    return found


def columns(
    played: Played, *, discount: float, trace: float, seed: int, epoch: int
) -> dict[str, Any]:
    """Columns of a dataset's rows: what each action came to, cart by cart. Advantages have mean 0
    and deviation 1 over all rows."""
    found_TN = advantages(played, discount, trace)
    spread = found_TN.std(correction=0).clamp(min=1e-8)
    by_row = {
        "action": played.actions,
        "log_probability": played.log_probabilities,
        "advantage": (found_TN - found_TN.mean()) / spread,
        "value": played.values + found_TN,
    }
    rows = {name: each.T.flatten().cpu().numpy() for name, each in by_row.items()}
    observations = played.observations.transpose(0, 1).flatten(0, 1).contiguous().cpu().numpy()
    rows["observation"] = pa.FixedShapeTensorArray.from_numpy_ndarray(observations)
    for name, number in (("seed", seed), ("epoch", epoch)):
        rows[name] = np.full(len(observations), number)
    return rows


def tests(starts_N4: Tensor) -> dict[str, Any]:
    """Rows that are first states of episodes; nothing was done in them."""
    observations = starts_N4.float().numpy()
    nothing = np.zeros(len(observations))
    rows: dict[str, Any] = {
        "observation": pa.FixedShapeTensorArray.from_numpy_ndarray(observations)
    }
    for name in ("log_probability", "advantage", "value"):
        rows[name] = nothing.astype(np.float32)
    for name, number in (("action", 0), ("seed", -1), ("epoch", -1)):
        rows[name] = np.full(len(observations), number)
    return rows


@torch.no_grad()
def lengths(policy: Policy, starts_N4: Tensor) -> Tensor:
    """How many steps an episode from each first state lasts, if always the likelier action is
    taken: float32 (N,), at most `LONGEST`."""
    state_N4 = starts_N4.double()
    stands_N = torch.ones(len(state_N4), dtype=torch.bool, device=state_N4.device)
    lengths_N = torch.zeros(len(state_N4), device=state_N4.device)
    # All steps even if all have failed: where weights are sharded, the ranks have to call the
    # policy equally often.
    for _ in range(LONGEST):
        actions_N = policy(state_N4.float())[0].argmax(dim=1)
        lengths_N += stands_N
        state_N4 = cart_pole.moved(state_N4, actions_N)
        stands_N = stands_N & ~cart_pole.has_failed(state_N4)
        state_N4 = torch.where(stands_N[:, None], state_N4, 0.0)
    return lengths_N
