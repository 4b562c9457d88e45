"""Readers that follow a dataset: which version an epoch reads, the same for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_decisions import (
    Choice,
    Decision,
    Question,
    decide,
    look,
    needs_renewal,
    renew,
)
from forebay_server.catalog.queries_objects import wanted_manifest
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.ids import check_id, check_name

KEEP_SECONDS: Final = 90 * 86400.0
"""A decision outlives the last time that anybody asked for it by half of this at least."""

MAX_READER_CHARACTERS: Final = 256

MAX_DATASETS: Final = 1024
"""Of a mixture that is followed."""


class Following:
    """Use cases of readers that have no gRPC, such as workers. Belongs to the event loop."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def look(self, asked: Question) -> Decision:
        """What the reader reads in that epoch; if nobody decided yet, what there is to propose.

        :class:`NotFound` and :class:`Conflict` where there is nothing (any more) to follow.
        """
        _check(asked)
        found, is_old = await self._catalog.read(
            lambda one: (look(one, asked), needs_renewal(one, asked, KEEP_SECONDS))
        )
        if found.is_decided and is_old:
            await self._catalog.write(lambda one: renew(one, asked, KEEP_SECONDS))
        return found

    async def decide(self, asked: Question, proposed: Sequence[Choice]) -> Decision:
        """What the reader reads in that epoch: what the first one proposed for all its datasets,
        for whoever asks later, on any node, after any restart."""
        _check(asked)
        if len(proposed) != len(asked.datasets):
            raise InvalidRequest("what is proposed is one choice for each dataset")
        for one in proposed:
            check_id("manifest", one.manifest)
        return await self._catalog.write(lambda one: decide(one, asked, proposed, KEEP_SECONDS))

    async def manifest(self, manifest: str) -> bytes:
        """Its bytes, not verified. :class:`NotFound` if what it made was deleted."""
        check_id("manifest", manifest)
        found = await self._catalog.read(lambda one: wanted_manifest(one, manifest))
        if found is None:
            raise NotFound(
                f"there is no manifest {manifest}: its dataset was deleted, or it was never "
                "committed here"
            )
        return found.data


def _check(asked: Question) -> None:
    if not 0 < len(asked.reader) <= MAX_READER_CHARACTERS:
        raise InvalidRequest(f"a reader has a name of 1 to {MAX_READER_CHARACTERS} characters")
    if not 0 < len(asked.datasets) <= MAX_DATASETS:
        raise InvalidRequest(f"a reader follows 1 to {MAX_DATASETS} datasets")
    for one in asked.datasets:
        check_name("dataset", one.dataset)
        if one.selection:
            check_name("selection", one.selection)
        check_id("manifest", one.base)
    if not 0 <= asked.epoch < 1 << 62:
        raise InvalidRequest(f"epoch {asked.epoch} is no number from 0 to 2^62")
