"""From a path to what lies there, asking the daemon anew each time: nothing here grows stale.

What is kept is what cannot change: the files of a version or generation, by its manifest's id.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from forebay.client import Client
from forebay.forking import watch
from forebay.methods import Checkpoints
from forebay.tree.content import build_tree
from forebay.tree.nodes import File, Folder
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.ids import GenerationId, check_name
from forebay_wire.v1 import checkpoints_pb2, datasets_pb2

DATASETS: Final = "datasets"
CHECKPOINTS: Final = "checkpoints"
LATEST: Final = "latest"

LATEST_SECONDS: Final = 60.0
"""How long ``latest`` waits for generations that all ranks have sealed and that still land."""

LARGEST: Final = {"an attempt": 2**32 - 1, "a step": 2**64 - 1}
"""What the wire can carry."""

KEPT_FILES: Final = 200_000
"""Of versions and generations that were used last; a file costs about 500 bytes."""


Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """What lies at a path."""

    path: str
    file: File | None = None
    """None: it is a folder."""
    created_unix: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    context: str = ""
    """Whose bytes these are, for messages."""
    children: Callable[[], Iterable[Found]] = tuple
    """The entries of a folder, in the order of their names or numbers."""


@dataclass(frozen=True)
class _Committed:
    """A version or generation: from here on everything follows from its manifest."""

    path: str
    manifest: str
    created_unix: float
    context: str
    notes: Mapping[str, Any]


class _Trees:
    """The files of the versions and generations that were used last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[Folder, int]] = OrderedDict()
        self._num_files = 0
        watch(self)

    def get(self, manifest: str, build: Callable[[], Folder]) -> Folder:
        with self._lock:
            if manifest in self._known:
                self._known.move_to_end(manifest)
                return self._known[manifest][0]
        tree = build()  # two threads may both do this once; both results are the same
        num_files = _count(tree)
        with self._lock:
            if manifest not in self._known:
                self._known[manifest] = tree, num_files
                self._num_files += num_files
            while self._num_files > KEPT_FILES and len(self._known) > 1:
                self._num_files -= self._known.popitem(last=False)[1][1]
        return tree

    def forget_parent(self) -> None:
        """In a child of fork: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
        self._known = OrderedDict()
        self._num_files = 0


_trees: Final = _Trees()


class Tree:
    """The tree of one daemon, as it stands when a thing is looked at the first time.

    So an object of this class is for one operation: the next one makes its own. Not thread-safe;
    holds nothing open but the *client* that it is given.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked: dict[tuple[str, ...], Any] = {}

    def _once(self, key: tuple[str, ...], ask: Callable[[], Result]) -> Result:
        if key not in self._asked:
            self._asked[key] = ask()
        found: Result = self._asked[key]
        return found

    def _describe_dataset(self, name: str) -> datasets_pb2.Dataset:
        return self._once((DATASETS, name), lambda: self._client.describe_dataset(name))

    def _describe_run(
        self, run: str
    ) -> tuple[list[checkpoints_pb2.Attempt], list[checkpoints_pb2.Generation]]:
        return self._once((CHECKPOINTS, run), lambda: self._client.describe_run(run))

    def find(self, path: str) -> Found:
        """What lies at *path*: its names joined by ``/``, the root is empty.

        Raises NotFound, or what asking the daemon raises.
        """
        try:
            return self._find(path, path.split("/") if path else [])
        except InvalidRequest as error:  # a name that nothing can have
            raise NotFound(error.message) from error

    def without_latest(self, path: str) -> str:
        """*path* with the number that ``latest`` stands for now, if it is in there."""
        parts = path.split("/")
        if len(parts) < 3 or parts[2] != LATEST:
            return path
        found = self.find("/".join(parts[:3]))
        if parts[0] == DATASETS:
            number = str(found.notes["version"])
        else:
            number = f"{found.notes['attempt']}/{found.notes['step']}"
        return "/".join([*parts[:2], number, *parts[3:]])

    def _find(self, path: str, parts: Sequence[str]) -> Found:
        match parts:
            case []:
                return _folder(path, lambda: [self.find(DATASETS), self.find(CHECKPOINTS)])
            case ["datasets"]:
                return _folder(path, lambda: self._named(path, self._client.datasets()))
            case ["datasets", name]:
                return self._dataset(path, name)
            case ["datasets", name, version, *rest]:
                return self._inside(self._version(name, version), rest)
            case ["checkpoints"]:
                return _folder(
                    path, lambda: self._named(path, [run.run for run in self._client.runs()])
                )
            case ["checkpoints", run]:
                return self._run(path, run)
            case ["checkpoints", run, "latest", *rest]:
                return self._inside(self._latest(run), rest)
            case ["checkpoints", run, attempt]:
                return self._attempt(path, run, attempt)
            case ["checkpoints", run, attempt, step, *rest]:
                return self._inside(self._generation(run, attempt, step), rest)
        raise NotFound(f"there are {DATASETS}/ and {CHECKPOINTS}/, and not {path!r}")

    # Datasets.

    def _named(self, path: str, names: Iterable[str]) -> list[Found]:
        return [self._deferred(f"{path}/{name}") for name in names]

    def _deferred(self, path: str, created_unix: float | None = None) -> Found:
        """The folder at *path*, which is there; the daemon is asked when it is listed."""
        return _folder(path, lambda: self.find(path).children(), created_unix)

    def _dataset(self, path: str, name: str) -> Found:
        dataset = self._describe_dataset(name)
        versions = sorted(dataset.versions, key=lambda version: version.version)
        return _folder(
            path,
            lambda: [self._inside(_committed_version(path, version), []) for version in versions],
            versions[0].created_unix if versions else None,
        )

    def _version(self, name: str, number: str) -> _Committed:
        dataset = self._describe_dataset(name)
        by_number = {str(version.version): version for version in dataset.versions}
        if number == LATEST and by_number:
            found = max(dataset.versions, key=lambda version: version.version)
        elif number in by_number:
            found = by_number[number]
        else:
            raise NotFound(f"dataset {name!r} has no version {number!r}; it has {[*by_number]}")
        return _committed_version(f"{DATASETS}/{name}", found, number)

    # Checkpoints.

    def _run(self, path: str, run: str) -> Found:
        attempts, generations = self._describe_run(run)
        filled = {generation.attempt for generation in generations if _is_committed(generation)}
        created = {one.attempt: one.created_unix for one in attempts}

        def children() -> list[Found]:
            return [self._deferred(f"{path}/{one}", created.get(one)) for one in sorted(filled)]

        return _folder(path, children, min(created.values(), default=None))

    def _attempt(self, path: str, run: str, attempt: str) -> Found:
        number = _number("an attempt", attempt)
        attempts, generations = self._describe_run(run)
        found = sorted(
            (one for one in generations if one.attempt == number and _is_committed(one)),
            key=lambda one: one.step,
        )
        if not found:
            raise NotFound(f"run {run!r} has no generation of attempt {number}")
        created = [one.created_unix for one in attempts if one.attempt == number]
        return _folder(
            path,
            lambda: [self._inside(_committed_generation(path, one), []) for one in found],
            created[0] if created else None,
        )

    def _generation(self, run: str, attempt: str, step: str) -> _Committed:
        generation = GenerationId(
            check_name("run", run), _number("an attempt", attempt), _number("a step", step)
        )
        request = checkpoints_pb2.GetGenerationRequest(
            run=run, attempt=generation.attempt, step=generation.step
        )
        found = self._once(
            (CHECKPOINTS, run, attempt, step),
            lambda: self._client.channel.call(Checkpoints.GetGeneration, request),
        )
        if not _is_committed(found):
            raise NotFound(f"generation {generation} is not committed, it is {found.state}")
        return _committed_generation(f"{CHECKPOINTS}/{run}/{attempt}", found)

    def _latest(self, run: str) -> _Committed:
        request = checkpoints_pb2.ResolveGenerationRequest(
            run=check_name("run", run), selector=LATEST, timeout_seconds=LATEST_SECONDS
        )
        found = self._once(
            (CHECKPOINTS, run, LATEST),
            lambda: self._client.channel.call(
                Checkpoints.ResolveGeneration, request, timeout=LATEST_SECONDS + 10.0
            ),
        )
        return _committed_generation(f"{CHECKPOINTS}/{run}", found, LATEST)

    # Inside a version or a generation.

    def _inside(self, committed: _Committed, rest: Sequence[str]) -> Found:
        path = "/".join([committed.path, *rest])
        if not rest:  # its manifest is not read before it is listed

            def top() -> Iterable[Found]:
                return _children(self._tree(committed), path, committed)

            return _folder(path, top, committed.created_unix, committed.notes)
        node: File | Folder = self._tree(committed)
        for name in rest:
            if isinstance(node, File) or name not in node:
                raise NotFound(f"{committed.context} has no file {'/'.join(rest)!r}")
            node = node[name]
        return _found(node, path, committed)

    def _tree(self, committed: _Committed) -> Folder:
        return _trees.get(
            committed.manifest,
            lambda: build_tree(
                committed.manifest,
                self._client.read_manifest(committed.manifest),
                committed.context,
            ),
        )


