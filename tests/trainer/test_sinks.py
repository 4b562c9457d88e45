"""Where events go, as their readers see them."""

import re
import sys
import time
from urllib.request import urlopen

import pytest

from forebay_trainer.metrics import MetricsConfig
from forebay_trainer.metrics.console import Console, amount, duration, plain, styled
from forebay_trainer.metrics.prometheus import Prometheus
from forebay_trainer.metrics.sinks import SINKS
from forebay_wire.errors import InvalidRequest


def start(step=0, attempt=1):
    more = {"run": "a run", "num_ranks": 2, "skipped": ["7/10"] if step else []}
    return {"event": "start", "time": 100.0 + attempt, "attempt": attempt, "step": step, **more}


def taken(step, attempt=1, loss=0.25):
    return {
        "event": "step",
        "time": 101.0 + attempt + step,
        "attempt": attempt,
        "step": step,
        "epoch": 0,
        "loss": loss,
        "samples": 1200,
        "tokens": 0,
        "learning_rate": 1e-3,
        "gradient_norm": 1.5,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.003,
        "stall_seconds": 0.02,
        "samples_per_second": 2400.0,
        "flops_utilisation": 0.415,
    }


def totals(event, **values):
    common = {"time": 110.0, "attempt": 1, "step": 2, "steps": 2, "seconds": 130.0}
    common |= {"mean_loss": 0.5, "data_wait_seconds": 0.5, "stall_seconds": 0.04}
    return {"event": event, **common, "energy_joules": 7.2e6, "energy_source": "rapl", **values}


EVENTS = [
    start(),
    taken(1),
    {"event": "save", "time": 103.0, "attempt": 1, "step": 2, "stall_seconds": 0.02},
    taken(2),
    {"event": "evaluation", "time": 104, "attempt": 1, "step": 2, "test_loss": 0.5, "epoch": 0},
    totals("epoch", epoch=0),
    totals("end", reason="done"),
]

STEP = (
    "step 1  epoch 0  loss 0.2500  lr 1.00e-03  grad 1.5  2.4k samples/s  MFU 41.5%  "
    "wait 3.0 ms  stall 20.0 ms"
)


def test_a_person_reads_one_line_an_event(capsys):
    console = Console(plain)
    for event in EVENTS:
        console.write(event)
    assert capsys.readouterr().out.splitlines() == [
        STEP,
        "saved step 2, which held up 20.0 ms",
        STEP.replace("step 1", "step 2"),
        "evaluation at step 2: loss 0.5",
        "epoch 0: 2 steps in 2 min  mean loss 0.5000  wait 500.0 ms  stall 40.0 ms  2 kWh (rapl)",
        "attempt done: 2 steps in 2 min  mean loss 0.5000  wait 500.0 ms  stall 40.0 ms  "
        "2 kWh (rapl)",
    ]


def test_a_terminal_shows_the_same_words_in_colours(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    Console(styled()).write(taken(1))
    shown = capsys.readouterr().out
    assert "\x1b[" in shown
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == f"{STEP}\n"


def test_steps_may_be_thinned_out_and_nothing_else(capsys):
    console = Console(plain, seconds=1000.0)
    for event in EVENTS:
        console.write(event)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step")] == [STEP]
    assert len(lines) == 5


def test_generations_that_were_skipped_are_named(capsys):
    Console(plain).write(start(step=5))
    assert capsys.readouterr().out == "skipped, as not whole: 7/10\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0031, "3.1 ms"), (12, "12.0 s"), (119, "119.0 s"), (300, "5 min"), (7500, "2 h 05 min")],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (12.34, "12.3"), (999.6, "1k"), (45.6e6, "45.6M"), (3e15, "3e+03T")],
)
def test_amounts_are_readable(number, text):
    assert amount(number) == text


def test_prometheus_reads_the_newest_figures_on_this_machine_alone(tmp_path, capsys):
    sink = Prometheus.open(MetricsConfig(port=0), tmp_path, 1)
    try:
        for event in EVENTS:
            sink.write(event)
        assert sink.url.startswith("http://127.0.0.1:")
        assert sink.url in capsys.readouterr().out
        with urlopen(sink.url, timeout=10) as answer:
            text = answer.read().decode()
        taken_port = int(sink.url.split(":")[2].split("/")[0])
        with pytest.raises(InvalidRequest, match=f"metrics.port: .*:{taken_port}"):
            Prometheus.open(MetricsConfig(port=taken_port), tmp_path, 1)
    finally:
        sink.close()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["forebay_train_step"]) == 2
    assert float(values["forebay_train_step_loss"]) == 0.25
    assert float(values["forebay_train_evaluation_test_loss"]) == 0.5
    assert float(values["forebay_train_steps_total"]) == 2
    assert float(values["forebay_train_samples_total"]) == 2400
    assert float(values["forebay_train_stall_seconds_total"]) == pytest.approx(0.04)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "prometheus"])
def test_a_package_that_is_missing_is_named_with_its_extra(name, monkeypatch):
    package = {"prometheus": "prometheus_client"}.get(name, name)
    extra = {"prometheus": "server"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InvalidRequest, match=rf"package {package}: .*forebay\[{extra}\]"):
        MetricsConfig(sinks=("jsonl", name))


def test_a_sink_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(InvalidRequest, match=r"'csv' is none of console, jsonl, prometheus"):
        MetricsConfig(sinks=("csv",))


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, events in {
        1: [start(), taken(1, 1, 4.0), taken(2, 1, 3.0), taken(3, 1, 9.0)],
        2: [start(2, 2), taken(3, 2, 2.0), taken(4, 2, 1.0), totals("end", step=4)],
    }.items():
        sink = SINKS["tensorboard"](MetricsConfig(), tmp_path, attempt)
        for event in events:
            sink.write(event)
        sink.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(each.step, each.value) for each in found.Scalars("step/loss")]
    assert losses == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert [each.step for each in found.Scalars("end/seconds")] == [4]


def test_wandb_writes_a_run_without_a_network(tmp_path):
    pytest.importorskip("wandb")
    sink = SINKS["wandb"](MetricsConfig(wandb_mode="offline"), tmp_path / "logs", 1)
    for event in EVENTS:
        sink.write(event)
    sink.close()
    (written,) = (tmp_path / "logs").glob("wandb/offline-run-*/run-a-run.wandb")
    deadline = time.monotonic() + 30  # a process of theirs writes it
    while b"step/loss" not in written.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
