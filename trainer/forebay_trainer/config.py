"""A recipe file plus ``key=value`` arguments become one checked, frozen configuration.

A configuration is a tree of frozen keyword-only dataclasses. Every option is declared once, as a
field made by `setting`, with its default, its unit and its meaning. Order of precedence: argument,
then recipe, then default. A key that no field declares is an error that suggests the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from forebay_wire.errors import InvalidRequest

T = TypeVar("T")


def setting(default: T, meaning: str) -> T:
    """A field of a configuration; ``meaning`` says what it does and in which unit."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Key:
    """One option, for listings: ``name`` is dotted, ``default`` as Python shows it."""

    name: str
    type: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Document:
    """A TOML file as it was read: its values, and where each of them stands."""

    path: Path
    tree: dict[str, Any]
    source: dict[str, str]
    """For each dotted key the place that an error names: ``FILE, line N``."""


def read(path: Path, size: str | None = None) -> Document:
    """Reads a recipe. The tables ``[sizes.NAME]`` are no keys: the one named *size* wins over
    what else the file says, the others are left out.

    Raises InvalidRequest for a file that is not TOML, or has no such size.
    """
    text = path.read_text(encoding="utf-8")
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{path} is not valid TOML: {error}; correct the file") from error
    lines = key_lines(text)
    sizes = tree.pop("sizes", {})
    source = {name: _place(path, lines.get(name)) for name in flatten(tree)}
    if size is not None:
        if not isinstance(sizes, dict) or size not in sizes:
            known = ", ".join(sizes) if sizes else "none"
            raise InvalidRequest(f"{path} has no size {size!r}; it has: {known}")
        for name in flatten(sizes[size]):
            put(tree, name, value_at(sizes[size], name))
            source[name] = _place(path, lines.get(f"sizes.{size}.{name}"))
    return Document(path, tree, source)


def apply(config: type, document: Document, overrides: Sequence[str]) -> None:
    """Puts ``key=value`` arguments over what a file says."""
    for override in overrides:
        name, text = split_override(override)
        put(document.tree, name, parse_value(text, field_type(config, name)))
        document.source[name] = "argument"


