"""A run that is killed, resized and resumed computes what one does that was left alone."""

import random

import pytest

import forebay.checkpoint
from forebay_trainer import records
from forebay_trainer.demo.proof import prove

pytestmark = pytest.mark.timeout(200)

MESHES = {
    "ddp": ("deterministic=true",),
    "fsdp": ("parallel.num_shards=0",),
}


def run_of(ranks):
    """The name of a run, from what its ranks say."""
    return ranks.output().split("run ", 1)[1].split(",", 1)[0]


@pytest.mark.parametrize(
    ("mesh", "num_ranks", "num_kills"),
    [
        ("ddp", 2, 1),
        ("fsdp", 2, 1),
        pytest.param("ddp", 2, 3, marks=pytest.mark.slow),
        pytest.param("ddp", 4, 3, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, 3, marks=pytest.mark.slow),
        pytest.param("fsdp", 4, 3, marks=pytest.mark.slow),
    ],
)
def test_losses_after_kills_are_equal_bit_for_bit(launch, client, mesh, num_ranks, num_kills):
    keys = (*MESHES[mesh], "checkpoint.every_steps=4", "average.decay=0.9", "data.num_threads=0")
    num_steps = 12 + 12 * num_kills
    keys += (f"max_steps={num_steps}", "data.micro_batch_size=3")
    alone = launch(*keys, num_ranks=num_ranks, run="alone")
    alone.finish()
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for number in range(num_kills):
        step = chance.randrange(5 + 12 * number, 17 + 12 * number)
        with launch(*keys, "min_step_seconds=0.02", num_ranks=num_ranks, run="killed") as killed:
            killed.wait_step(step)
    killed = launch(*keys, num_ranks=num_ranks, run="killed")
    assert "from step" in killed.finish()
    expected = {step: set(found) for step, found in alone.values("loss").items()}
    assert len(expected) == num_steps
    assert {step: set(found) for step, found in killed.values("loss").items()} == expected, seed
    attempts = {event["attempt"] for event in killed.events()}
    assert len(attempts) == num_kills + 1
    same_state(client, run_of(alone), run_of(killed))


def same_state(client, *runs):
    """Weights, optimizer and averages of the last generations are equal, bit for bit."""
    opened = [forebay.checkpoint.open(client, run, "latest") for run in runs]
    try:
        names = [{name for name in each if not name.startswith("random.")} for each in opened]
        assert names[0] == names[1]
        assert any(name.startswith("average.") for name in names[0])
        for name in names[0]:
            first, second = (each[name].read() for each in opened)
            assert first.equal(second), name
    finally:
        for each in opened:
            each.close()


HOPS = [
    ("DDP 2", 2, ()),
    ("FSDP2 2", 2, ("parallel.num_shards=2",)),
    ("TP 2", 2, ("parallel.num_tensor=2",)),
    ("pipeline 2", 2, ("parallel.num_stages=2", "parallel.num_microbatches=2")),
    ("alone", 1, ()),
]


def test_a_run_goes_from_mesh_to_mesh(launch):
    keys = ("deterministic=true", "evaluation.at_start=true", "evaluation.every_steps=5")
    keys += ("optimizer.schedule=constant",)  # the others depend on the last step
    keys += ("model.dropout=0",)  # a pipeline does not know whose samples it drops
    whole = launch(*keys, f"max_steps={5 * len(HOPS)}", run="whole")
    whole.finish()
    for number, (name, num_ranks, mesh) in enumerate(HOPS):
        steps = f"max_steps={5 * (number + 1)}"
        hop = launch(*keys, *mesh, steps, num_ranks=num_ranks, run="hops")
        assert f"({name})" in hop.finish()
    evaluations = hop.values("test_loss", "evaluation")
    assert sorted(evaluations) == [0, 5, 10, 15, 20, 25]
    for step in (5, 10, 15, 20):  # at the end on one mesh, and at the start on the next one
        before, after = evaluations[step]
        assert after == pytest.approx(before, rel=1e-5)
    expected = {step: found[0] for step, found in whole.values("loss").items()}
    losses = {step: found[0] for step, found in hop.values("loss").items()}
    assert losses == pytest.approx(expected, rel=1e-4)


def test_other_ranks_and_micro_batches_take_the_same_samples(launch):
    keys = ("deterministic=true", "max_steps=14")  # the 7th batch of an epoch is a short one
    ways = {"one": ((), 1), "three": ((), 3), "small": (("data.micro_batch_size=2",), 2)}
    started = {
        name: launch(*keys, *more, num_ranks=num_ranks, run=name)
        for name, (more, num_ranks) in ways.items()
    }
    samples, losses = {}, {}
    for name, ranks in started.items():
        ranks.finish()
        found = {}
        for rank in records.read_folder(ranks.folder / "records"):
            for step in rank.steps:
                found.setdefault(step.step, set()).update(step.ids)
        samples[name], losses[name] = found, ranks.values("loss")
    assert len(samples["one"]) == 14
    assert samples["one"] == samples["three"] == samples["small"]
    for name in ("three", "small"):
        for step, expected in losses["one"].items():
            assert losses[name][step] == pytest.approx(expected, rel=1e-4)
    assert prove(records.read_folder(started["three"].folder / "records"), (), 2).num_used
