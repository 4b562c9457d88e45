"""A space is checked against the recipe before anything starts."""

import dataclasses

import pytest

from forebay_trainer import recipe as recipes
from forebay_trainer.search import space as spaces
from forebay_trainer.search.job import toml_text
from forebay_wire.errors import InvalidRequest

MNIST = recipes.load("mnist_cnn")


def read(tmp_path, text):
    path = tmp_path / "space.toml"
    path.write_text(text)
    return spaces.read(path, type(MNIST.config))


def load(argument):
    return recipes.load("mnist_cnn", [argument])


def test_ranges_and_choices_are_read_as_the_recipe_declares_its_keys(tmp_path):
    space = read(
        tmp_path,
        "[optimizer.learning_rate]\nlow = 1\nhigh = 1e1\nlog = true\n"
        "[data.global_batch_size]\nlow = 32\nhigh = 128\nstep = 32\n"
        "[optimizer.max_norm]\nchoices = [1, 'none']\n"
        "[model.channels]\nchoices = [[8], [8, 16]]\n",
    )
    rate, norm, size, channels = space.parameters  # a section beside itself, as in TOML
    assert (rate.kind, rate.low, rate.high, rate.log) == ("float", 1.0, 10.0, True)
    assert (size.kind, list(size.grid())) == ("int", [32, 64, 96, 128])
    assert norm.choices == (1.0, None)
    assert channels.choices == ([8], [8, 16])
    with pytest.raises(InvalidRequest, match=r"optimizer.learning_rate: a grid needs choices"):
        space.grid()
    grid = dataclasses.replace(space, parameters=(norm, channels)).grid()
    assert len(grid) == 4
    assert grid[1] == {"optimizer.max_norm": 1.0, "model.channels": [8, 16]}
    spaces.check_values(space, [], load)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer.learning_rte]\nlow = 1", r"did you mean 'optimizer.learning_rate'"),
        ("[optimizer.learning_rate]\nlow = 1", r"line 2\) lacks high"),
        ("[optimizer.learning_rate]\nlow = 1\nhgih = 2", "did you mean 'high'"),
        ("[optimizer.learning_rate]\nlow = 2\nhigh = 1", "low must be below high"),
        ("[optimizer.learning_rate]\nlow = 0\nhigh = 1\nlog = true", "log needs low above 0"),
        ("[optimizer.learning_rate]\nlow = 0\nhigh = inf", "must be finite"),
        ("[optimizer.learning_rate]\nlow = 0\nhigh = 1\nstep = 2", "step must be above 0"),
        ("[optimizer.learning_rate]\nlow = 1\nhigh = 2\nstep = 1\nlog = true", "exclude"),
        ("[optimizer.learning_rate]\nlow = '1'\nhigh = 2", "must be float, not '1'"),
        ("[data.global_batch_size]\nlow = 1.5\nhigh = 2", "must be int, not 1.5"),
        ("[optimizer.schedule]\nlow = 1\nhigh = 2", "no number: give it choices"),
        ("[optimizer.schedule]\nchoices = ['cosine', 'cosin']", "must be one of .* not 'cosin'"),
        ("[optimizer.schedule]\nchoices = ['cosine']", "at least two"),
        ("[optimizer.schedule]\nchoices = ['cosine', 'cosine']", "twice"),
        ("[optimizer.learning_rate]\nchoices = [1, 2]\nlow = 1", "choices and a range"),
        ("[optimizer]\nlearning_rate = 1", "must be a table"),
        ("optimizer = 1", "must be a table"),
        ("[output.folder]\nchoices = ['a', 'b']", "a folder of its own"),
        ("", "no key to search"),
        ("[optimizer", "not valid TOML"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(tmp_path, text, message):
    with pytest.raises(InvalidRequest, match=message):
        read(tmp_path, text)


def test_values_that_the_recipe_refuses_are_refused_at_the_start(tmp_path):
    space = read(tmp_path, "[model.dropout]\nlow = 0\nhigh = 1")
    with pytest.raises(InvalidRequest, match=r"the space has 1\.0, which the recipe refuses: "):
        spaces.check_values(space, [], load)
    space = read(tmp_path, "[model.dropout]\nlow = 0\nhigh = 0.5")
    with pytest.raises(InvalidRequest, match="an argument fixes it"):
        spaces.check_values(space, ["model.dropout=0.1"], load)


def test_what_a_common_generation_stands_on_is_not_searched(tmp_path):
    space = read(tmp_path, "[optimizer.name]\nchoices = ['adamw', 'sgd']")
    with pytest.raises(InvalidRequest, match="what the optimizer keeps is part of that"):
        spaces.check_fork(space)
    space = read(tmp_path, "[model.dropout]\nlow = 0\nhigh = 0.5")
    spaces.check_fork(space)
    weights = {"a": (2, 3)}
    spaces.check_same_shapes(space, weights, lambda argument: weights)
    other = {"a": (2, 4)}
    with pytest.raises(InvalidRequest, match=r"a: \(2, 3\) becomes \(2, 4\)"):
        spaces.check_same_shapes(space, weights, lambda argument: other)


@pytest.mark.parametrize("value", [1e-7, 0.1, 3, True, None, "cosine", "a b=\"c'", [1, 2], [0.5]])
def test_a_value_as_an_argument_is_read_as_that_value(value):
    from forebay_trainer.config import convert, parse_value

    types = {str: str, bool: bool, int: int, float: float, type(None): float | None}
    target = types.get(type(value), tuple[type(value[0]), ...] if isinstance(value, list) else None)
    found = parse_value(toml_text(value), target)
    if value is None:
        assert found == "none"
    else:
        expected = tuple(value) if isinstance(value, list) else value
        assert convert(found, target) == expected
