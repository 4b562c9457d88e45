"""Dropout by sample, the loss scale, averages, early stop, generators: each for itself."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from forebay_trainer.averaging import Average
from forebay_trainer.dropout import Draws, SampleDropout, replace_dropout, uniform
from forebay_trainer.evaluation import EvaluationConfig, Progress
from forebay_trainer.optim import Optimization, OptimizerConfig
from forebay_trainer.parallel import ParallelConfig
from forebay_trainer.precision import FIRST_SCALE, GROWTH_STEPS, LossScaler
from forebay_trainer.random_state import RandomState
from forebay_wire.errors import InvalidRequest

# Dropout.


def test_draws_are_uniform_and_differ_by_every_word():
    ids = torch.arange(200)
    draws = uniform((1, 2, 3), ids, 500)
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.005)
    counts = torch.histc(draws, bins=20, min=0, max=1) / draws.numel()
    assert counts.tolist() == pytest.approx([0.05] * 20, abs=0.002)
    for words in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert (uniform(words, ids, 500) == draws).float().mean() < 0.001
    flat = draws - 0.5
    assert (flat[:, 1:] * flat[:, :-1]).mean().abs() < 0.001  # neighbours in a sample
    assert (flat[1:] * flat[:-1]).mean().abs() < 0.001  # neighbouring samples


def test_dropout_of_a_sample_is_the_same_in_every_batch():
    draws = Draws(seed=5)
    layer = SampleDropout(0.3, 0, draws)
    x = torch.randn(10, 4, 6)
    draws.at(7, torch.arange(10))
    whole = layer(x)
    for rows in ([3], [9, 0, 4]):
        draws.at(7, torch.tensor(rows))
        assert layer(x[rows]).equal(whole[rows])
    draws.at(8, torch.arange(10))
    assert not layer(x).equal(whole)
    assert (whole == 0).float().mean() == pytest.approx(0.3, abs=0.1)
    assert whole[whole != 0].equal((x / (1 - 0.3))[whole != 0])
    layer.eval()
    assert layer(x) is x


def test_layers_are_replaced_and_numbered_and_the_rest_is_refused():
    draws = Draws(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    assert replace_dropout(module, draws) == 2
    draws.at(0, torch.arange(400))
    ones = torch.ones(400, 2)
    assert not module[0](ones).equal(module[1][1](ones))
    with pytest.raises(InvalidRequest, match=r"deterministic: 0 \(LSTM\) draws"):
        replace_dropout(nn.Sequential(nn.LSTM(2, 2, num_layers=2, dropout=0.1)), draws)
    with pytest.raises(InvalidRequest, match=r"Dropout2d"):
        replace_dropout(nn.Sequential(nn.Dropout2d(0.1)), draws)


def test_what_has_no_row_for_each_sample_is_refused():
    draws = Draws(0)
    draws.at(0, torch.arange(3))
    with pytest.raises(InvalidRequest, match="got 5 rows for 3 samples"):
        SampleDropout(0.5, 0, draws)(torch.ones(5, 2))


# The loss scale.


def test_the_scale_halves_on_overflow_and_grows_after_good_steps():
    scaler = LossScaler(is_used=True)
    assert not scaler.accepts(math.inf)
    assert not scaler.accepts(math.nan)
    assert scaler.scale == FIRST_SCALE / 4
    assert all(scaler.accepts(1.0) for _ in range(GROWTH_STEPS))
    assert scaler.scale == FIRST_SCALE / 2
    again = LossScaler(is_used=True)
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == scaler.state_dict()


def test_without_fp16_nothing_is_scaled_or_skipped():
    scaler = LossScaler(is_used=False)
    assert scaler.scale == 1.0
    assert scaler.accepts(math.inf)


def optimization(config, *, scaler=None, average=None):
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    found = Optimization(
        config,
        {"model": config.build(model.parameters())},
        num_steps=100,
        parallel=ParallelConfig(backend="gloo").build(),
        scaler=scaler or LossScaler(is_used=False),
        average=average or Average(0.5, {}),
    )
    return found, model.weight


SGD = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


def test_gradients_are_unscaled_and_clipped_before_the_step():
    scaler = LossScaler(is_used=True)
    config = OptimizerConfig(learning_rate=1.0, max_norm=0.5, **SGD)
    found, weight = optimization(config, scaler=scaler)
    weight.grad = torch.tensor([[3.0, 0.0, 4.0]]) * scaler.scale
    assert found.update("model", 0) == 5.0
    assert weight.tolist() == [pytest.approx([0.7, 1.0, 0.6])]
    assert weight.grad is None
    weight.grad = torch.tensor([[0.3, 0.0, 0.0]]) * scaler.scale  # not above the norm
    found.update("model", 1)
    assert weight.tolist() == [pytest.approx([0.4, 1.0, 0.6])]


def test_a_step_that_overflowed_changes_nothing():
    found, weight = optimization(
        OptimizerConfig(learning_rate=1.0, **SGD), scaler=LossScaler(is_used=True)
    )
    weight.grad = torch.tensor([[math.inf, 0.0, 0.0]])
    assert not math.isfinite(found.update("model", 0))
    assert weight.tolist() == [[1.0, 1.0, 1.0]]
    assert found.scaler.scale == FIRST_SCALE / 2


def test_the_rate_of_a_step_is_that_of_the_schedule():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=1, **SGD)
    found, weight = optimization(config)
    for step, expected in ((0, 0.5), (1, -0.5)):
        weight.grad = torch.ones(1, 3)
        assert found.learning_rate(step) == (0.5, 1.0)[step]
        found.update("model", step)
        assert weight[0, 0].item() == expected


# Averages.


def test_the_average_is_used_in_place_and_the_weights_come_back():
    weight = nn.Parameter(torch.zeros(2))
    average = Average(0.5, {"w": weight})
    for value in (1.0, 2.0, 3.0):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
    expected = 0.0
    for number, value in enumerate((1.0, 2.0, 3.0)):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = expected * decay + value * (1 - decay)
    with average.in_place():
        assert weight.tolist() == pytest.approx([expected] * 2)
    assert weight.tolist() == [3.0, 3.0]
    again = Average(0.5, {"w": nn.Parameter(torch.zeros(2))})
    again.load_state_dict(average.state_dict())
    assert again.state_dict()["num_updates"] == 3
    assert again.state_dict()["weights"]["w"].tolist() == pytest.approx([expected] * 2)


# Early stop.


def test_patience_counts_evaluations_without_a_better_one():
    progress = Progress(EvaluationConfig(metric="test_accuracy", mode="max", patience=2))
    stuck = []
    for step, value in enumerate([0.5, 0.6, 0.6, 0.7, math.nan, 0.6]):
        progress.note(step, {"test_accuracy": value})
        stuck.append(progress.is_stuck)
    assert stuck == [False] * 5 + [True]
    assert progress.best == (0.7, 3)
    again = Progress(EvaluationConfig(metric="test_accuracy", mode="max", patience=2))
    again.load_state_dict(progress.state_dict())
    assert (again.best, again.is_stuck) == ((0.7, 3), True)


def test_smaller_is_better_for_a_loss_and_a_metric_that_is_not_there_is_named():
    progress = Progress(EvaluationConfig())
    progress.note(1, {"test_loss": 2.0})
    progress.note(2, {"test_loss": 3.0})
    assert progress.best == (2.0, 1)
    with pytest.raises(InvalidRequest, match=r"evaluation\.metric=test_loss: the evaluation has x"):
        progress.note(3, {"x": 1.0})


def test_evaluation_is_due_at_ends_or_every_so_many_steps():
    assert [Progress(EvaluationConfig()).is_due(3, is_end=end) for end in (True, False)] == [1, 0]
    every = Progress(EvaluationConfig(every_steps=4))
    assert [step for step in range(1, 10) if every.is_due(step, is_end=True)] == [4, 8]


# Generators.


def draw():
    return (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())


def test_generators_go_on_where_they_were_saved():
    state = RandomState(None, torch.device("cpu"))
    state.seed(1, 2)
    first = draw()
    saved = state.state_dict()
    expected = draw()
    assert expected != first
    other = RandomState(None, torch.device("cpu"))
    other.seed(7)
    other.load_state_dict(saved)
    assert not other.is_fresh
    assert draw() == expected
    other.seed(1, 2)
    assert draw() == first


def test_generators_of_another_number_of_ranks_are_not_taken():
    state = RandomState(None, torch.device("cpu"))
    saved = {name: rows.repeat(2, 1) for name, rows in state.state_dict().items()}
    before = torch.get_rng_state()
    state.load_state_dict(saved)
    assert state.is_fresh
    assert torch.get_rng_state().equal(before)
