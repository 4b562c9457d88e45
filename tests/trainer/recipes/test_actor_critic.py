"""Recipe actor_critic: the physics, what actions are worth, and data that grow as it learns."""

import math

import numpy as np
import pytest
import torch

from forebay_trainer import records
from forebay_trainer.__main__ import main
from forebay_trainer.environments import cart_pole, episodes
from forebay_trainer.modules import imported
from forebay_trainer.recipe import RECIPES, load
from forebay_wire.errors import InvalidRequest

pytestmark = pytest.mark.timeout(200)

CPU = torch.device("cpu")
preparation = imported(RECIPES / "actor_critic" / "prepare.py")


def states(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def worth_0(logits):
    """A policy of fixed logits that expects nothing."""
    row = torch.tensor([logits])
    return lambda seen: (row.expand(len(seen), -1), torch.zeros(len(seen)))


# The physics.


def test_a_push_at_rest_accelerates_the_cart_and_throws_the_pole_back():
    found = cart_pole.moved(states([0, 0, 0, 0]), torch.tensor([1]))
    # The angle's rate of change: (-10 / 1.1) / (0.5 · (4/3 - 0.1 / 1.1)) = -14.6341 rad/s²,
    # the cart's (10 + 0.05 · 14.6341) / 1.1 = 9.7561 m/s²; of both a step of 0.02 s.
    assert found[0].tolist() == pytest.approx([0, 0.195122, 0, -0.292683], abs=1e-6)


def test_speeds_move_what_they_are_speeds_of_and_the_pole_falls_by_its_weight():
    speed, angle, turning = 0.5, 0.1, -0.2
    found = cart_pole.moved(states([1, speed, angle, turning]), torch.tensor([0]))
    push = (10 - 0.05 * turning**2 * math.sin(angle) + 0.0005) / 1.1
    rate = 9.8 * math.sin(angle) + math.cos(angle) * push - 0.000002 * turning / 0.05
    rate /= 0.5 * (4 / 3 - 0.1 * math.cos(angle) ** 2 / 1.1)
    thrown = 0.05 * (turning**2 * math.sin(angle) - rate * math.cos(angle))
    cart = (-10 + thrown - 0.0005) / 1.1
    expected = [1 + 0.02 * speed, speed + 0.02 * cart]
    expected += [angle + 0.02 * turning, turning + 0.02 * rate]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_left_and_right_mirror_each_other():
    state = torch.randn(20, 4, dtype=torch.float64)
    left, right = torch.zeros(20), torch.ones(20)
    mirrored = cart_pole.moved(-state, right)
    assert torch.allclose(cart_pole.moved(state, left), -mirrored, rtol=1e-12)


def test_it_fails_past_12_degrees_or_2_4_metres():
    edge = math.radians(12)
    rows = [[0, 9, edge - 1e-9, 9], [0, 0, edge + 1e-9, 0], [-2.41, 0, 0, 0], [2.39, 0, -edge, 0]]
    assert cart_pole.has_failed(states(*rows)).tolist() == [False, True, True, False]


# Episodes.


def test_pushing_one_way_alone_ends_as_counted_by_hand():
    starts = states([0, 0, 0, 0], [0.04, -0.03, 0.02, 0.05])
    expected = []
    for start in starts:
        state, count = start[None], 0
        while not cart_pole.has_failed(state):
            state, count = cart_pole.moved(state, torch.tensor([1])), count + 1
        expected.append(count)
    assert episodes.lengths(worth_0([0.0, 1.0]), starts).tolist() == expected
    assert all(5 < count < 15 for count in expected)


def test_episodes_follow_one_another_and_are_a_function_of_their_words():
    played = episodes.play(worth_0([0.0, 0.0]), 5, 120, (3, 1), CPU)
    assert played.ends.any(dim=0).all()
    begins = torch.cat([torch.ones(1, 5, dtype=torch.bool), played.ends[:-1]])
    assert (played.observations[begins].abs() <= 0.05).all()
    assert len(torch.unique(played.observations[begins], dim=0)) == begins.sum()
    seen, actions = played.observations.double(), played.actions
    for cart in range(5):
        following = cart_pole.moved(seen[:, cart], actions[:, cart])
        goes_on = ~played.ends[:-1, cart]
        assert torch.allclose(following[:-1][goes_on], seen[1:, cart][goes_on], atol=1e-5)
        assert (cart_pole.has_failed(following) == played.ends[:, cart]).all()
    assert played.actions.float().mean() == pytest.approx(0.5, abs=0.1)
    assert (played.log_probabilities == math.log(0.5)).all()
    again = episodes.play(worth_0([0.0, 0.0]), 5, 120, (3, 1), CPU)
    assert again.observations.equal(played.observations)
    other = episodes.play(worth_0([0.0, 0.0]), 5, 120, (3, 2), CPU)
    assert not other.actions.equal(played.actions)


def test_actions_are_as_likely_as_the_policy_says():
    played = episodes.play(worth_0([0.0, math.log(3)]), 50, 60, (0,), CPU)
    assert played.actions.float().mean() == pytest.approx(0.75, abs=0.03)
    right = played.actions == 1
    assert played.log_probabilities[right].tolist() == [pytest.approx(math.log(0.75))] * right.sum()


@pytest.fixture
def played():
    """Two carts, six steps: the first one fails in step 2, the second one is broken off in 3."""
    ends = torch.zeros(6, 2, dtype=torch.bool)
    ends[2, 0] = ends[3, 1] = True
    values, following = torch.rand(6, 2), torch.rand(6, 2)
    following[2, 0] = 0.0
    going_on = ~ends[:-1]
    following[:-1][going_on] = values[1:][going_on]
    nothing = torch.zeros(6, 2)
    return episodes.Played(
        observations=torch.zeros(6, 2, 4),
        actions=nothing.long(),
        log_probabilities=nothing,
        values=values,
        next_values=following,
        ends=ends,
    )


def test_with_a_trace_of_1_actions_are_worth_their_rewards_minus_the_baseline(played):
    found = episodes.advantages(played, discount=0.9, trace=1.0)
    for cart, end in ((0, 2), (1, 3)):
        for first, last in ((0, end), (end + 1, 5)):
            worth = played.next_values[last, cart].item()
            for step in range(last, first - 1, -1):
                worth = 1 + 0.9 * worth
                expected = worth - played.values[step, cart].item()
                assert found[step, cart].item() == pytest.approx(expected, rel=1e-5)


def test_with_a_trace_of_0_they_are_worth_one_steps_surprise(played):
    found = episodes.advantages(played, discount=0.9, trace=0.0)
    assert torch.allclose(found, 1 + 0.9 * played.next_values - played.values)
    between = episodes.advantages(played, discount=0.9, trace=0.5)
    surprise = found
    assert between[4, 0] == pytest.approx(float(surprise[4, 0] + 0.45 * surprise[5, 0]))
    assert between[2, 0] == pytest.approx(float(surprise[2, 0]))


# The loss.


def test_what_another_run_played_is_refused():
    task = load("actor_critic").build({})
    rows = episodes.columns(
        episodes.play(worth_0([0.0, 0.0]), 1, 4, (0,), CPU), discount=0.9, trace=1, seed=1, epoch=2
    )
    batch = {name: torch.from_numpy(rows[name].copy()) for name in ("seed", "epoch")}
    batch["id"] = torch.arange(4)
    with pytest.raises(InvalidRequest, match=r"another run appended.*data\.dataset"):
        task.prepare(batch)


def test_the_first_gradient_is_that_of_the_policy_and_later_ones_are_reweighted():
    task = load("actor_critic", ["model.value_share=0"]).build({})
    model = task.modules["model"].train()
    batch = {
        "observation": torch.randn(6, 4),
        "action": torch.tensor([0, 1, 1, 0, 1, 0]),
        "advantage": torch.randn(6),
        "value": torch.zeros(6),
    }
    shares = model(batch["observation"])[0].log_softmax(dim=1)
    chosen = shares[torch.arange(6), batch["action"]]
    for old in (chosen.detach(), chosen.detach() - math.log(2)):
        batch["log_probability"] = old
        losses = task.losses(task.forward(task.modules, batch), batch)
        found = torch.autograd.grad(losses.mean(), list(model.actor.parameters()))
        ratio = (chosen.detach() - old).exp()
        wanted = -(ratio * batch["advantage"] * chosen).mean()
        expected = torch.autograd.grad(wanted, list(model.actor.parameters()), retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, expected, strict=True))


