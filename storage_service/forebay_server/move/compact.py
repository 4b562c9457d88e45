"""Makes files smaller of which most has been deleted: what is left of them moves to a new one.

Packs refer to pieces of the files of older ones. When those are deleted, their files stay for the
sake of the pieces. Once these are less than half of a file, they are copied, verified, into a new
one, and the rows and lists of all that refer to them are replaced in one transaction; manifests
never change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Final

import numpy as np

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import FileRef
from forebay_server.catalog.queries_compaction import (
    Compacted,
    Sharer,
    mostly_dead,
    replace_file,
    sharers_of,
)
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.move.budget import Budget
from forebay_server.move.jobs import Progress
from forebay_server.tier.encode import encode_into, open_plain, read_list
from forebay_server.tier.pieces import segments_of
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import read_table
from forebay_wire.errors import (
    Conflict,
    DaemonUnavailable,
    ForebayError,
    IntegrityError,
    ResourceExhausted,
)
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import new_random_name
from forebay_wire.segments import SegmentTable

logger = logging.getLogger(__name__)

LIVE_SHARE: Final = 0.5
"""A file of which this much or less is needed is compacted: a byte is copied at most once for each
time that what it lies with halves."""


class Compactor:
    """Handles jobs of the kind ``compact``. Idempotent; belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        budget: Budget,
        *,
        node: str = "",
        is_open: Callable[[str], bool] = lambda blob: False,
        forget: Callable[[str], object] = lambda blob: None,
    ) -> None:
        """*is_open* tells whether a client has a blob in hand, whose files stay as they are;
        *forget* is told the id of a blob whose replica was replaced."""
        self._catalog = catalog
        self._tiers = tiers
        self._budget = budget
        self._node = node
        self._is_open = is_open
        self._forget = forget
        self.freed_bytes = 0
        """Since the start."""

    async def __call__(self, progress: Progress) -> None:
        names = [tier.name for tier in self._tiers.landing]
        found = await self._catalog.read(
            lambda connection: mostly_dead(connection, names, LIVE_SHARE)
        )
        num_open = 0
        for ref in found:
            progress.advance(0)
            try:
                num_open += not await self._compact(ref, progress)
            except (IntegrityError, ResourceExhausted) as error:
                logger.warning("file %s in tier %s stays as it is: %s", ref.file, ref.tier, error)
        if num_open:
            raise Conflict(f"{num_open} files are open in clients: they are compacted later")

    async def _compact(self, ref: FileRef, progress: Progress) -> bool:
        """Compact one file; False if a client has something of it open."""
        sharers = await self._catalog.read(lambda connection: sharers_of(connection, ref.file))
        if not sharers:
            return True
        if any(self._is_open(one.blob) for one in sharers):
            return False
        tier = self._tiers.get(ref.tier)
        file = new_random_name()
        failpoint("compact.before_file")
        made: list[str] = []
        try:
            size, compacted = await self._tiers.run_moving(
                tier, self._write, tier, ref, file, sharers, made, progress
            )
            failpoint("compact.after_files")
        except Exception:
            await self._delete([FileRef(ref.tier, name) for name in made])
            raise
        try:
            gone = await self._replace(ref, file, size, compacted, progress)
        except Conflict:  # after anything else, a cancellation too, the rows may still come
            await self._delete([FileRef(ref.tier, name) for name in made])
            raise
        failpoint("compact.after_rows")
        for one in sharers:
            self._forget(one.blob)
        before = tier.space().used_bytes
        await self._delete(gone)
        self.freed_bytes += max(0, before - tier.space().used_bytes)
        failpoint("compact.after_delete")
        return True

    async def _replace(
        self,
        ref: FileRef,
        file: str,
        size: int,
        compacted: list[Compacted],
        progress: Progress,
    ) -> list[FileRef]:
        def change(connection: Connection) -> list[FileRef]:
            progress.guard(connection)
            gone = replace_file(connection, ref, file, size, compacted, node=self._node)
            failpoint("compact.inside_rows")
            return gone

        return await self._catalog.write(change)

    async def _delete(self, refs: list[FileRef]) -> None:
        for ref in refs:
            tier = self._tiers.get(ref.tier)
            try:
                await self._tiers.run(tier, tier.delete, tier.blob_name(ref.file))
            except DaemonUnavailable:
                raise
            except ForebayError as error:  # without a row it is garbage
                logger.warning("file %s stays in tier %s: %s", ref.file, ref.tier, error)

    # ------------------------------------------------------------ below: on a thread of the tier

    def _write(
        self,
        tier: Tier,
        ref: FileRef,
        file: str,
        sharers: list[Sharer],
        made: list[str],
        progress: Progress,
    ) -> tuple[int, list[Compacted]]:
        """Write what is needed of a file into *file*, and the new lists; *made* gets all names."""

        def advance(num_bytes: int) -> None:
            self._budget.take(tier.name, num_bytes, lambda: progress.advance(0))
            progress.advance(num_bytes)

        lists = [read_list(tier, one.list_file, one.blob) for one in sharers]
        with open_plain(tier, ref.file, RAW, None) as reader:
            table = read_table(reader, None)
            numbers = needed(table, lists, ref.file)
            own = segments_of(reader, table, numbers)
            made.append(file)
            stored = encode_into(own, tier, file, RAW, None, advance=advance)
        places = dict(zip(numbers, stored.table.offsets.tolist(), strict=False))
        compacted = []
        for sharer, found in zip(sharers, lists, strict=True):
            pieces = tuple(moved(found.extents, table, places, ref.file, file, stored.num_bytes))
            data = ObjectBlob(found.table, pieces, PIECES).encode()
            name = new_random_name()
            made.append(name)
            tier.put(name, data)
            compacted.append(Compacted(sharer, name, len(data), pieces))
        return stored.num_bytes, compacted


def needed(table: SegmentTable, lists: list[ObjectBlob], file: str) -> list[int]:
    """Numbers of the segments of *file*, which has *table*, that any of *lists* names."""
    wanted = np.zeros(table.num_segments, dtype=bool)
    for found in lists:
        for one in found.extents:
            if one.file == file:
                covered = table.covering(one.file_offset, one.num_bytes)
                wanted[covered.start : covered.stop] = True
    return [int(number) for number in np.flatnonzero(wanted)]


def moved(
    extents: tuple[ObjectExtent, ...],
    table: SegmentTable,
    places: dict[int, int],
    old: str,
    new: str,
    new_bytes: int,
) -> list[ObjectExtent]:
    """*extents* with the pieces of file *old*, which has *table*, in *new* instead, where *places*
    says for each segment; consecutive ones stay one piece."""
    found: list[ObjectExtent] = []
    offsets = table.offsets.tolist()
    for one in extents:
        if one.file != old:
            found.append(one)
            continue
        covered = table.covering(one.file_offset, one.num_bytes)
        # Needed segments keep their order, and those of one piece are all needed.
        starts = [places[number] for number in covered]
        sizes = [offsets[number + 1] - offsets[number] for number in covered]
        assert all(b - a == size for (a, b), size in zip(pairwise(starts), sizes, strict=False))
        skip = one.file_offset - offsets[covered.start]
        found.append(replace(one, file=new, file_offset=starts[0] + skip, file_bytes=new_bytes))
    return found
