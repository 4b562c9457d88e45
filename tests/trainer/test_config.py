"""Recipes and arguments: what is taken, and how each mistake is named."""

from dataclasses import FrozenInstanceError

import pytest

from forebay_trainer import config as configuration
from forebay_trainer import recipe as recipes
from forebay_trainer.__main__ import main
from forebay_trainer.settings import TrainConfig
from forebay_wire.errors import InvalidRequest, NotFound


def load(*overrides, recipe="mnist_cnn", size=None):
    return recipes.load(recipe, overrides, size=size).config


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text('code = "mnist_cnn"\n' + text)
        return str(path)

    return write


def test_every_bundled_recipe_is_valid():
    assert "mnist_cnn" in recipes.names()
    for name in recipes.names():
        assert recipes.load(name).name == name


def test_a_bundled_recipe_is_found_by_name_and_by_the_path_that_the_readme_shows():
    assert load() == load(recipe="recipes/mnist_cnn.toml") == load(recipe="mnist_cnn.toml")


def test_a_file_wins_over_a_bundled_recipe_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "mnist_cnn.toml").write_text("code = 'mnist_cnn'\nnum_epochs = 77\n")
    monkeypatch.chdir(tmp_path)
    assert load(recipe="mnist_cnn.toml").num_epochs == 77


def test_arguments_win_over_the_recipe_and_the_recipe_over_defaults(recipe):
    path = recipe("num_epochs = 3\nseed = 5\n[optimizer]\nlearning_rate = 0.5\n")
    config = load("num_epochs=4", "model.channels=[8]", recipe=path)
    assert (config.num_epochs, config.seed) == (4, 5)
    assert config.optimizer.learning_rate == 0.5
    assert config.model.channels == (8,)
    assert config.data.global_batch_size == TrainConfig().data.global_batch_size


def test_arguments_take_the_declared_type():
    config = load(
        "run=2026",
        "optimizer.learning_rate=1",
        "data.version=3",
        "data.test_split=none",
        "address=unix:/some/where/rpc.sock",
        "optimizer.schedule=constant",
        'data.dataset="quoted"',
    )
    assert config.run == "2026"
    assert config.optimizer.learning_rate == 1.0
    assert config.data.version == 3
    assert config.data.test_split is None
    assert config.address == "unix:/some/where/rpc.sock"
    assert config.optimizer.schedule == "constant"
    assert config.data.dataset == "quoted"


def test_none_is_none_in_a_recipe_too(recipe):
    assert load(recipe=recipe("[data]\ntest_split = 'none'\n")).data.test_split is None


def test_a_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        load().num_epochs = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learing_rate=1", r"unknown key 'optimizer.learing_rate'.*learning_rate'\?"),
        ("learning_rate=1", r"unknown key 'learning_rate'.*'optimizer.learning_rate'\?"),
        ("zzz=1", r"unknown key 'zzz' \(argument\): --keys lists them all"),
        ("optimizer=1", r"'optimizer' is a section; give one of its keys: optimizer.name"),
        ("seed.value=1", r"'seed' is a value and has no keys"),
        ("num_epochs", r"'num_epochs' is not key=value"),
        ("=3", r"'=3' is not key=value"),
        ("num_epochs=many", r"'num_epochs' \(argument\) must be int, not 'many' \(str\)"),
        ("num_epochs=1.5", r"must be int, not 1.5 \(float\)"),
        ("num_epochs=true", r"must be int, not True \(bool\)"),
        ("data.shuffle=ful", r"'data.shuffle' .* must be one of 'none', 'full', 'block', not"),
        ("data.window_blocks=4", r"data.window_blocks .* belong to shuffle=block, not to full"),
        ("data.version=newest", r"must be int or one of 'latest', not 'newest'"),
        ("model.channels=[1,'a']", r"'model.channels' .* must be a list of int"),
        ("model.channels=3", r"must be a list of int, not 3"),
        ("num_epochs=0", r"num_epochs must be at least 1, not 0"),
        ("optimizer.learning_rate=0", r"optimizer.learning_rate must be above 0, not 0.0"),
        ("data.global_batch_size=0", r"data.global_batch_size must be at least 1"),
        ("model.channels=[1,1,1,1,1]", r"model.channels has 5 convolutions, too many"),
        ("checkpoint.every_steps=-1", r"checkpoint.every_steps must be at least 0"),
    ],
)
def test_a_wrong_argument_is_named(override, message):
    with pytest.raises(InvalidRequest, match=message):
        load(override)


