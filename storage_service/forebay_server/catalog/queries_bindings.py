"""Which generations stand on a dataset: their loaders go on in a version of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, select

from forebay_server.catalog.tables import generations, versions
from forebay_server.model.states import GenerationState
from forebay_wire.errors import Conflict
from forebay_wire.ids import GenerationId

MAX_NAMED: Final = 5
"""Generations that a message names."""


@dataclass(frozen=True)
class Standing:
    """A committed generation and the version that its loader read."""

    generation: GenerationId
    version: int


def generations_on(connection: Connection, dataset: str, version: int = 0) -> list[Standing]:
    """The committed generations that stand on *dataset* (0: on any version of it), oldest first.

    They name versions by manifest: of a dataset that was deleted and made again only what is equal
    counts.
    """
    known = {
        row.manifest: row.version
        for row in connection.execute(select(versions).where(versions.c.dataset == dataset))
    }
    name = json.dumps(dataset)
    rows = connection.execute(
        select(generations)
        .where(
            generations.c.state == GenerationState.COMMITTED,
            generations.c.dataset.contains(name, autoescape=True),
        )
        .order_by(generations.c.run, generations.c.attempt, generations.c.step)
    )
    found = []
    for row in rows:
        for said in _named(json.loads(row.dataset)):
            number = known.get(said.get("manifest", ""))
            if said["dataset"] == dataset and number and version in (0, number):
                found.append(Standing(GenerationId(row.run, row.attempt, row.step), number))
                break
    return found


def check_nothing_stands_on(connection: Connection, dataset: str) -> None:
    """:class:`Conflict` naming the generations that stand on *dataset*."""
    found = generations_on(connection, dataset)
    if not found:
        return
    some = ", ".join(f"{one.generation} (version {one.version})" for one in found[:MAX_NAMED])
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    raise Conflict(
        f"{len(found)} committed generation{'s stand' if len(found) > 1 else ' stands'} on dataset "
        f"{dataset}: {some}{more}. Without it their loaders cannot go on where they were: delete "
        "those generations first, or delete the dataset all the same with force"
    )


def _named(value: Any) -> Iterator[dict[str, Any]]:
    """The versions that a loader's state names: one, or those of a mixture."""
    if isinstance(value, dict):
        if isinstance(value.get("dataset"), str) and isinstance(value.get("manifest"), str):
            yield value
        if value.get("kind") == "mixture":
            for dataset, _, manifests in value["datasets"].values():
                yield {"dataset": dataset, "manifest": manifests.partition("/")[0]}
        for inner in value.values():
            yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)
