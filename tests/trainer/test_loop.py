"""The loss and its gradients are those of one process, however the batch is cut over the ranks."""

import pytest
import torch

from forebay_trainer.data import cut, real_ids, whole
from forebay_trainer.optim import OptimizerConfig
from forebay_trainer.recipe import load
from forebay_trainer.task import share_of_mean


@pytest.fixture
def task():
    overrides = ["model.dropout=0", "model.channels=[4]", "model.hidden_features=8"]
    torch.manual_seed(0)
    return load("mnist_cnn", [*overrides, "model.mean=0.5", "model.std=0.5"]).build({})


def batch_of(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (num_samples, 28, 28), generator=generator).byte(),
        "label": torch.randint(0, 10, (num_samples,), generator=generator),
        "_ids": torch.arange(num_samples) + 100,
    }


def part(batch, start, stop, num_padding=0):
    rows = {name: values[start:stop] for name, values in batch.items()}
    if num_padding:
        padding = {name: values[:num_padding] for name, values in batch.items()}
        rows = {name: torch.cat([values, padding[name]]) for name, values in rows.items()}
        rows["_mask"] = torch.arange(stop - start + num_padding) < stop - start
    return whole(rows)


def gradients(task, parts, num_samples):
    """The mean over the ranks of what each one computes, as DDP leaves it; and the loss."""
    model, total_loss = task.modules["model"], 0.0
    model.zero_grad()
    for rows in map(task.prepare, parts):
        losses = task.losses(model(*task.inputs(rows)), rows)
        loss = share_of_mean(losses, task.weights(rows), num_samples)
        loss.backward()
        total_loss += loss.item()
    return [each.grad.clone() for each in model.parameters()], total_loss


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 3, 0), (3, 5, 0)],
        [(0, 5, 0), (5, 5, 0)],  # an empty part
        [(0, 2, 1), (2, 4, 1), (4, 5, 2)],  # padding
        [(0, 1, 0), (1, 1, 0), (1, 5, 0)],
    ],
)
def test_ranks_together_compute_the_gradient_of_the_whole_batch(task, cuts):
    batch = batch_of(5)
    expected, loss = gradients(task, [whole(batch)], 5)
    found, cut_loss = gradients(task, [part(batch, *each) for each in cuts], 5)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 8])
def test_micro_batches_together_compute_the_gradient_of_the_batch(task, num_parts):
    batch = whole(batch_of(5))
    parts = cut(batch, num_parts)
    assert len(parts) == num_parts
    assert sum((real_ids(each) for each in parts), ()) == real_ids(batch)
    expected, loss = gradients(task, [batch], 5)
    found, cut_loss = gradients(task, parts, 5)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_an_empty_part_becomes_one_row_without_weight_and_without_id(task):
    rows = task.prepare(part(batch_of(4), 2, 2))
    assert rows["images"].shape == (1, 28, 28)
    assert rows["weight"].tolist() == [0]
    assert real_ids(rows) == ()


def test_padding_has_no_weight_and_no_id():
    rows = part(batch_of(4), 0, 3, num_padding=1)
    assert rows["weight"].tolist() == [1, 1, 1, 0]
    assert real_ids(rows) == (100, 101, 102)


def test_pixels_are_normalised(task):
    batch = batch_of(2)
    batch["image"][0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    images = task.prepare(whole(batch))["images"]
    assert images.dtype == torch.float32
    assert images[0, 0, :2].tolist() == [-1.0, 1.0]


def test_the_learning_rate_warms_up_and_ends_near_its_final_share():
    config = OptimizerConfig(warmup_steps=3, schedule="cosine")
    shares = [config.share(step, 20) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[3:] == sorted(shares[3:], reverse=True)
    assert 0 < shares[-1] < 0.02
    assert OptimizerConfig(schedule="constant").share(7, 20) == 1.0
    linear = OptimizerConfig(schedule="linear", warmup_steps=2, final_share=0.5)
    assert [linear.share(step, 10) for step in (2, 6, 10, 12)] == [1.0, 0.75, 0.5, 0.5]
    roots = OptimizerConfig(schedule="inverse_sqrt", warmup_steps=4)
    assert [roots.share(step, 100) for step in (4, 16, 64)] == [1.0, 0.5, 0.25]
