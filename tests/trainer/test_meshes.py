"""Every mesh trains alike, and what one saved another one restores."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEYS = ("model.dropout=0", "evaluation.at_start=true", "evaluation.every_steps=4")
KEYS += ("optimizer.schedule=constant", "average.decay=0.9", "checkpoint.every_steps=0")

MESHES = {
    "alone": (1, ()),
    "DDP 2": (2, ()),
    "FSDP2 4": (4, ("parallel.num_shards=0",)),
    "HSDP 2 x FSDP2 2": (4, ("parallel.num_replicas=2", "parallel.num_shards=2")),
    "DDP 2 x TP 2": (4, ("parallel.num_tensor=2",)),
    "FSDP2 2 x TP 2": (4, ("parallel.num_shards=2", "parallel.num_tensor=2")),
    "pipeline 2": (2, ("parallel.num_stages=2", "parallel.num_microbatches=2")),
    "pipeline 2 x DDP 2": (4, ("parallel.num_stages=2",)),
    "pipeline 2 x FSDP2 2": (4, ("parallel.num_stages=2", "parallel.num_shards=2")),
    "pipeline 2 x TP 2": (4, ("parallel.num_stages=2", "parallel.num_tensor=2")),
}


def walk(launch, names, *more):
    """The losses of a run that goes four steps on each mesh; the evaluations at each change."""
    for number, name in enumerate(names):
        num_ranks, mesh = MESHES[name]
        steps = f"max_steps={4 * (number + 1)}"
        ranks = launch(*KEYS, *more, *mesh, steps, num_ranks=num_ranks, run="walk")
        assert f"({name})" in ranks.finish()
    return ranks.values("loss"), ranks.values("test_loss", "evaluation"), ranks


def check(launch, names, *more):
    losses, evaluations, _ = walk(launch, names, *more)
    whole = launch(*KEYS, *more, f"max_steps={4 * len(names)}", run="whole")
    whole.finish()
    expected = whole.values("loss")
    assert losses.keys() == expected.keys()
    for step, (loss,) in expected.items():
        assert losses[step] == [pytest.approx(loss, rel=1e-4)], step
    for step in range(4, 4 * len(names), 4):
        before, after = evaluations[step]
        assert after == pytest.approx(before, rel=1e-5)


def test_products_of_meshes(launch):
    check(launch, [name for name in MESHES if "pipeline" not in name])


def test_products_with_pipelines(launch):
    names = [name for name in MESHES if "pipeline" in name]
    check(launch, ["FSDP2 4", *names, "alone"], "data.micro_batch_size=4")