def test_a_block_shuffle_has_blocks_of_at_least_one_row():
    blocks = load("data.shuffle=block", "data.window_blocks=4", "data.block_rows=32").data
    assert (blocks.shuffle, blocks.window_blocks, blocks.block_rows) == ("block", 4, 32)
    assert load("data.shuffle=block", "data.block_rows=none").data.block_rows is None
    for key in ("window_blocks", "block_rows"):
        with pytest.raises(InvalidRequest, match=rf"data.{key} must be at least 1, not 0"):
            load("data.shuffle=block", f"data.{key}=0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epoch = 3\n", r"key 'num_epoch' \(/.*mine.toml, line 2\): .*'num_epochs'\?"),
        ("[data]\nshufle = 'full'\n", r"'data.shufle' \(.*, line 3\): .*'data.shuffle'\?"),
        ("[dat]\nshuffle = 'full'\n", r"unknown key 'dat' \(.*mine.toml, line 3\)"),
        ("data = 3\n", r"'data' \(.*mine.toml, line 2\) is a section, not the value 3"),
        ("\nnum_epochs = '3'\n", r"'num_epochs' \(.*, line 3\) must be int, not '3' \(str\)"),
        ("model.hidden_features = 'x'\n", r"'model.hidden_features' \(.*, line 2\) must be int"),
        ("num_epochs = \n", r"mine.toml is not valid TOML: .*line 2"),
    ],
)
def test_a_wrong_recipe_is_named(recipe, text, message):
    with pytest.raises(InvalidRequest, match=message):
        load(recipe=recipe(text))


def test_a_size_wins_over_the_rest_of_the_file_and_arguments_over_it(recipe):
    path = recipe("num_epochs = 2\nseed = 1\n[sizes.gpu]\nnum_epochs = 3\nmodel.channels = [64]\n")
    assert load(recipe=path).num_epochs == 2
    gpu = load(recipe=path, size="gpu")
    assert (gpu.num_epochs, gpu.seed, gpu.model.channels) == (3, 1, (64,))
    assert load("num_epochs=4", recipe=path, size="gpu").num_epochs == 4
    with pytest.raises(InvalidRequest, match=r"has no size 'huge'; it has: gpu"):
        load(recipe=path, size="huge")
    with pytest.raises(InvalidRequest, match=r"'num_epochs' \(.*, line 3\) must be int"):
        load(recipe=recipe("[sizes.gpu]\nnum_epochs = 1.5\n"), size="gpu")


CODE = """
from dataclasses import dataclass
import torch
from forebay_trainer.config import setting
from forebay_trainer.task import Task

@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = setting(3, "of the layer")

def build(config: Config) -> Task:
    return Task(torch.nn.Linear(config.width, 1))
"""


def test_a_recipe_of_the_user_is_a_folder_with_a_function(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.py").write_text(CODE)
    (tmp_path / "mine" / "recipe.toml").write_text("[model]\nwidth = 4\n")
    recipe = recipes.load(str(tmp_path / "mine"), ["num_epochs=2"])
    assert recipe.name == "mine"
    assert recipe.build({}).modules["model"].in_features == 4
    assert recipe.config.num_epochs == 2
    with pytest.raises(InvalidRequest, match=r"unknown key 'model.widht' .*'model.width'\?"):
        recipes.load(str(tmp_path / "mine"), ["model.widht=2"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", r"recipe.py has no function build\(config\)"),
        ("def build(config): ...\n", r"takes a dataclass of settings: annotate"),
        (None, r"has no Python file .*recipe.py"),
    ],
)
def test_a_recipe_without_its_function_is_named(tmp_path, code, message):
    (tmp_path / "recipe.toml").write_text("")
    if code is not None:
        (tmp_path / "recipe.py").write_text(code)
    with pytest.raises((InvalidRequest, NotFound), match=message):
        recipes.load(str(tmp_path))


def test_build_returns_a_task(tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "recipe.py").write_text(CODE.replace("Task(torch", "(torch"))
    with pytest.raises(InvalidRequest, match="returns no Task: Linear"):
        recipes.load(str(tmp_path)).build({})


def test_a_missing_recipe_names_the_bundled_ones():
    with pytest.raises(NotFound, match=r"no recipe 'nope.toml'.*mnist_cnn"):
        load(recipe="nope.toml")


def test_every_key_has_a_meaning():
    keys = list(configuration.keys(type(load())))
    assert len({key.name for key in keys}) == len(keys) > 20
    assert [key.name for key in keys if not key.meaning] == []


def test_a_mistake_is_one_line_and_exit_status_2(capsys):
    assert main(["mnist_cnn", "num_epoch=3"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.splitlines() == [
        "forebay_trainer: unknown key 'num_epoch' (argument): did you mean 'num_epochs'?"
    ]


def test_only_the_first_rank_of_a_node_complains(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["mnist_cnn", "num_epoch=3"]) == 2
    assert capsys.readouterr().err == ""


def test_keys_are_listed(capsys):
    assert main(["--keys"]) == 0
    listing = capsys.readouterr().out
    for key in configuration.keys(TrainConfig):
        assert key.name in listing


def test_a_section_that_does_not_exist_is_what_is_wrong(capsys):
    assert main(["mnist_cnn", "modle.width=3"]) == 2
    assert "there is a section 'model', with model.image_column" in capsys.readouterr().err
    assert main(["mnist_cnn", "modle.dropout=0"]) == 2
    assert "did you mean 'model.dropout'?" in capsys.readouterr().err
