"""The proof accepts exactly those records in which every epoch used every sample once."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_trainer.demo.proof import prove
from forebay_trainer.records import RankRecord, StepRecord


def order_of(epoch, num_samples):
    """Some order that depends on the epoch only, of ids that are no positions."""
    ids = [10 * sample + 3 for sample in range(num_samples)]
    random.Random(epoch).shuffle(ids)
    return ids


def samples_of(num_samples):
    return [10 * sample + 3 for sample in range(num_samples)]


def simulate(num_samples, batch, num_epochs, attempts):
    """Records of a run; ``attempts`` is a list of (ranks, last step, parent attempt, parent step).

    A last step of None trains to the end. A rank of an attempt that was killed may miss its last
    step, as if SIGKILL had come between the ranks: the odd ones do.
    """
    steps_per_epoch = -(-num_samples // batch)
    end = steps_per_epoch * num_epochs
    records = []
    for number, (num_ranks, last, parent_attempt, parent_step) in enumerate(attempts, start=1):
        stop = end if last is None else last
        for rank in range(num_ranks):
            steps = []
            cut = stop - (last is not None and rank % 2 and stop > parent_step)
            for step in range(parent_step + 1, cut + 1):
                epoch, index = divmod(step - 1, steps_per_epoch)
                after = min((index + 1) * batch, num_samples)
                ids = order_of(epoch, num_samples)[index * batch : (index + 1) * batch]
                steps.append(StepRecord(step, epoch, after, tuple(ids[rank::num_ranks])))
            records.append(
                RankRecord(number, rank, num_ranks, parent_attempt, parent_step, tuple(steps))
            )
    return records


def change(records, attempt, rank, step, **values):
    """The records with one step of one rank changed; without values that step is left out."""
    changed = []
    for record in records:
        if (record.attempt, record.rank) == (attempt, rank):
            parts = []
            for part in record.steps:
                if part.step != step:
                    parts.append(part)
                elif values:
                    parts.append(replace(part, **values))
            record = replace(record, steps=tuple(parts))
        changed.append(record)
    return changed


KILLED_ONCE = simulate(20, 6, 3, [(2, 7, 0, 0), (3, None, 1, 4)])


def test_a_run_that_was_killed_and_resumed_on_other_ranks_holds():
    proof = prove(KILLED_ONCE, samples_of(20), 3)
    assert proof.violations == ()
    assert proof.holds
    assert (proof.num_used, proof.num_attempts) == (60, 2)
    (lost,) = proof.rolled_back
    assert (lost.attempt, lost.first_step, lost.last_step) == (1, 5, 7)
    assert lost.num_samples == 6 + 6 + 3  # rank 1 did not get to record step 7
    assert "3 epochs x 20 samples = 60 uses" in proof.sentence()
    assert "steps 5-7, whose 15 samples were read again" in proof.sentence()


def test_a_run_without_a_break_holds():
    proof = prove(simulate(10, 4, 2, [(2, None, 0, 0)]), samples_of(10), 2)
    assert proof.holds
    assert "no step was rolled back" in proof.sentence()


def test_the_history_goes_by_parents_not_by_highest_steps():
    # The second attempt dies before it saves anything, the third starts from the first again.
    records = simulate(20, 6, 3, [(2, 9, 0, 0), (1, 11, 1, 6), (3, None, 1, 6)])
    proof = prove(records, samples_of(20), 3)
    assert proof.holds, proof.violations
    assert [each.attempt for each in proof.rolled_back] == [1, 2]


def test_an_attempt_that_took_no_step_harms_nothing():
    records = simulate(20, 6, 3, [(2, 7, 0, 0), (2, 4, 1, 4), (1, None, 1, 4)])
    assert prove(records, samples_of(20), 3).holds


def part_of(records, attempt, rank, step):
    (record,) = (each for each in records if (each.attempt, each.rank) == (attempt, rank))
    return next(part for part in record.steps if part.step == step)


@pytest.mark.parametrize("step", [2, 6, 12])
def test_a_repeated_sample_is_found(step):
    attempt = 1 if step <= 4 else 2
    ids = part_of(KILLED_ONCE, attempt, 0, step).ids
    records = change(KILLED_ONCE, attempt, 0, step, ids=(*ids, ids[0]))
    assert "used more than once 1 sample" in prove(records, samples_of(20), 3).sentence()


def test_a_missing_sample_is_found():
    ids = part_of(KILLED_ONCE, 2, 1, 9).ids
    records = change(KILLED_ONCE, 2, 1, 9, ids=ids[1:])
    assert f"never used 1 sample ({ids[0]})" in prove(records, samples_of(20), 3).sentence()


def test_a_sample_of_another_split_is_found():
    ids = part_of(KILLED_ONCE, 2, 1, 9).ids
    records = change(KILLED_ONCE, 2, 1, 9, ids=(99_999, *ids))
    assert "from outside the split 1 sample (99999)" in prove(records, samples_of(20), 3).sentence()


def test_a_sample_that_was_read_in_a_lost_step_but_not_again_there_is_found():
    foreign = part_of(KILLED_ONCE, 2, 0, 8).ids
    records = change(KILLED_ONCE, 1, 0, 6, ids=foreign)
    sentence = prove(records, samples_of(20), 3).sentence()
    assert "step 6, rolled back in attempt 1, had read" in sentence


def test_a_lost_step_at_another_place_of_the_order_is_found():
    records = change(KILLED_ONCE, 1, 0, 6, position=0)
    assert "at another place" in prove(records, samples_of(20), 3).sentence()


def test_a_missing_step_is_found():
    records = KILLED_ONCE
    for rank in range(3):
        records = change(records, 2, rank, 9)
    violations = prove(records, samples_of(20), 3).violations
    assert any("no attempt of the history recorded 1 step (9)" in each for each in violations)


def test_a_step_that_one_rank_did_not_record_is_found():
    violations = prove(change(KILLED_ONCE, 2, 2, 9), samples_of(20), 3).violations
    assert any("not all ranks recorded 1 step (9)" in each for each in violations)


def test_an_unfinished_run_is_found():
    records = simulate(20, 6, 3, [(1, 10, 0, 0)])
    assert "epoch 2 never used" in prove(records, samples_of(20), 3).sentence()


def test_an_epoch_too_many_is_found():
    assert "epoch 2 is not one of the 2" in prove(KILLED_ONCE, samples_of(20), 2).sentence()


def test_an_attempt_whose_parent_left_no_records_is_found():
    records = [record for record in KILLED_ONCE if record.attempt == 2]
    assert "which left no records" in prove(records, samples_of(20), 3).sentence()


def test_ranks_that_disagree_on_the_start_are_found():
    records = [replace(KILLED_ONCE[0], parent_step=2), *KILLED_ONCE[1:]]
    assert "disagree on where it started" in prove(records, samples_of(20), 3).sentence()


def test_no_records_prove_nothing():
    assert not prove([], samples_of(20), 3).holds


@st.composite
def runs(draw):
    """A run of a few attempts, each started from a step that an earlier one of its line took."""
    num_samples = draw(st.integers(1, 40))
    batch = draw(st.integers(1, 12))
    num_epochs = draw(st.integers(1, 3))
    end = -(-num_samples // batch) * num_epochs
    attempts = []
    line = [(0, 0)]  # generations on the line, as (attempt, step)
    for number in range(1, draw(st.integers(0, 3)) + 1):
        parent_attempt, parent_step = draw(st.sampled_from(line))
        last = draw(st.integers(parent_step, end))
        attempts.append((draw(st.integers(1, 4)), last, parent_attempt, parent_step))
        line = line[: line.index((parent_attempt, parent_step)) + 1]
        line += [(number, step) for step in range(parent_step + 1, last)]
    attempts.append((draw(st.integers(1, 4)), None, *draw(st.sampled_from(line))))
    return num_samples, num_epochs, simulate(num_samples, batch, num_epochs, attempts)


@given(runs())
def test_every_lawful_run_holds(run):
    num_samples, num_epochs, records = run
    proof = prove(records, samples_of(num_samples), num_epochs)
    assert proof.violations == ()
    assert proof.num_used == num_samples * num_epochs


@given(runs(), st.data())
def test_every_change_of_a_used_sample_is_found(run, data):
    num_samples, num_epochs, records = run
    places = [
        (record.attempt, record.rank, part)
        for record in records
        for part in record.steps
        if part.ids
    ]
    attempt, rank, part = data.draw(st.sampled_from(places))
    index = data.draw(st.integers(0, len(part.ids) - 1))
    other = data.draw(st.integers(-5, 10 * num_samples).filter(lambda each: each not in part.ids))
    ids = (*part.ids[:index], other, *part.ids[index + 1 :])
    # In a lost step that one rank did not record, another rank's sample could stand there.
    step_ids = {each for _, _, found in places if found.step == part.step for each in found.ids}
    if other in step_ids:
        ids = part.ids[:index] + part.ids[index + 1 :]
        lost = prove(records, samples_of(num_samples), num_epochs).rolled_back
        if any(each.attempt == attempt for each in lost):
            return  # less of a lost step is what a kill leaves
    changed = change(records, attempt, rank, part.step, ids=ids)
    assert not prove(changed, samples_of(num_samples), num_epochs).holds
