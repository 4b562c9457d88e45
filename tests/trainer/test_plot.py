"""Pictures of a run tell what counts, once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_trainer.__main__ import main
from forebay_trainer.metrics.history import history, thinned
from forebay_wire.errors import NotFound


def start(step, attempt, run="a"):
    return {"event": "start", "attempt": attempt, "step": step, "run": run, "num_ranks": 2}


def taken(step, attempt, **values):
    common = {"loss": 1.0 / step, "samples": 8, "step_seconds": 0.5, "data_wait_seconds": 0.1}
    common |= {"stall_seconds": 0.05, "energy_joules": 10.0, "energy_source": "rapl"}
    return {"event": "step", "attempt": attempt, "step": step, "epoch": 0, **common, **values}


def saved(step, attempt):
    return {"event": "save", "attempt": attempt, "step": step, "stall_seconds": 0.02}


def evaluated(step, attempt, loss):
    found = {"test_loss": loss, "test_samples": 20, "test_accuracy": 0.5, "epoch": 0}
    return {"event": "evaluation", "attempt": attempt, "step": step, **found}


RUN = [
    start(0, 1),
    *(taken(step, 1) for step in (1, 2)),
    saved(2, 1),
    taken(3, 1, loss=7.0),
    evaluated(3, 1, 9.0),
    saved(3, 1),  # damaged: the next attempt starts from step 2
    start(2, 2),
    *(taken(step, 2) for step in (3, 4)),
    evaluated(4, 2, 0.5),
    saved(4, 2),
    {"event": "end", "attempt": 2, "step": 4, "reason": "done"},
]


def write(folder, events, more=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(event)}\n" for event in events)
    (folder / "metrics.jsonl").write_text(lines + more)
    return folder


def test_steps_that_were_taken_back_are_shown_once_and_paid_for_twice():
    found = history(RUN)
    assert [step["step"] for step in found.steps] == [1, 2, 3, 4]
    assert {step["attempt"] for step in found.steps[2:]} == {2}
    assert [save["step"] for save in found.saves] == [2, 4]
    assert [each["test_loss"] for each in found.evaluations] == [0.5]
    assert (found.num_taken, found.joules) == (5, {"rapl": 50.0})
    rows = dict(found.summary())
    assert (rows["attempts"], rows["steps"], rows["steps taken again"]) == ("2", "4", "1")
    assert rows["waiting for data"] == "0.40 s, 20.00%"
    assert rows["energy"] == "50 J (rapl)"


def test_of_several_runs_in_a_file_the_last_one_is_told_or_the_one_that_is_named():
    events = [*RUN, start(0, 1, "b"), taken(1, 1)]
    assert [step["step"] for step in history(events).steps] == [1]
    assert len(history(events, "a").steps) == 4
    with pytest.raises(NotFound, match="only a, b"):
        history(events, "c")


points = st.lists(st.floats(-1e6, 1e6), max_size=300).map(lambda values: list(enumerate(values)))


@given(points, st.integers(2, 50))
def test_thinned_points_keep_their_extremes_and_their_order(points, most):
    found = thinned(points, most)
    assert len(found) <= max(most, 2)
    assert found == sorted(found)
    assert set(found) <= set(points)
    if points:
        values = [value for _, value in points]
        assert {max(values), min(values)} <= {value for _, value in found}


def test_a_picture_and_a_page_that_needs_nothing_else(tmp_path, capsys):
    folder = write(tmp_path / "logs", [*RUN], more='{"event": "st')  # torn by a kill
    assert main(["plot", str(folder)]) == 0
    png, page = folder / "plot.png", folder / "plot.html"
    assert capsys.readouterr().out.splitlines() == [str(png), str(page)]
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<svg" in text
    for words in ("Run a: 2 attempt(s), 4 steps", "with a save", "accuracy", "taken again"):
        assert words in text
    assert "src=" not in text
    assert 'href="http' not in text


def test_one_format_goes_where_it_was_asked_to(tmp_path):
    folder = write(tmp_path / "logs", [start(0, 1, "<b>"), taken(1, 1)])
    out = tmp_path / "new" / "picture.html"
    lines = str(folder / "metrics.jsonl")
    assert main(["plot", lines, "--out", str(out), "--format", "html"]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["picture.html"]
    assert "<h1>Run &lt;b&gt;: " in out.read_text()


@pytest.mark.parametrize("events", [None, [], [taken(1, 1)]])
def test_what_is_no_run_is_said_so(tmp_path, capsys, events):
    folder = tmp_path / "logs" if events is None else write(tmp_path / "logs", events)
    assert main(["plot", str(folder)]) == 2
    assert "no " in capsys.readouterr().err