def _folder(
    path: str,
    children: Callable[[], Iterable[Found]],
    created_unix: float | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Found:
    return Found(path, None, created_unix, notes or {}, "", children)


def _found(node: File | Folder, path: str, committed: _Committed) -> Found:
    if isinstance(node, File):
        return Found(path, node, committed.created_unix, node.notes, committed.context)
    return _folder(path, lambda: _children(node, path, committed), committed.created_unix)


def _children(folder: Folder, path: str, committed: _Committed) -> Iterable[Found]:
    return [_found(node, f"{path}/{name}", committed) for name, node in folder.items()]


def _committed_version(
    path: str, version: datasets_pb2.DatasetVersion, name: str = ""
) -> _Committed:
    return _Committed(
        f"{path}/{name or version.version}",
        version.manifest,
        version.created_unix,
        f"dataset {version.dataset} v{version.version}",
        {
            "version": version.version,
            "manifest": version.manifest,
            "rows": version.num_rows,
            "durability": version.durability,
        },
    )


def _committed_generation(
    path: str, generation: checkpoints_pb2.Generation, name: str = ""
) -> _Committed:
    return _Committed(
        f"{path}/{name or generation.step}",
        generation.manifest,
        generation.created_unix,
        f"generation {GenerationId(generation.run, generation.attempt, generation.step)}",
        {
            "attempt": generation.attempt,
            "step": generation.step,
            "manifest": generation.manifest,
            "durability": generation.durability,
        },
    )


def _is_committed(generation: checkpoints_pb2.Generation) -> bool:
    return generation.state == "committed"


def _number(kind: str, text: str) -> int:
    """*text* as the one way of writing a number: else one thing would have several paths."""
    is_number = text.isascii() and text.isdigit() and len(text) < 20 and str(int(text)) == text
    if not is_number or int(text) > LARGEST[kind]:
        raise NotFound(f"{text!r} is no number of {kind}")
    return int(text)


def _count(tree: Folder) -> int:
    return sum(1 if isinstance(node, File) else 1 + _count(node) for node in tree.values())