def load(config: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The configuration that a TOML file and arguments make; InvalidRequest, naming the key and
    its place, for what is not valid in them."""
    document = read(path)
    apply(config, document, overrides)
    return build(config, document.tree, document.source)


_HEADER: Final = re.compile(r"\s*\[+\s*([^\[\]]+?)\s*\]+\s*(#.*)?$")
_KEY: Final = re.compile(r"""\s*([\w."'-]+)\s*=""")


def key_lines(text: str) -> dict[str, int]:
    """Dotted key to the number of its line, from 1, for keys written as recipes write them: one a
    line, tables by headers. tomllib does not tell."""
    found: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            prefix = f"{header[1]}."
            found.setdefault(header[1], number)
        elif key := _KEY.match(line):
            found.setdefault(prefix + key[1].replace('"', "").replace("'", ""), number)
    return found


def _place(path: Path, line: int | None) -> str:
    return f"{path}" if line is None else f"{path}, line {line}"


def value_at(tree: Mapping[str, Any], name: str) -> Any:
    value: Any = tree
    for part in name.split("."):
        value = value[part]
    return value


def split_override(override: str) -> tuple[str, str]:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise InvalidRequest(
            f"argument {override!r} is not key=value; write for example num_epochs=3 "
            "or optimizer.learning_rate=0.01"
        )
    return name.strip(), text.strip()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        # A recipe that puts a value where a section belongs is reported by `build`.
        tree = below if isinstance(below, dict) else {}
    tree[leaf] = value


def field_type(config: type, name: str) -> Any:
    """The declared type of a dotted key; InvalidRequest with a suggestion if there is none."""
    current: Any = config
    done: list[str] = []
    for part in name.split("."):
        if not dataclasses.is_dataclass(current):
            raise InvalidRequest(f"key {name!r}: {'.'.join(done)!r} is a value and has no keys")
        hints = typing.get_type_hints(current)
        if part not in hints:
            raise unknown_key(config, name, "argument")
        current = hints[part]
        done.append(part)
    if dataclasses.is_dataclass(current):
        inside = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(current))
        raise InvalidRequest(f"key {name!r} is a section; give one of its keys: {inside}")
    return current


def unknown_key(config: type, name: str, source: str) -> InvalidRequest:
    names = [key.name for key in keys(config)]
    section, dot, rest = name.partition(".")
    sections = {each.partition(".")[0] for each in names if "." in each}
    if dot and section not in sections:  # the section is what is wrong: modle.width
        meant = difflib.get_close_matches(section, sections, n=1)
        inside = [each for each in names if each.startswith(f"{meant[0]}.")] if meant else []
        if inside and f"{meant[0]}.{rest}" not in inside:
            said = f"there is a section {meant[0]!r}, with {', '.join(inside)}"
            return InvalidRequest(f"unknown key {name!r} ({source}): {said}")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:  # right key, section missing: learning_rate for optimizer.learning_rate
        leaf = name.rpartition(".")[2]
        leaves = {found.rpartition(".")[2]: found for found in names}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    advice = f"did you mean {near[0]!r}?" if near else "--keys lists them all"
    return InvalidRequest(f"unknown key {name!r} ({source}): {advice}")


def parse_value(text: str, target: Any) -> Any:
    """The value that an argument means: TOML if that fits the declared type, else the text.

    What fits in no way is returned all the same, for `build` to refuse with the key's name.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    fits = convert(value, target) is not MISMATCH or convert(text, target) is MISMATCH
    return value if fits else text


def build(config: type[T], tree: Mapping[str, Any], source: Mapping[str, str]) -> T:
    """The configuration of a tree of plain values."""
    return typing.cast(T, _build(config, config, tree, source, ""))


def _build(
    root: type, config: Any, tree: Mapping[str, Any], source: Mapping[str, str], prefix: str
) -> Any:
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise unknown_key(root, name, _where(source, name))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise InvalidRequest(
                    f"{name!r} ({_where(source, name)}) is a section, not the value {value!r}; "
                    f"write [{name}] and its keys below it"
                )
            values[key] = _build(root, hints[key], value, source, f"{name}.")
        else:
            values[key] = check(name, value, hints[key], _where(source, name))
    try:
        return config(**values)
    except InvalidRequest as error:  # from a __post_init__, which knows its own keys only
        raise InvalidRequest(f"{prefix}{error.message}") from None


def _where(source: Mapping[str, str], name: str) -> str:
    exact = source.get(name)
    inside = (place for leaf, place in source.items() if leaf.startswith(f"{name}."))
    return exact or next(inside, "recipe")


def check(name: str, value: Any, target: Any, where: str) -> Any:
    """``value`` as ``target``, or InvalidRequest that says what was expected."""
    if value == "none" and convert(None, target) is None:  # TOML has no null
        return None
    found = convert(value, target)
    if found is MISMATCH:
        raise InvalidRequest(
            f"{name!r} ({where}) must be {describe(target)}, not {value!r} ({type(value).__name__})"
        )
    return found


MISMATCH: Final = object()


def convert(value: Any, target: Any) -> Any:
    """``value`` as an instance of the declared type, or MISMATCH. No guessing: 1 is no bool."""
    origin = typing.get_origin(target)
    if isinstance(target, types.UnionType) or origin is typing.Union:
        fits = (convert(value, member) for member in typing.get_args(target))
        return next((found for found in fits if found is not MISMATCH), MISMATCH)
    if origin is Literal:
        return value if value in typing.get_args(target) else MISMATCH
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return MISMATCH
        items = [convert(item, typing.get_args(target)[0]) for item in value]
        return MISMATCH if MISMATCH in items else tuple(items)
    if target is type(None):
        return value if value is None else MISMATCH
    if isinstance(value, bool) and target is not bool:
        return MISMATCH
    if target is float and isinstance(value, int):
        return float(value)
    return value if isinstance(value, target) else MISMATCH


def describe(target: Any) -> str:
    if isinstance(target, types.UnionType) or typing.get_origin(target) is typing.Union:
        return " or ".join(describe(member) for member in typing.get_args(target))
    if typing.get_origin(target) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(target))
    if typing.get_origin(target) is tuple:
        return f"a list of {typing.get_args(target)[0].__name__}"
    return "none" if target is type(None) else f"{target.__name__}"


def keys(config: type, prefix: str = "") -> Iterator[Key]:
    """Every option of a configuration, in the order of declaration."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        target = hints[field.name]
        if dataclasses.is_dataclass(target):
            yield from keys(typing.cast(type, target), f"{prefix}{field.name}.")
        else:
            meaning = field.metadata.get("meaning", "")
            yield Key(f"{prefix}{field.name}", describe(target), repr(field.default), meaning)


def as_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, ready for JSON."""
    return dataclasses.asdict(config)