# Runs.

KEYS = ("model.num_carts=4", "model.num_steps=30", "data.global_batch_size=40")
KEYS += ("deterministic=true", "num_epochs=4", "optimizer.schedule=constant")
KEYS += ("data.shuffle=none",)  # a shuffled order is one of the version, which other data have not


@pytest.fixture
def prepared(daemon, capsys, tmp_path):
    """``prepared("a")``: the name of a dataset for a run."""

    def make(run):
        name = f"{tmp_path.name}-{run}"
        words = ["prepare.num_carts=4", "prepare.num_steps=30", "prepare.num_tests=7"]
        words += [f"address={daemon.data}", f"data.dataset={name}", "--num-processes", "1"]
        assert main(["prepare", "actor_critic", *words]) == 0, capsys.readouterr()
        return name

    return make


def steps_of(ranks):
    """Step to its epoch and rows, over all ranks."""
    found = {}
    for rank in records.read_folder(ranks.folder / "records"):
        for step in rank.steps:
            found.setdefault((step.step, step.epoch), set()).update(step.ids)
    return found


def test_each_epoch_trains_on_the_rows_that_were_played_for_it(launch, prepared, client):
    dataset = prepared("one")
    ranks = {}
    for number, name in ((1, dataset), (2, prepared("two"))):
        keys = (*KEYS, f"data.dataset={name}")
        ranks[number] = launch(*keys, recipe="actor_critic", num_ranks=number, run=f"on-{number}")
    for each in ranks.values():
        each.finish()
    used = {}
    for (_, epoch), ids in steps_of(ranks[2]).items():
        used.setdefault(epoch, set()).update(ids)
    first = 120 + 7
    assert used == {
        epoch: set(range(first + 120 * epoch, first + 120 * (epoch + 1))) for epoch in range(4)
    }
    rows = client.dataset(dataset).table()
    assert rows["epoch"].to_pylist() == [-1] * first + [e for e in range(4) for _ in range(120)]
    assert len(client.dataset(dataset, split="test")) == 7
    losses = [
        {step: found[0] for step, found in each.values("loss").items()} for each in ranks.values()
    ]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)
    lengths = [each.values("test_length", "evaluation") for each in ranks.values()]
    assert lengths[0].keys() == {3, 6, 9, 12}
    assert lengths[1] == lengths[0]


