"""A recipe: one TOML file, and one Python function that makes what is trained.

    recipes/mnist_cnn/recipe.toml      keys of the configuration; ``[model]`` are the recipe's own
    recipes/mnist_cnn/recipe.py        def build(config: Config) -> Task
    recipes/mnist_cnn/prepare.py       def prepare(config: Config) -> Preparation

``Config``, a frozen dataclass of settings, is found by the annotation of ``build``, which may take
the metadata of the dataset as its second argument. The Python files lie beside the TOML file,
unless ``code`` and ``prepare_code`` in it say another path or the name of a bundled recipe.
``[prepare]`` are settings of the data's preparation, which is a command of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, cast

from forebay_trainer import config as configuration
from forebay_trainer.modules import imported
from forebay_trainer.settings import TrainConfig
from forebay_trainer.task import Task
from forebay_wire.errors import InvalidRequest, NotFound

RECIPES: Final = Path(__file__).parent / "recipes"
TOML: Final = "recipe.toml"
CODE: Final = "recipe.py"
PREPARE_CODE: Final = "prepare.py"
FILES: Final = {"code": (CODE, "build"), "prepare_code": (PREPARE_CODE, "prepare")}
"""Key of the TOML file to the Python file that it names, and the function in that."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with its arguments applied."""

    name: str
    config: TrainConfig
    module: ModuleType
    """The Python file."""
    can_prepare: bool = False
    """Whether it says how its dataset is made."""

    def about(self, client: Any) -> dict[str, Any]:
        """The metadata of the dataset version. NotFound says how to make one that is not there."""
        try:
            return self.config.data.about(client)
        except NotFound as error:
            if not self.can_prepare:
                raise
            said = f"{error.message}; `forebay_trainer prepare {self.name}` makes it"
            raise NotFound(said) from error

    def build(self, about: Mapping[str, Any]) -> Task:
        """Makes what is trained; the caller has seeded torch, alike on all ranks. *about*: the
        metadata of the dataset version, as a vocabulary's size."""
        arguments: list[Any] = [cast(Any, self.config).model, about]
        num_taken = len(inspect.signature(self.module.build).parameters)
        task = self.module.build(*arguments[:num_taken])
        if not isinstance(task, Task):
            raise InvalidRequest(f"build() of {self.module.__file__} returns no Task: {task!r}")
        return task


def load(recipe: str, overrides: Sequence[str] = (), *, size: str | None = None) -> Recipe:
    """Reads a recipe and applies ``key=value`` arguments.

    Raises NotFound for a recipe that does not exist and InvalidRequest, naming the key and its
    place, for what is not valid in it or in an argument.
    """
    path = find(recipe)
    document = configuration.read(path, size)
    module = _module(path, "code", document.tree.pop("code", CODE))
    document.tree.pop("prepare", None)  # of another command
    can_prepare = "prepare_code" in document.tree or (path.parent / PREPARE_CODE).is_file()
    document.tree.pop("prepare_code", None)
    config = config_type(module)
    configuration.apply(config, document, overrides)
    name = path.parent.name if path.name == TOML else f"{path.parent.name}/{path.stem}"
    built = configuration.build(config, document.tree, document.source)
    return Recipe(name, built, module, can_prepare)


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """How the dataset of a recipe is made, with arguments applied."""

    recipe: Recipe
    file: Path
    """``prepare.py``."""
    settings: Any
    """Its ``Config``."""


def load_data(recipe: str, overrides: Sequence[str] = (), *, size: str | None = None) -> DataRecipe:
    """Reads what a recipe says of its data; arguments ``prepare.key=value`` belong to that, all
    others to the training, of which dataset and address count here. Raises as `load` does."""
    path = find(recipe)
    document = configuration.read(path, size)
    module = _module(path, "prepare_code", document.tree.get("prepare_code", PREPARE_CODE))
    own = [each for each in overrides if each.startswith("prepare.")]
    loaded = load(recipe, [each for each in overrides if each not in own], size=size)
    section = dataclasses.make_dataclass(
        "PrepareConfig",
        [("prepare", module.Config, dataclasses.field(default_factory=module.Config))],
        frozen=True,
        kw_only=True,
    )
    tree = {key: value for key, value in document.tree.items() if key == "prepare"}
    document = dataclasses.replace(document, tree=tree)
    configuration.apply(section, document, own)
    settings: Any = configuration.build(section, document.tree, document.source)
    assert module.__file__ is not None
    return DataRecipe(loaded, Path(module.__file__), settings.prepare)


def names() -> list[str]:
    """The bundled recipes, and their variants: ``NAME/VARIANT``."""
    found = [path.relative_to(RECIPES).with_suffix("") for path in RECIPES.glob("*/*.toml")]
    return sorted(str(each.parent if each.name == Path(TOML).stem else each) for each in found)


def find(recipe: str) -> Path:
    """The TOML file: that path itself, the one in that folder, or that of a bundled recipe, with or
    without ``.toml``; a variant is ``NAME/VARIANT``."""
    path = Path(recipe)
    if path.is_file():
        return path
    if (path / TOML).is_file():
        return path / TOML
    bundled = recipe.removeprefix("recipes/").removesuffix(".toml")
    if bundled in names():
        return RECIPES / (f"{bundled}.toml" if "/" in bundled else f"{bundled}/{TOML}")
    raise NotFound(
        f"no recipe {recipe!r}: neither a file in {Path.cwd()} nor a bundled recipe; "
        f"give the path of a TOML file or one of: {', '.join(names())}"
    )


def _module(toml: Path, key: str, code: Any) -> ModuleType:
    file, function = FILES[key]
    if not isinstance(code, str):
        raise InvalidRequest(f"{toml}: {key} must be the path of a Python file, not {code!r}")
    path = (toml.parent / code).resolve()
    if not path.is_file() and (RECIPES / code / file).is_file():
        path = RECIPES / code / file
    if not path.is_file():
        raise NotFound(
            f"{toml} has no Python file {path}: write one with {function}(config), or name it by "
            f"{key} = … (a path, or one of: {', '.join(names())})"
        )
    return imported(path)


@functools.cache
def config_type(module: ModuleType) -> type[TrainConfig]:
    """`TrainConfig` with one more section, ``[model]``: what ``build`` of the module takes."""
    build: Callable[..., Any] | None = getattr(module, "build", None)
    if build is None:
        raise InvalidRequest(f"{module.__file__} has no function build(config)")
    hints = [hint for name, hint in typing.get_type_hints(build).items() if name != "return"]
    if not hints or not dataclasses.is_dataclass(hints[0]):
        raise InvalidRequest(
            f"build() of {module.__file__} takes a dataclass of settings: annotate its parameter"
        )
    section = (hints[0], dataclasses.field(default_factory=cast(Any, hints[0])))
    return cast(
        type[TrainConfig],
        dataclasses.make_dataclass(
            "RecipeConfig",
            [("model", *section)],
            bases=(TrainConfig,),
            frozen=True,
            kw_only=True,
        ),
    )
