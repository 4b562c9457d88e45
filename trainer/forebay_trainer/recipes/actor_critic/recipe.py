"""An agent that learns to balance a pole from what it does: each epoch trains on episodes that the
policy of the epoch before has just played, written as a new version of the dataset.

Shape letters: B rows, S numbers of a state, A actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from forebay_trainer.config import setting
from forebay_trainer.data import Data
from forebay_trainer.environments import cart_pole, episodes
from forebay_trainer.models.actor_critic import ActorCritic
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Config:
    hidden_features: int = setting(64, "of the two layers of actor and critic")
    num_carts: int = setting(16, "that play side by side before each epoch")
    num_steps: int = setting(256, "that each of them plays")
    discount: float = setting(0.99, "what a reward a step later is worth")
    trace: float = setting(
        0.95, "1: REINFORCE with a baseline; 0: one-step actor-critic; between: a mixture of both"
    )
    value_share: float = setting(0.5, "of the critic's loss")
    entropy_share: float = setting(0.0, "of the entropy of the policy, which is rewarded")

    def __post_init__(self) -> None:
        for name in ("hidden_features", "num_carts", "num_steps"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.discount < 1:
            raise InvalidRequest(f"discount must be at least 0 and below 1, not {self.discount}")
        if not 0 <= self.trace <= 1:
            raise InvalidRequest(f"trace must be from 0 to 1, not {self.trace}")

    @property
    def largest_value(self) -> float:
        """What never failing is worth."""
        return 1 / (1 - self.discount)


def build(config: Config) -> Task:
    return Balance(config)


@dataclass(frozen=True)
class Outputs:
    logits_BA: Tensor
    values_B: Tensor
    lengths_B: Tensor | None
    """Of episodes that begin in the states of the batch; in an evaluation."""


class Balance(Task):
    """Policy gradient with a learned baseline (Williams, 1992; Sutton and Barto, 2018, chapter 13).

    An epoch takes several steps on what one policy played. So each row is weighted by how much
    likelier its action has become since: the gradient is one of the policy as it is now.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(
            ActorCritic(
                num_states=cart_pole.NUM_STATES,
                num_actions=cart_pole.NUM_ACTIONS,
                hidden_features=config.hidden_features,
                largest_value=config.largest_value,
            )
        )
        self._config = config
        self._played_for = (-1, -1)

    # Playing.

    def before_epoch(self, epoch: int, data: Data) -> None:
        self._played_for = (data.seed, epoch)
        data.renew(lambda: self.play(data.seed, epoch))

    def play(self, seed: int, epoch: int) -> dict[str, Any]:
        """The rows of an epoch. A function of the weights, the seed and the epoch."""
        config, model = self._config, self.modules["model"]
        device = next(model.parameters()).device
        played = episodes.play(model, config.num_carts, config.num_steps, (seed, epoch), device)
        return episodes.columns(
            played, discount=config.discount, trace=config.trace, seed=seed, epoch=epoch
        )

    def prepare(self, batch: Batch) -> Batch:
        is_ours_B = (batch["seed"] == self._played_for[0]) & (batch["epoch"] == self._played_for[1])
        is_test_B = batch["epoch"] < 0
        if not (is_ours_B | is_test_B | (batch["id"] < 0)).all():
            raise InvalidRequest(
                "another run appended to the dataset of this one: what an agent trains on must be "
                "its own. Give each run a dataset by data.dataset, prepared under that name"
            )
        return batch

    # Learning.

    def forward(self, modules: Mapping[str, nn.Module], batch: Batch) -> Outputs:
        (model,) = modules.values()
        logits_BA, values_B = model(batch["observation"])
        if model.training:
            return Outputs(logits_BA, values_B, None)
        # By the module itself: no rank waits for another one in the middle of an episode.
        lengths_B = episodes.lengths(self.modules["model"], batch["observation"])
        return Outputs(logits_BA, values_B, lengths_B)

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """In an evaluation: the share of the longest episode that was missed."""
        if outputs.lengths_B is not None:
            return 1 - outputs.lengths_B / episodes.LONGEST
        config = self._config
        shares_BA = F.log_softmax(outputs.logits_BA.float(), dim=1)
        chosen_B = shares_BA.gather(1, batch["action"][:, None])[:, 0]
        ratio_B = (chosen_B - batch["log_probability"]).exp()
        errors_B = (outputs.values_B.float() - batch["value"]) / config.largest_value
        entropy_B = -(shares_BA.exp() * shares_BA).sum(dim=1)
        return (
            -ratio_B * batch["advantage"]
            + config.value_share * errors_B**2
            - config.entropy_share * entropy_B
        )

    def evaluate(self, outputs: Outputs, batch: Batch) -> Mapping[str, Tensor]:
        assert outputs.lengths_B is not None, "an evaluation"
        weight_B = batch["weight"]
        return {
            "steps": (outputs.lengths_B * weight_B).sum(),
            "whole": ((outputs.lengths_B == episodes.LONGEST) * weight_B).sum(),
        }

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        number = sums["weight"]
        return {"length": sums["steps"] / number, "whole_episodes": sums["whole"] / number}
