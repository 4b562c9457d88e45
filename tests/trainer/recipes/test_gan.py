"""Recipe mnist_gan: two modules, two optimizers, a step of its own, on any ranks, after a kill."""

import numpy as np
import pyarrow as pa
import pytest
import torch

import forebay
from forebay_trainer import records
from forebay_trainer.checkpoint import weights_of
from forebay_trainer.modules import imported
from forebay_trainer.random_state import RandomState
from forebay_trainer.recipe import RECIPES, load
from forebay_wire.errors import InvalidRequest, NotFound

pytestmark = pytest.mark.timeout(200)

recipe = imported(RECIPES / "mnist_gan" / "recipe.py")


@pytest.fixture(scope="module")
def digits(daemon):
    """A dataset of 50 pictures, which its tests have rows 40 to 49 of."""
    chance = np.random.default_rng(0)
    images = (chance.random((50, 28, 28)) > 0.8).astype(np.uint8) * 255
    with forebay.connect(daemon.data) as client:
        with client.create_dataset("few-digits") as writer:
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
            writer.write_table(pa.table({"image": column}))
        dataset = client.dataset("few-digits")
        dataset.define_selection("train", rows=range(40))
        dataset.define_selection("test", rows=range(40, 50))
    return "few-digits"


# The Fréchet distance.


def test_the_distance_of_normal_distributions_is_the_known_one():
    means = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 2.0]]).double()
    variances = torch.tensor([[4.0, 1.0, 0.25], [1.0, 9.0, 0.25]]).double()
    turned, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    first, second = (
        (turned @ mean, turned @ torch.diag(variance) @ turned.T)
        for mean, variance in zip(means, variances, strict=True)
    )
    # Along the axes: the squared differences of means and of deviations.
    expected = (1 + 4 + 2.25) + (1 + 4 + 0)
    assert recipe.frechet_distance(first, second) == pytest.approx(expected)
    assert recipe.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_the_distance_is_known_of_what_hardly_spreads():
    flat = (torch.zeros(4).double(), torch.zeros(4, 4).double())
    line = (torch.ones(4).double(), torch.ones(4, 4).double())
    assert recipe.frechet_distance(flat, line) == pytest.approx(4 + 4)


def test_moments_come_from_sums_and_features_from_means_of_pixels():
    images = torch.rand(30, 1, 28, 28) * 2 - 1
    features = recipe.features(images)
    assert features.shape == (30, 49)
    assert features[0, 8] == pytest.approx(float((images[0, 0, 4:8, 4:8].mean() + 1) / 2))
    mean, covariance = recipe.moments(features.sum(0), features.T @ features, 30)
    assert torch.allclose(mean, features.mean(0))
    assert torch.allclose(covariance, features.T.cov(correction=0))


# Noise.


def test_noise_is_of_the_sample_the_step_and_the_turn():
    task = load("mnist_gan").build({})
    ids = torch.tensor([3, 17, 4])
    noise = task.noise({"id": ids}, 0, 5, recipe.FOR_GENERATOR)
    assert noise.shape == (3, 64)
    assert -1 <= noise.min() < -0.9 < 0.9 < noise.max() < 1
    assert task.noise({"id": ids[[1]]}, 0, 5, recipe.FOR_GENERATOR)[0].equal(noise[1])
    for words in ((1, 5, recipe.FOR_GENERATOR), (0, 6, recipe.FOR_GENERATOR), (0, 5, 0)):
        assert not task.noise({"id": ids}, *words).equal(noise)


def test_channels_that_groups_do_not_divide_are_refused():
    with pytest.raises(InvalidRequest, match=r"model\.channels must be a multiple of 8, not 12"):
        load("mnist_gan", ["model.channels=12"])


# Runs.

KEYS = ("model.channels=8", "data.global_batch_size=16", "deterministic=true", "num_epochs=8")


def series(ranks):
    names = ("loss", "discriminator_loss", "generator_loss")
    return {name: ranks.values(name) for name in names}