@pytest.mark.parametrize(
    ("every_steps", "killed_at", "resumed_from"),
    [(1, 5, (4, 5)), (5, 8, (5,))],  # within an epoch; after one that no generation knows of
)
def test_a_run_that_was_killed_goes_on_on_the_same_rows(
    launch, prepared, client, every_steps, killed_at, resumed_from
):
    found, names = {}, {run: prepared(run) for run in ("alone", "killed")}
    keys = (
        *KEYS,
        f"checkpoint.every_steps={every_steps}",
        "data.num_threads=0",
        "checkpoint.keep_last=2",
    )
    alone = launch(*keys, f"data.dataset={names['alone']}", recipe="actor_critic", run="alone")
    alone.finish()
    keys += (f"data.dataset={names['killed']}",)
    slow = launch(*keys, "min_step_seconds=0.1", recipe="actor_critic", run="killed")
    with slow:
        slow.wait_step(killed_at)  # of 12, three an epoch
    killed = launch(*keys, recipe="actor_critic", run="killed")
    said = killed.finish()
    assert any(f"from step {step}" in said for step in resumed_from)
    for name, ranks in (("alone", alone), ("killed", killed)):
        found[name] = {step: set(each) for step, each in ranks.values("loss").items()}
    assert len(found["alone"]) == 12
    assert found["killed"] == found["alone"]
    tables = [client.dataset(name).table() for name in names.values()]
    assert len(client.dataset(names["killed"])) == 127 + 4 * 120  # no epoch was played again
    assert tables[0].equals(tables[1])


def test_the_first_rows_are_played_at_random_and_the_tests_are_first_states():
    (train, tests) = preparation.prepare(preparation.Config(num_steps=40)).read()
    assert train.num_rows == 16 * 40
    assert np.mean(train["action"].to_pylist()) == pytest.approx(0.5, abs=0.1)
    assert set(train["split"].to_pylist()) == {"train"}
    starts = tests["observation"].combine_chunks().to_numpy_ndarray()
    assert starts.shape == (100, 4)
    assert np.abs(starts).max() <= 0.05
