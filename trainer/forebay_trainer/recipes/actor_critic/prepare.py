"""First rows of a dataset that grows while an agent learns: what pushing at random came to, and the
states from which agents are tested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import torch
from torch import Tensor

from forebay_trainer.config import setting
from forebay_trainer.dropout import uniform
from forebay_trainer.environments import cart_pole, episodes
from forebay_trainer.preparation import SPLIT, Preparation, Type
from forebay_wire.errors import InvalidRequest

SCHEMA: Final[Mapping[str, Type]] = {
    "observation": ("float32", (cart_pole.NUM_STATES,)),
    "action": "int64",
    "log_probability": "float32",  # of the action, when it was chosen
    "advantage": "float32",
    "value": "float32",  # what the critic learns
    "seed": "int64",  # of the run that played; -1: none
    "epoch": "int64",  # that it played for
}


@dataclass(frozen=True, kw_only=True)
class Config:
    num_carts: int = setting(16, "that play side by side; as model.num_carts")
    num_steps: int = setting(256, "that each of them plays; as model.num_steps")
    num_tests: int = setting(100, "first states of the episodes that a policy is tested in")

    def __post_init__(self) -> None:
        for name in ("num_carts", "num_steps", "num_tests"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")


def prepare(config: Config) -> Preparation:
    return FirstEpisodes(config)


class FirstEpisodes(Preparation):
    schema = SCHEMA

    def __init__(self, config: Config) -> None:
        self._config = config

    def read(self) -> Iterator[pa.Table]:
        config = self._config
        played = episodes.play(
            evenly, config.num_carts, config.num_steps, (0,), torch.device("cpu")
        )
        rows = pa.table(episodes.columns(played, discount=0.99, trace=1.0, seed=-1, epoch=-1))
        yield rows.append_column(SPLIT, pa.array(["train"] * len(rows)))
        numbers = torch.arange(config.num_tests)
        tests = episodes.tests(cart_pole.starts(uniform((0, 1), numbers, cart_pole.NUM_STATES)))
        rows = pa.table(tests)
        yield rows.append_column(SPLIT, pa.array(["test"] * len(rows)))


def evenly(observations_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Both actions are equally likely, and nothing is expected."""
    nothing = observations_NS.new_zeros(len(observations_NS), cart_pole.NUM_ACTIONS)
    return nothing, nothing[:, 0]
