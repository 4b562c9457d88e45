"""Two small networks: one chooses actions, the other one says what a state is worth. Shape letters:
N states, S numbers of a state, A actions."""

from __future__ import annotations

from torch import Tensor, nn


class ActorCritic(nn.Module):
    """The first policy chooses evenly, and expects nothing of any state: the last layers are 0."""

    def __init__(
        self, *, num_states: int, num_actions: int, hidden_features: int, largest_value: float
    ) -> None:
        """*largest_value*: about how much a state may be worth; the critic's output is scaled."""
        super().__init__()
        self.actor = network(num_states, hidden_features, num_actions)
        self.critic = network(num_states, hidden_features, 1)
        self._largest_value = largest_value

    def forward(self, observations_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the actions (N, A), and values (N,)."""
        values_N = self.critic(observations_NS)[:, 0] * self._largest_value
        return self.actor(observations_NS), values_N


def network(num_inputs: int, hidden_features: int, num_outputs: int) -> nn.Sequential:
    last = nn.Linear(hidden_features, num_outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(num_inputs, hidden_features),
        nn.Tanh(),
        nn.Linear(hidden_features, hidden_features),
        nn.Tanh(),
        last,
    )
