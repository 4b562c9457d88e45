"""The loss and its gradients are those of one process, however the batch is cut over the ranks."""

import pytest
import torch
from torch.nn import functional as F

from forebay_trainer.data import Data, DataConfig
from forebay_trainer.loop import share_of_mean
from forebay_trainer.models import ModelConfig
from forebay_trainer.optim import OptimizerConfig


@pytest.fixture
def data():
    return Data(DataConfig(mean=0.5, std=0.5, global_batch_size=4), None, None, num_samples=10)


def batch_of(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (num_samples, 28, 28), generator=generator).byte(),
        "label": torch.randint(0, 10, (num_samples,), generator=generator),
        "_ids": torch.arange(num_samples) + 100,
    }


def part(batch, start, stop, num_padding=0):
    cut = {name: values[start:stop] for name, values in batch.items()}
    if num_padding:
        padding = {name: values[:num_padding] for name, values in batch.items()}
        cut = {name: torch.cat([values, padding[name]]) for name, values in cut.items()}
        cut["_mask"] = torch.arange(stop - start + num_padding) < stop - start
    return cut


def gradients(model, parts, num_samples):
    """The mean over the ranks of what each one computes, as DDP leaves it; and the loss."""
    totals, total_loss = None, 0.0
    for examples in parts:
        model.zero_grad()
        losses = F.cross_entropy(model(examples.images), examples.labels, reduction="none")
        loss = share_of_mean(losses, examples.weights, num_samples)
        (loss * len(parts)).backward()
        found = [each.grad / len(parts) for each in model.parameters()]
        totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
        total_loss += loss.item()
    return totals, total_loss


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 3, 0), (3, 5, 0)],
        [(0, 5, 0), (5, 5, 0)],  # an empty part
        [(0, 2, 1), (2, 4, 1), (4, 5, 2)],  # padding
        [(0, 1, 0), (1, 1, 0), (1, 5, 0)],
    ],
)
def test_ranks_together_compute_the_gradient_of_the_whole_batch(data, cuts):
    torch.manual_seed(0)
    model = ModelConfig(dropout=0.0, channels=(4,), hidden_features=8).build()
    batch = batch_of(5)
    whole, loss = gradients(model, [data.prepare(batch)], 5)
    cut, cut_loss = gradients(model, [data.prepare(part(batch, *each)) for each in cuts], 5)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    for expected, found in zip(whole, cut, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_empty_part_becomes_one_row_without_weight_and_without_id(data):
    examples = data.prepare(part(batch_of(4), 2, 2))
    assert examples.images.shape == (1, 28, 28)
    assert examples.num_samples == 0
    assert examples.ids == []


def test_padding_has_no_weight_and_no_id(data):
    examples = data.prepare(part(batch_of(4), 0, 3, num_padding=1))
    assert examples.weights.tolist() == [1, 1, 1, 0]
    assert examples.num_samples == 3
    assert examples.ids == [100, 101, 102]


def test_pixels_are_normalised(data):
    batch = batch_of(2)
    batch["image"][0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    images = data.prepare(batch).images
    assert images.dtype == torch.float32
    assert images[0, 0, :2].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("last_batch", "steps"), [("keep", 3), ("pad", 3), ("drop", 2)])
def test_the_short_last_batch_counts_as_the_loader_counts_it(last_batch, steps):
    config = DataConfig(global_batch_size=4, last_batch=last_batch)
    assert Data(config, None, None, num_samples=10).steps_per_epoch == steps


def test_the_learning_rate_warms_up_and_ends_near_zero():
    config = OptimizerConfig(warmup_steps=3, schedule="cosine")
    shares = [config.share(step, 20) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[3:] == sorted(shares[3:], reverse=True)
    assert 0 < shares[-1] < 0.02
    assert OptimizerConfig(schedule="constant").share(7, 20) == 1.0
