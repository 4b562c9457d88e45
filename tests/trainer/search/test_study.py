"""What a sweep remembers: opened again after each trial, it goes on as if never closed."""

import pytest

from forebay_trainer.search.space import Parameter, Space
from forebay_trainer.search.study import Plan, Study
from forebay_wire.errors import InvalidRequest

SPACE = Space(
    (
        Parameter("rate", "float", 1e-4, 1e-1, log=True),
        Parameter("size", "int", 8, 64, step=8),
        Parameter("channels", "choice", choices=([8], [8, 16], None)),
    )
)


def plan(**values):
    common = {"space": SPACE, "sampler": "tpe", "pruner": "none", "mode": "min", "seed": 3}
    common |= {"num_trials": 12, "first": [], "max_resource": 9}
    return Plan(**(common | values))


def value(values):
    return abs(values["rate"] - 0.01) + values["size"] / 100 + len(values["channels"] or ())


@pytest.mark.parametrize("sampler", ["tpe", "evolution", "random"])
def test_suggestions_do_not_depend_on_when_it_was_opened(tmp_path, sampler):
    tried = []
    for way in ("whole", "parts"):
        study, found = None, []
        for _ in range(12):
            if study is None or way == "parts":
                study = Study.open(tmp_path / way, plan(sampler=sampler), {"a": 1})
            number = study.ask()
            found.append(study.values(number))
            study.complete(number, value(found[-1]))
        tried.append(found)
        assert len({str(each) for each in found}) > 9
        assert study.best().value == min(map(value, found))
    assert tried[0] == tried[1]


def test_a_trial_that_was_begun_is_found_again_and_a_torn_journal_is_mended(tmp_path):
    first = {"rate": 0.01, "size": 16, "channels": [8, 16]}
    study = Study.open(tmp_path, plan(first=[first]), {"a": 1, "b": (1, 2)})
    assert (study.ask(), study.values(0)) == (0, first)
    study.report(0, 1, 0.5)
    journal = tmp_path / "trials.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wo')
    (tmp_path / "trials.journal.lock").symlink_to(journal)

    study = Study.open(tmp_path, plan(first=[first]), {"a": 1, "b": (1, 2)})
    assert study.running() == [0]
    assert study.values(0) == first
    study.report(0, 1, 0.7)  # the same evaluation, which a resume took again
    study.report(0, 2, 0.4)
    study.prune(0)
    (row,) = study.rows()
    assert (row.state, row.value) == ("pruned", 0.4)
    assert study.ask() == 1

    with pytest.raises(InvalidRequest, match=r"other settings \(a\)"):
        Study.open(tmp_path, plan(), {"a": 2, "b": (1, 2)})


def test_a_grid_is_tried_once_in_its_order(tmp_path):
    space = Space((SPACE.parameters[2],))
    grid = plan(space=space, sampler="grid", first=space.grid())
    values = []
    for _ in range(3):
        study = Study.open(tmp_path, grid, {})
        values.append(study.values(study.ask())["channels"])
    assert values == [[8], [8, 16], None]
    assert study.num_begun == 3


@pytest.mark.parametrize(
    ("pruner", "is_pruned"),
    [("median", True), ("asha", True), ("hyperband", True), ("none", False)],
)
def test_the_pruner_ends_what_does_worse_and_nothing_that_does_best(tmp_path, pruner, is_pruned):
    study = Study.open(tmp_path, plan(pruner=pruner), {})
    pruned = {}
    for quality in [1.0] * 6 + [9.0] * 4 + [0.5]:  # of several brackets
        number = study.ask()
        pruned[number] = False
        for resource in (1, 3, 9):
            study.report(number, resource, quality + 1 / resource)
            pruned[number] = pruned[number] or study.should_prune(number)
        study.complete(number, quality)
    assert any(pruned[number] for number in range(6, 10)) == is_pruned
    assert not pruned[10]
