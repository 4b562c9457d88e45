"""Which of the manifests found in an object tier belong together, and which are of something older.

What was deleted and made again under the same name may have left manifests there: their deletion
was interrupted, or the tier was away. The stamps tell the two apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from forebay_wire.manifest import (
    AnyManifest,
    DatasetManifest,
    GenerationManifest,
    SelectionManifest,
    Stamp,
    StatisticsManifest,
)


class Candidate(Protocol):
    """A whole manifest: it is undamaged, and so is what it names."""

    @property
    def identity(self) -> str: ...
    @property
    def manifest(self) -> AnyManifest: ...
    @property
    def stamp(self) -> Stamp: ...


C = TypeVar("C", bound=Candidate)


@dataclass
class Choice(Generic[C]):
    """What is kept, in an order in which it can be restored, and what is not, with the reason."""

    kept: list[C] = field(default_factory=list)
    left_out: list[tuple[C, str]] = field(default_factory=list)


def choose(candidates: Iterable[C]) -> Choice[C]:
    """Keep of each name what was begun last and has anything whole; the rest is left out.

    Of a dataset that is the chain of versions that the last committed one stands on, with their
    selections and statistics; a version of which nothing whole was found is a gap in it. Of a
    run it is the last committed generation of each step.
    """
    versions: dict[str, list[C]] = defaultdict(list)
    selections: list[C] = []
    statistics: list[C] = []
    generations: dict[str, list[C]] = defaultdict(list)
    for one in candidates:
        if isinstance(one.manifest, DatasetManifest):
            versions[one.manifest.dataset].append(one)
        elif isinstance(one.manifest, SelectionManifest):
            selections.append(one)
        elif isinstance(one.manifest, StatisticsManifest):
            statistics.append(one)
        else:
            generations[one.manifest.run].append(one)
    choice = Choice[C]()
    begun = {name: _choose_versions(versions[name], choice) for name in sorted(versions)}
    _choose_selections(selections, begun, choice)
    _choose_statistics(statistics, begun, choice)
    for run in sorted(generations):
        _choose_generations(generations[run], choice)
    return choice


def _newest_first(found: Sequence[C]) -> list[C]:
    """By stamp; the identity decides between equal ones, which no one catalog makes."""
    return sorted(
        found,
        key=lambda one: (one.stamp.begun_ns, one.stamp.committed_ns, one.identity),
        reverse=True,
    )


# ---------------------------------------------------------------------------------------- datasets


def _choose_versions(found: Sequence[C], choice: Choice[C]) -> int:
    """When the dataset that is kept was begun."""
    head, *others = _newest_first(found)
    chain = [head]
    for other in others:
        if other.stamp.begun_ns != head.stamp.begun_ns:
            choice.left_out.append((other, _made_again("dataset", _dataset(other).dataset)))
        elif _stands_on(chain[-1], other):
            chain.append(other)
        else:
            choice.left_out.append(
                (other, f"version {_dataset(head).version}, committed later, does not stand on it")
            )
    choice.kept.extend(reversed(chain))
    return head.stamp.begun_ns


def _stands_on(upper: C, lower: C) -> bool:
    """Whether *upper* was appended to *lower*, at once or with versions between that are lost."""
    above, below = _dataset(upper), _dataset(lower)
    if above.version == below.version + 1:
        return above.parent == lower.identity
    # Every version names all shards of those before it.
    return above.version > below.version and (above.shards[: len(below.shards)] == below.shards)


def _dataset(one: Candidate) -> DatasetManifest:
    assert isinstance(one.manifest, DatasetManifest)
    return one.manifest


def _choose_selections(found: Sequence[C], begun: dict[str, int], choice: Choice[C]) -> None:
    """Those of a dataset of which no version is whole are kept, for whoever restores to refuse."""

    def turn(one: C) -> tuple[str, int, str]:
        manifest = one.manifest
        assert isinstance(manifest, SelectionManifest)
        return (manifest.dataset, manifest.version, manifest.name)

    for one in sorted(_newest_first(found), key=turn):
        dataset = turn(one)[0]
        if one.stamp.begun_ns != begun.get(dataset, one.stamp.begun_ns):
            choice.left_out.append((one, _made_again("dataset", dataset)))
        else:
            choice.kept.append(one)


def _choose_statistics(found: Sequence[C], begun: dict[str, int], choice: Choice[C]) -> None:
    """Behind the selections that they may be of; of a dataset without a whole version as those."""
    for one in reversed(_newest_first(found)):
        assert isinstance(one.manifest, StatisticsManifest)
        dataset = one.manifest.dataset
        if one.stamp.begun_ns != begun.get(dataset, one.stamp.begun_ns):
            choice.left_out.append((one, _made_again("dataset", dataset)))
        else:
            choice.kept.append(one)


# --------------------------------------------------------------------------------------------- runs


def _choose_generations(found: Sequence[C], choice: Choice[C]) -> None:
    newest, *_ = ordered = _newest_first(found)
    kept: dict[tuple[int, int], C] = {}
    for one in ordered:
        manifest = one.manifest
        assert isinstance(manifest, GenerationManifest)
        if one.stamp.begun_ns != newest.stamp.begun_ns:
            choice.left_out.append((one, _made_again("run", manifest.run)))
        elif kept.setdefault((manifest.attempt, manifest.step), one) is not one:
            choice.left_out.append((one, "the step was saved again later"))
    choice.kept.extend(kept[point] for point in sorted(kept))


def _made_again(kind: str, name: str) -> str:
    return f"it belongs to an older {kind} {name}: that was deleted, and made again later"
