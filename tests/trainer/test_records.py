"""Records and metrics survive a writer that was killed in the middle of a line."""

import json

import pytest

from forebay_trainer import records
from forebay_trainer.metrics import MetricsConfig
from forebay_trainer.metrics.jsonl import JsonLines
from forebay_trainer.records import RecordWriter, StepRecord


def write(folder, attempt=1, rank=0, steps=()):
    writer = RecordWriter.create(
        folder, attempt=attempt, rank=rank, num_ranks=2, parent_attempt=0, parent_step=0
    )
    for step in steps:
        writer.append(step)
    return writer


STEPS = (StepRecord(1, 0, 0, (5, 7)), StepRecord(2, 0, 4, ()))


def test_a_step_is_in_the_file_when_append_returns(tmp_path):
    writer = write(tmp_path, steps=STEPS)
    (record,) = records.read_folder(tmp_path)
    writer.close()
    assert record.steps == STEPS
    assert (record.attempt, record.rank, record.num_ranks) == (1, 0, 2)


def test_a_torn_last_line_is_left_out(tmp_path):
    write(tmp_path, steps=STEPS).close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b'{"step":3,"epo')
    (record,) = records.read_folder(tmp_path)
    assert record.steps == STEPS


def test_a_rank_that_died_before_its_header_left_no_record(tmp_path):
    (tmp_path / "attempt-0001-rank-0.jsonl").write_bytes(b'{"attempt":1')
    assert records.read_folder(tmp_path) == []


def test_records_are_sorted_by_attempt_and_rank(tmp_path):
    for attempt, rank in [(2, 0), (1, 1), (1, 0)]:
        write(tmp_path, attempt, rank).close()
    found = [(record.attempt, record.rank) for record in records.read_folder(tmp_path)]
    assert found == [(1, 0), (1, 1), (2, 0)]


def test_a_record_is_never_written_over(tmp_path):
    write(tmp_path).close()
    with pytest.raises(FileExistsError):
        write(tmp_path)


def test_metrics_of_the_next_attempt_start_on_a_line_of_their_own(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    first = JsonLines.open(MetricsConfig(), path.parent, 1)
    first.write({"event": "step", "attempt": 1, "step": 1})
    first.close()
    path.write_bytes(path.read_bytes() + b'{"event": "st')
    second = JsonLines.open(MetricsConfig(), path.parent, 2)
    second.write({"event": "step", "attempt": 2, "step": 2})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (2, 2)]
