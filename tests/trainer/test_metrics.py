"""What a run measures of itself."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from forebay_trainer.metrics.energy import Energy, Nvml, Rapl, Stated, difference
from forebay_trainer.metrics.flops import Peak, counted, known, measured, of_dense
from forebay_trainer.metrics.meter import Meter

CPU = torch.device("cpu")


def test_a_run_says_how_fast_it_was_and_what_it_used(launch):
    overrides = ["max_steps=8", "checkpoint.every_steps=3", "metrics.watts=100"]
    ranks = launch(*overrides, "metrics.peak_flops=1e9", num_ranks=2)
    output = ranks.finish()
    events = ranks.events()
    start, *_, end = events
    assert start["peak_flops"] == 2e9
    assert start["peak_flops_source"] == "stated"
    steps = [event for event in events if event["event"] == "step"]
    for step in steps:
        seconds = step["step_seconds"]
        assert step["samples_per_second"] == pytest.approx(step["samples"] / seconds)
        # All weights of the recipe are dense: 4*8+8, 2*(8*16+16+16*8+8), 8*3+3 of them.
        flops = 6 * (40 + 2 * 280 + 27) * step["samples"]
        assert step["flops_utilisation"] == pytest.approx(flops / seconds / 2e9)
        assert 2**20 < step["rss_bytes"] < 2**40
        assert "tokens_per_second" not in step
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [(epoch["epoch"], epoch["step"], epoch["steps"]) for epoch in epochs] == [
        (0, 7, 7),
        (1, 8, 1),
    ]
    assert [epoch["samples"] for epoch in epochs] == [80, 12]
    assert end["steps"] == 8
    assert end["seconds"] == pytest.approx(sum(step["step_seconds"] for step in steps))
    assert output.count("\nstep ") == 8
    assert output.count("\nsaved step ") == 3
    assert output.count("\nevaluation at step ") == 2
    if not Rapl.zones():
        assert end["energy_source"] == "stated: 100 W a machine"
        assert end["energy_joules"] == pytest.approx(sum(s["energy_joules"] for s in steps))
        assert end["energy_joules"] > 80 * end["seconds"], "not of one rank of two alone"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def a_meter(energy, **more):
    common = {"flops": lambda samples, tokens: 6.0 * tokens, "peak": None, "clock": Clock()}
    return Meter(energy=energy, device=CPU, num_ranks=2, **{**common, **more})


def step_event(step, **values):
    common = {"loss": 2.0, "samples": 8, "tokens": 64, "learning_rate": 0.1}
    common |= {"step_seconds": 0.5, "data_wait_seconds": 0.1, "stall_seconds": 0.0}
    return {"event": "step", "step": step, "epoch": 0, **common, **values}


def metered(meter, event):
    meter.add(event)
    return event


def test_rates_are_of_the_step_and_utilisation_is_of_all_ranks():
    meter = a_meter(Energy([], None), peak=Peak(1000.0, "stated"))
    found = metered(meter, step_event(1))
    assert found["samples_per_second"] == 16
    assert found["tokens_per_second"] == 128
    assert found["flops_utilisation"] == pytest.approx(6 * 64 / (0.5 * 2 * 1000))
    assert found["rss_bytes"] > 0


def test_without_a_peak_no_utilisation_is_claimed():
    assert "flops_utilisation" not in metered(a_meter(Energy([], None)), step_event(1))


def test_energy_adds_up_over_checkpoint_epoch_and_attempt():
    clock = Clock()
    meter = a_meter(Energy([], "rapl"), clock=clock)
    metered(meter, step_event(1, energy_joules=10.0))
    clock.now = 5.0
    meter.joules()
    clock.now = 5.25  # the energy is of this time, not of the step's
    meter.joules()
    metered(meter, step_event(2, energy_joules=20.0))
    save = metered(meter, {"event": "save", "step": 3, "stall_seconds": 0.1})
    assert save["energy_joules"] == 30
    assert save["stall_energy_joules"] == pytest.approx(20 / 0.25 * 0.1)
    metered(meter, step_event(3, energy_joules=40.0, loss=8.0))
    epoch = metered(meter, {"event": "epoch", "step": 3, "epoch": 0})
    assert (epoch["energy_joules"], epoch["energy_source"]) == (70, "rapl")
    assert (epoch["steps"], epoch["samples"], epoch["seconds"]) == (3, 24, 1.5)
    assert epoch["mean_loss"] == 4
    metered(meter, step_event(4, energy_joules=1.0))
    assert metered(meter, {"event": "epoch", "step": 4, "epoch": 1})["energy_joules"] == 1
    save = metered(meter, {"event": "save", "step": 4, "stall_seconds": 0.1})
    assert save["energy_joules"] == 41
    assert metered(meter, {"event": "end", "step": 4, "reason": "done"})["energy_joules"] == 71


@pytest.mark.parametrize("source", [None, "rapl"])
def test_no_energy_is_claimed_where_a_rank_does_not_know_its_own(source):
    meter = a_meter(Energy([], source))
    events = [
        step_event(1, energy_joules=math.nan),
        {"event": "save", "step": 1, "stall_seconds": 0.1},
        {"event": "epoch", "step": 1, "epoch": 0},
        {"event": "end", "step": 1, "reason": "done"},
    ]
    for event in events:
        assert not [name for name in metered(meter, event) if "energy" in name], event["event"]


@given(
    st.integers(1, 10**12), st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 9)
)
def test_a_counter_that_starts_again_at_zero_loses_nothing(largest, shares, first):
    """Against one that does not: each difference is below the whole range."""
    true = last = first % largest
    total = 0
    for share in shares:
        step = min(int(share * largest), largest - 1)
        true += step
        total += difference(last, true % largest, largest)
        last = true % largest
    assert total == true - first % largest


def zone(folder, name, microjoules, largest=1000):
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")


@pytest.fixture
def powercap(tmp_path):
    zone(tmp_path / "intel-rapl:0", "package-0", 900)
    zone(tmp_path / "intel-rapl:0:0", "core", 5)
    zone(tmp_path / "intel-rapl:0:1", "dram", 100)
    zone(tmp_path / "intel-rapl:1", "psys", 7)
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", 900)
    return tmp_path


def test_packages_and_memory_count_and_their_parts_do_not(powercap):
    energy = Energy.open(CPU, 500.0, powercap=powercap)
    for path in powercap.glob("*/energy_uj"):
        path.write_text(f"{(int(path.read_text()) + 200) % 1000}\n")
    assert energy.source == "rapl", "what is measured wins over what is stated"
    assert energy.joules() == pytest.approx(400e-6)
    assert energy.joules() == 0


def test_one_rank_of_a_machine_answers_for_its_processors(powercap, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    energy = Energy.open(CPU, None, powercap=powercap)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("950")
    assert (energy.source, energy.joules()) == ("rapl", 0)
    stated = Energy.open(CPU, 100.0, powercap=powercap / "none")
    assert (stated.source, stated.joules()) == ("stated: 100 W a machine", 0)


def test_a_machine_without_counters_claims_what_was_stated_or_nothing(tmp_path):
    nobody = Energy.open(CPU, None, powercap=tmp_path)
    assert nobody.source is None
    assert math.isnan(nobody.joules())
    clock = Clock()
    stated = Stated(50.0, clock)
    clock.now = 4.0
    assert (stated.joules(), stated.joules()) == (200, 0)


def test_a_counter_that_may_not_be_read_counts_for_nothing(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert Rapl.zones(powercap) == []


def test_model_flops_count_each_weight_that_is_multiplied_once():
    table = nn.Embedding(10, 4)
    head = nn.Linear(4, 10, bias=False)
    flops = of_dense({"model": nn.ModuleList([table, head])})
    assert (flops(3, 0), flops(3, 7)) == (6 * 40 * 3, 6 * 40 * 7)
    head.weight = table.weight  # tied: the head multiplies by it
    assert of_dense({"model": nn.ModuleList([table, head])})(1, 0) == 6 * 40
    head.weight.requires_grad_(False)
    assert of_dense({"model": head})(1, 0) == 4 * 40, "no gradient of a frozen weight"


def test_peaks_are_of_the_gpu_that_is_there():
    assert known("NVIDIA H100 80GB HBM3", "bf16").flops_per_second == 989e12
    assert known("NVIDIA H100 PCIe", "bf16").flops_per_second == 756e12
    assert known("NVIDIA A100-SXM4-80GB", "fp32").flops_per_second == 19.5e12
    assert known("NVIDIA L4", "bf16").flops_per_second == 121e12
    assert known("Tesla T4", "bf16") is None
    assert known("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16") is None
    assert known("NVIDIA GeForce RTX 4090", "bf16") is None
    found = measured(torch.float32)
    assert 1e8 < found.flops_per_second < 1e15
    assert "float32" in found.source


def test_model_flops_can_be_counted_for_what_is_not_dense():
    pictures = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 10))
    flops = counted(pictures, torch.empty(1, 1, 6, 6))
    assert flops(5, 0) == 3 * 5 * 2 * (36 * 9 * 4 + 4 * 36 * 10)
    words = counted(nn.LSTM(8, 16, batch_first=True), torch.empty(1, 7, 8))
    assert words(2, 14) == 3 * 2 * 2 * 7 * 4 * 16 * (8 + 16)
    assert pictures[0].weight.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("is_installed", [True, False])
def test_without_nvidias_driver_or_package_a_gpu_counts_for_nothing(
    tmp_path, monkeypatch, is_installed
):
    if not is_installed:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = torch.device("cuda")
    assert Energy.open(gpu, None, powercap=tmp_path).source is None
    assert Energy.open(gpu, 300.0, powercap=tmp_path).source == "stated: 300 W a machine"


def test_what_was_stated_wins_over_the_processors_of_a_machine_with_gpus(powercap):
    gpu = torch.device("cuda")
    if Nvml.open(gpu) is not None:
        pytest.skip("this GPU has a counter")
    assert Energy.open(gpu, 300.0, powercap=powercap).source == "stated: 300 W a machine"
    assert Energy.open(gpu, None, powercap=powercap).source == "rapl"
