"""A recipe: one TOML file, and one Python function that makes what is trained.

    recipes/mnist_cnn/recipe.toml      keys of the configuration; ``[model]`` are the recipe's own
    recipes/mnist_cnn/recipe.py        def build(config: Config) -> Task

``Config``, a frozen dataclass of settings, is found by the annotation of ``build``. The Python file
lies beside the TOML file, unless ``code`` in it says another path or the name of a bundled recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, cast

from forebay_trainer import config as configuration
from forebay_trainer.settings import TrainConfig
from forebay_trainer.task import Task
from forebay_wire.errors import InvalidRequest, NotFound

RECIPES: Final = Path(__file__).parent / "recipes"
TOML: Final = "recipe.toml"
CODE: Final = "recipe.py"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with its arguments applied."""

    name: str
    config: TrainConfig
    module: ModuleType
    """The Python file."""

    def build(self) -> Task:
        """Makes what is trained; the caller has seeded torch, alike on all ranks."""
        task = self.module.build(cast(Any, self.config).model)
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
    module = _module(path, document.tree.pop("code", CODE))
    config = config_type(module)
    configuration.apply(config, document, overrides)
    name = path.parent.name if path.name == TOML else path.stem
    return Recipe(name, configuration.build(config, document.tree, document.source), module)


def names() -> list[str]:
    """The bundled recipes."""
    return sorted(path.parent.name for path in RECIPES.glob(f"*/{TOML}"))


def find(recipe: str) -> Path:
    """The TOML file: that path itself, the one in that folder, or that of a bundled recipe."""
    path = Path(recipe)
    if path.is_file():
        return path
    if (path / TOML).is_file():
        return path / TOML
    bundled = RECIPES / path.stem / TOML
    if path.suffix in ("", ".toml") and bundled.is_file():
        return bundled
    raise NotFound(
        f"no recipe {recipe!r}: neither a file in {Path.cwd()} nor a bundled recipe; "
        f"give the path of a TOML file or one of: {', '.join(names())}"
    )


def _module(toml: Path, code: Any) -> ModuleType:
    if not isinstance(code, str):
        raise InvalidRequest(f"{toml}: code must be the path of a Python file, not {code!r}")
    path = (toml.parent / code).resolve()
    if not path.is_file() and (RECIPES / code / CODE).is_file():
        path = RECIPES / code / CODE
    if not path.is_file():
        raise NotFound(
            f"{toml} has no Python file {path}: write one with build(config), or name it by "
            f"code = … (a path, or one of: {', '.join(names())})"
        )
    return _imported(path)


@functools.cache
def _imported(path: Path) -> ModuleType:
    name = f"forebay_recipe_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