def test_parts_and_ranks_change_nothing(launch, digits):
    keys = (*KEYS, f"data.dataset={digits}", "max_steps=8")
    ways = {"one": ((), 1), "two": ((), 2), "parts": (("data.micro_batch_size=5",), 1)}
    started = {
        name: launch(*keys, *more, recipe="mnist_gan", num_ranks=num_ranks, run=name)
        for name, (more, num_ranks) in ways.items()
    }
    found = {}
    for name, ranks in started.items():
        ranks.finish()
        quality = ranks.values("test_frechet_distance", "evaluation")
        found[name] = [*series(ranks).values(), quality]
    assert len(found["one"][0]) == 8
    for name in ("two", "parts"):
        for alone, other in zip(found["one"], found[name], strict=True):
            assert {step: each[0] for step, each in other.items()} == pytest.approx(
                {step: each[0] for step, each in alone.items()}, rel=2e-3
            )


def test_a_run_that_was_killed_goes_on_bit_for_bit(launch, daemon, digits):
    keys = (*KEYS, f"data.dataset={digits}", "max_steps=14", "checkpoint.every_steps=3")
    keys += ("data.num_threads=0", "checkpoint.keep_last=3")
    alone = launch(*keys, recipe="mnist_gan", num_ranks=2, run="alone")
    alone.finish()
    with launch(*keys, "min_step_seconds=0.05", recipe="mnist_gan", num_ranks=2) as killed:
        killed.wait_step(7)
    killed = launch(*keys, recipe="mnist_gan", num_ranks=2)
    assert "from step" in killed.finish()
    for name, values in series(alone).items():
        found = series(killed)[name]
        assert {step: set(each) for step, each in found.items()} == {
            step: set(each) for step, each in values.items()
        }, name
    runs = [each.output().split("run ", 1)[1].split(",", 1)[0] for each in (alone, killed)]
    for module in ("generator", "discriminator"):
        first, second = (weights_of(str(daemon.data), run, module) for run in runs)
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)
    with pytest.raises(NotFound, match="no module 'judge'"):
        weights_of(str(daemon.data), runs[0], "judge")


def test_a_step_is_the_game_as_it_is_written(launch, client, digits):
    keys = ("model.channels=8", "model.dropout=0", f"data.dataset={digits}", "average.decay=none")
    keys += ("data.global_batch_size=16", "optimizer.schedule=constant", "max_steps=3")
    ranks = launch(*keys, recipe="mnist_gan")
    ranks.finish()
    RandomState(None, torch.device("cpu")).seed(0)  # as a run of seed 0 begins
    task = load("mnist_gan", list(keys)).build({})
    judge, draw = task.modules["discriminator"], task.modules["generator"]
    optimizers = [
        torch.optim.AdamW(each.parameters(), lr=5e-4, betas=(0.5, 0.999), weight_decay=0)
        for each in (judge, draw)
    ]
    (record,) = records.read_folder(ranks.folder / "records")
    log, images = torch.nn.functional.logsigmoid, client.dataset(digits)
    for step, found in enumerate(record.steps):
        pixels = torch.from_numpy(images.read(np.array(found.ids), ["image"])["image"])
        batch = task.prepare({"id": torch.tensor(found.ids), "image": pixels})
        drawn = draw(task.noise(batch, 0, step, recipe.FOR_DISCRIMINATOR)).detach()
        of_judge = -(log(judge(batch["real"])) + log(-judge(drawn))).mean()
        optimizers[0].zero_grad()
        of_judge.backward()
        optimizers[0].step()
        of_drawer = -log(judge(draw(task.noise(batch, 0, step, recipe.FOR_GENERATOR)))).mean()
        optimizers[1].zero_grad()
        of_drawer.backward()
        optimizers[1].step()
        expected = {"discriminator_loss": of_judge.item(), "generator_loss": of_drawer.item()}
        assert {name: ranks.values(name)[step + 1] for name in expected} == {
            name: [pytest.approx(value, rel=1e-4)] for name, value in expected.items()
        }
