"""How a run ends, and what half precision does to it: with ranks in processes of their own."""

import signal

import numpy as np
import pytest

from forebay_trainer import records
from forebay_trainer.demo.proof import prove

pytestmark = pytest.mark.timeout(200)


def test_a_rank_that_is_told_to_end_takes_all_along_and_the_others_say_so(launch, client):
    keys = ("checkpoint.every_steps=0", "deterministic=true")
    ranks = launch(*keys, "min_step_seconds=0.02", num_ranks=2)
    ranks.wait_step(5)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.statuses() == [4, 0], ranks.output()
    (end,) = (event for event in ranks.events() if event["event"] == "end")
    assert end["reason"] == "terminated"
    run = ranks.output().split("run ", 1)[1].split(",", 1)[0]
    (saved,) = client.run(run).generations()
    assert saved.id.step == end["step"]  # nothing was lost
    assert saved.note["config"]["model"]["width"] == 8

    num_epochs = end["step"] // 7 + 1
    again = launch(*keys, f"num_epochs={num_epochs}")
    assert f"from step {end['step']}" in again.finish()
    train = client.dataset("numbers", split="train")
    rows = train.rows_at(np.arange(len(train))).tolist()
    proof = prove(records.read_folder(again.folder / "records"), rows, num_epochs)
    assert proof.holds, proof.sentence()
    assert proof.rolled_back == ()

    # A start after the end finds nothing to do, and saves nothing again.
    third = launch(*keys, f"num_epochs={num_epochs}")
    assert f"from step {7 * num_epochs}" in third.finish()
    assert [each.id.step for each in client.run(run).generations()] == [
        7 * num_epochs,
        end["step"],
    ]


@pytest.mark.slow
def test_a_run_stops_early_and_a_later_start_takes_no_step(launch):
    keys = ("evaluation.every_steps=2", "evaluation.patience=2", "optimizer.learning_rate=0.5")
    ranks = launch(*keys, "optimizer.schedule=constant")
    text = ranks.finish()
    assert "stopped early" in text
    last = max(ranks.values("loss"))
    again = launch(*keys, "optimizer.schedule=constant")
    again.finish()
    assert max(again.values("loss")) == last


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mesh", ["parallel.num_shards=1", "parallel.num_shards=2"])
def test_half_precision_comes_close_and_resumes_bit_for_bit(launch, precision, mesh):
    keys = ("deterministic=true", "optimizer.schedule=constant", "checkpoint.every_steps=5")
    full = launch(*keys, mesh, "max_steps=30", num_ranks=2, run="full")
    half = launch(*keys, mesh, "max_steps=30", f"precision={precision}", num_ranks=2, run="half")
    full.finish()
    half.finish()
    expected, found = full.values("loss"), half.values("loss")
    assert found != expected
    for step in expected:
        assert found[step] == [pytest.approx(expected[step][0], abs=0.05)]
    cut = launch(*keys, mesh, "max_steps=15", f"precision={precision}", num_ranks=2, run="cut")
    cut.finish()
    cut = launch(*keys, mesh, "max_steps=30", f"precision={precision}", num_ranks=2, run="cut")
    cut.finish()
    assert cut.values("loss") == found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_compiled_model_trains_alike(launch):
    keys = ("deterministic=true", "max_steps=6", "model.dropout=0")
    plain = launch(*keys, run="plain")
    plain.finish()
    compiled = launch(*keys, "compile=true", run="compiled")
    compiled.finish(300)
    for step, (loss,) in plain.values("loss").items():
        assert compiled.values("loss")[step] == [pytest.approx(loss, rel=1e-4)]
