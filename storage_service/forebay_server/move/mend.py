"""Mends damaged files from good segments, wherever the catalog knows them.

A file of which segments are bad is written anew: its good segments, and for each bad one an equal
one (by BLAKE3) out of any other copy or pack. The new file is read back as a whole; then the rows
and lists of all that share the old one are replaced in one transaction. So the bytes that many
generations share are written once. What cannot be mended stays as it is, out of service.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import BlobLocation, insert_replica
from forebay_server.catalog.queries_damage import return_to_service
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_mending import (
    CopyRow,
    NewPlace,
    Replaced,
    copies_of_packs,
    holders_of,
    quarantined_holder,
    replace_holders,
)
from forebay_server.locks import NamedLocks
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.model.mending import Holder, HolderRow, NewFile, Segment, numbers_in_words
from forebay_server.move import holders
from forebay_server.move.budget import Budget
from forebay_server.move.jobs import Progress
from forebay_server.tier.encode import StoredFile, encode_into, open_plain
from forebay_server.tier.mended import MendedReader, SegmentFinder, is_at
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import copy_bytes, verify_file
from forebay_wire.errors import (
    Conflict,
    DaemonUnavailable,
    ForebayError,
    IntegrityError,
    NotFound,
    StorageError,
)
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import new_random_name
from forebay_wire.segments import SegmentTable

logger = logging.getLogger(__name__)

REMOVED: Final = "removed"
"""Key of the journal: ``[[tier, file], …]`` whose rows are gone."""

COPIES_AT_ONCE: Final = 16
"""Copies that are looked at in one call."""


Condemn = Callable[[str, str, str, str, ForebayError], Awaitable[None]]
"""Takes a replica out of service: blob, replica, tier, file, why."""


class Mender:
    """Belongs to the event loop; reads and writes on threads that move bytes. Idempotent."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        budget: Budget,
        locks: NamedLocks,
        condemn: Condemn,
        *,
        node: str = "",
        forget: Callable[[str], object] = lambda blob: None,
    ) -> None:
        """*locks* are shared with whoever repairs; *condemn* is told of what shares a damaged file
        and turns out to be lost, too; *forget* is told the id of a blob whose rows
        changed."""
        self._catalog = catalog
        self._tiers = tiers
        self._budget = budget
        self._locks = locks
        self._condemn = condemn
        self._node = node
        self._forget = forget

    async def mend(self, blob: str, tier: str, progress: Progress) -> None:
        """Have the quarantined copy of *blob* in the landing tier *tier* good again, and with it
        what shares its damaged files; nothing where one serves there.

        :class:`IntegrityError` names what is lost; :class:`StorageError` if a tier that may have it
        does not answer, :class:`ResourceExhausted` without room.
        """
        found = self._tiers.get(tier)
        looked_at: set[str] = set()
        while (row := await self._row(blob, tier)) is not None:
            file = next((one for one in row.files if one not in looked_at), None)
            if file is None:
                await self._serve_again(found, row, progress)
                return
            # Of several jobs for what shares a file the first one mends it for all.
            async with self._locks.hold(f"file {file}"):
                new_file = await self._mend_file(blob, found, file, progress)
            looked_at |= {file, new_file}

    async def rebuild(self, blob: str, progress: Progress) -> None:
        """Have a good copy of *blob*, which has none left, in a landing tier. Errors as
        :meth:`mend`."""
        location = (await self._catalog.locate([blob]))[blob]
        target = self._roomiest(location.num_bytes)
        table = await self._tiers.run_moving(target, holders.table_of, self._tiers, location)
        if table is None:
            raise IntegrityError(_lost(blob, "its segment table is bad in every copy"))
        whole = ObjectExtent(0, 0, table.total_bytes, 0, "", RAW)
        wanted = Holder("", blob, RAW, False, "", 0, (whole,), table)
        finder = self._finder([wanted], "", progress)
        await self._search(finder, target, blob, {blob: location}, {blob: table}, progress)
        if lost := wanted.lost(finder.found):
            self._check_asked(finder, blob)
            raise IntegrityError(
                _lost(blob, f"segments {numbers_in_words(lost)} are bad in every copy", finder)
            )
        new = NewFile(table, {})
        file = new_random_name()
        await self._make_room(target, copy_bytes(table))
        stored = await self._tiers.run_moving(
            target, self._write, target, file, new, finder, blob, target.encoding, progress
        )

        def enter(connection: Connection) -> None:
            progress.guard(connection)
            insert_replica(
                connection, blob, table.total_bytes, table.num_segments, target.name, file,
                stored.num_bytes, node=self._node, encoding=stored.encoding,
            )  # fmt: skip
            record(connection, f"blob {blob}", "repaired", f"{target.name}: put together anew")

        try:
            await self._catalog.write(enter)
        except Conflict:
            await self._delete(target, [file])
            raise
        self._forget(blob)

    def _roomiest(self, num_bytes: int) -> Tier:
        """The first landing tier with room for so many bytes; the first one if none has it."""
        fitting = (one for one in self._tiers.landing if one.space().free_bytes > num_bytes)
        return next(fitting, self._tiers.landing[0])

    async def unlink(self, progress: Progress) -> None:
        """Delete the files whose rows are gone. Names are never reused: this hits nothing else."""
        for tier, file in progress.journal.get(REMOVED, ()):
            found = self._tiers.get(tier)
            await self._tiers.run(found, found.delete, found.blob_name(file))

    # ----------------------------------------------------------------------------------- one file

    async def _row(self, blob: str, tier: str) -> HolderRow | None:
        return await self._catalog.read(
            lambda connection: quarantined_holder(connection, blob, tier, node=self._node)
        )

    async def _mend_file(self, blob: str, tier: Tier, file: str, progress: Progress) -> str:
        """Write *file* anew if *blob*'s part of it is bad; the new one's name, empty if it is
        good, or no longer what *blob* lies in."""
        rows = await self._catalog.read(
            lambda connection: holders_of(connection, tier.name, file, node=self._node)
        )
        mine_ids = {row.replica_id for row in rows if row.blob == blob and not row.is_live}
        if not mine_ids:
            return ""
        located = await self._catalog.locate([row.blob for row in rows])
        known = await self._tiers.run_moving(
            tier, holders.read_holders, self._tiers, tier, rows, located
        )
        mine = next((one for one in known if one.replica_id in mine_ids), None)
        if mine is None:
            raise IntegrityError(
                _lost(blob, f"its segment table is bad in tier {tier.name} and in every copy")
            )
        finder = self._finder(known, file, progress)
        is_whole, bad = await self._tiers.run_moving(
            tier, self._survey, tier, file, known, rows, finder
        )
        is_bad = any(one.offset in bad for one in mine.segments if one.file == file)
        if is_whole and not is_bad:
            return ""
        tables = {one.blob: one.table for one in known}
        await self._search(finder, tier, blob, located, tables, progress)
        whom, error = await self._settle(known, mine, tier, file, finder)
        if error is not None:
            raise error
        return await self._replace(tier, file, whom, finder, progress)

    async def _settle(
        self, known: Sequence[Holder], mine: Holder, tier: Tier, file: str, finder: SegmentFinder
    ) -> tuple[list[Holder], IntegrityError | None]:
        """Those that can be mended; and what to tell of *mine* if it is none of them. Others that
        are none go out of service: nobody is to rely on them."""
        whom: list[Holder] = []
        told: IntegrityError | None = None
        for one in known:
            lost = one.lost(finder.found, file)
            if not lost:
                whom.append(one)
                continue
            numbers = numbers_in_words(lost)
            what = f"in tier {tier.name}, file {file}, segments {numbers} are bad"
            error = IntegrityError(_lost(one.blob, what, finder))
            if one is mine:
                self._check_asked(finder, one.blob)
                told = error
            elif one.is_live and not finder.unread:
                await self._condemn(one.blob, one.replica_id, tier.name, file, error)
        return whom, told

    def _finder(self, whom: Iterable[Holder], file: str, progress: Progress) -> SegmentFinder:
        def advance(tier: str, num_bytes: int) -> None:
            progress.advance(0)
            self._budget.take(tier, num_bytes, lambda: progress.advance(0))

        wanted = {one.digest: one.num_bytes for holder in whom for one in holder.lost((), file)}
        return SegmentFinder(wanted, advance)

    async def _search(
        self,
        finder: SegmentFinder,
        tier: Tier,
        blob: str,
        located: Mapping[str, BlobLocation],
        tables: Mapping[str, SegmentTable],
        progress: Progress,
    ) -> None:
        """Look for what is missing: in other copies of the same blobs, then in other packs."""
        rows = [
            CopyRow(one.blob, copy.tier, copy.extents[0].file, copy.encoding)
            for one in located.values()
            for copy in one.replicas
        ]
        await self._look(finder, tier, rows, tables, progress)
        if finder.missing:
            more = await self._catalog.read(lambda connection: copies_of_packs(connection, blob))
            await self._look(finder, tier, more, tables, progress)

    async def _look(
        self,
        finder: SegmentFinder,
        tier: Tier,
        rows: Sequence[CopyRow],
        tables: Mapping[str, SegmentTable],
        progress: Progress,
    ) -> None:
        names = {one.name for one in self._tiers.own}
        here = [row for row in rows if row.tier in names]
        for start in range(0, len(here), COPIES_AT_ONCE):
            if not finder.missing:
                return
            progress.advance(0)
            part = here[start : start + COPIES_AT_ONCE]
            await self._tiers.run_moving(tier, self._look_in, finder, part, tables)

    async def _replace(
        self,
        tier: Tier,
        file: str,
        whom: Sequence[Holder],
        finder: SegmentFinder,
        progress: Progress,
    ) -> str:
        """Have a new file take the place of *file* for all of *whom*; its name."""
        new = NewFile.of(whom, file)
        name = new_random_name()
        await self._make_room(tier, copy_bytes(new.table))
        made = [name]
        failpoint("mend.before_file")
        try:
            stored, places = await self._tiers.run_moving(
                tier, self._write_all, tier, file, name, new, whom, finder, made, progress
            )
        except Exception:
            await self._delete(tier, made)
            raise
        failpoint("mend.after_files")
        why = f"file {file} was damaged, {name} has what it had"
        await self._enter(tier, name, stored.num_bytes, places, made, why, progress)
        return name

    async def _serve_again(self, tier: Tier, row: HolderRow, progress: Progress) -> None:
        """Have a replica serve whose files were all found to be good; with a new list if only that
        was bad."""
        located = await self._catalog.locate([row.blob])
        table = await self._tiers.run_moving(tier, holders.own_table, tier, row)
        if table is not None:

            def serve(connection: Connection) -> None:
                progress.guard(connection)
                return_to_service(connection, row.replica_id)

            await self._catalog.write(serve)
            self._forget(row.blob)
            return
        known = await self._tiers.run_moving(
            tier, holders.read_holders, self._tiers, tier, [row], located
        )
        if not known or row.encoding != PIECES:
            raise Conflict(
                f"blob {row.blob} has changed in tier {tier.name}: it is looked at again"
            )
        made: list[str] = []
        place = await self._tiers.run_moving(
            tier, _put_list, tier, known[0], row.extents, True, made
        )
        await self._enter(tier, "", 0, [place], made, "its extent list was damaged", progress)

    async def _enter(
        self,
        tier: Tier,
        file: str,
        num_bytes: int,
        places: Sequence[NewPlace],
        made: Sequence[str],
        why: str,
        progress: Progress,
    ) -> None:
        """The new rows for the old ones; then what nothing names any more is deleted."""

        def change(connection: Connection) -> Replaced:
            replaced = replace_holders(
                connection, tier.name, file, num_bytes, places, why, node=self._node
            )
            progress.note(connection, {REMOVED: [[ref.tier, ref.file] for ref in replaced.gone]})
            failpoint("mend.inside_rows")
            return replaced

        try:
            replaced = await self._catalog.write(change)
        except Conflict:  # whatever else it is, the rows may have come: at worst it is garbage
            await self._delete(tier, made)
            raise
        failpoint("mend.after_rows")
        for blob in replaced.moved:
            self._forget(blob)
        if replaced.repaired:
            logger.warning(
                "tier %s: %s; blobs that serve again: %s",
                tier.name,
                why,
                ", ".join(replaced.repaired),
            )
        await self.unlink(progress)
        failpoint("mend.after_unlink")

    def _check_asked(self, finder: SegmentFinder, blob: str) -> None:
        if finder.unread:
            raise StorageError(
                f"blob {blob} has no good copy left that answers, and not all do: {finder.unread}"
            )

    async def _make_room(self, tier: Tier, num_bytes: int) -> None:
        missing = num_bytes - tier.space().free_bytes
        if missing > 0:
            await self._tiers.relieve(tier, missing)

    async def _delete(self, tier: Tier, names: Sequence[str]) -> None:
        for name in names:
            try:
                await self._tiers.run(tier, tier.delete, tier.blob_name(name))
            except DaemonUnavailable:
                raise
            except ForebayError as error:  # without a row it is garbage
                logger.warning("file %s stays in tier %s: %s", name, tier.name, error)

    # ------------------------------------------------------------ below: on a thread of the tier

    def _survey(
        self,
        tier: Tier,
        file: str,
        whom: Sequence[Holder],
        rows: Sequence[HolderRow],
        finder: SegmentFinder,
    ) -> tuple[bool, frozenset[int]]:
        """Read what *whom* need of *file*, as its medium has it; whether it has its size and, where
        it is all of a blob, that one's table; and the offsets of segments that are bad."""
        encoding = next((one.encoding for one in whom if one.is_whole), RAW)
        segments = [one for holder in whom for one in holder.segments if one.file == file]
        bad = finder.survey(tier, file, encoding, segments)
        finder.look_in_file(tier, file, encoding, segments)
        is_whole = tier.head(tier.blob_name(file)) == _size_of(rows, file) and all(
            row.encoding == PIECES or holders.own_table(tier, row) is not None for row in rows
        )
        return is_whole, bad

    def _look_in(
        self, finder: SegmentFinder, rows: Sequence[CopyRow], tables: Mapping[str, SegmentTable]
    ) -> None:
        for row in rows:
            table = tables.get(row.blob)
            finder.look_in_copy(self._tiers.get(row.tier), row.file, row.encoding, row.blob, table)

    def _write_all(
        self,
        tier: Tier,
        old: str,
        file: str,
        new: NewFile,
        whom: Sequence[Holder],
        finder: SegmentFinder,
        made: list[str],
        progress: Progress,
    ) -> tuple[StoredFile, list[NewPlace]]:
        """Write the new file and the new lists, all durable; *made* gets the lists' names."""
        whole = next((one for one in whom if one.is_whole), None)
        setting = RAW if whole is None or whole.encoding == RAW else tier.encoding
        blob = None if whole is None else whole.blob
        stored = self._write(tier, file, new, finder, blob, setting, progress)
        places = []
        for one in whom:
            if one.is_whole:
                extent = ObjectExtent(0, 0, new.table.total_bytes, stored.num_bytes, file)
                places.append(
                    NewPlace(one.replica_id, one.blob, stored.encoding, "", 0, (extent,), True)
                )
                continue
            pieces = new.pieces(one, old, file, stored.num_bytes)
            is_good = one.is_live or _is_good_beside(tier, one, old, progress)
            places.append(_put_list(tier, one, pieces, is_good, made))
        return stored, places

    def _write(
        self,
        tier: Tier,
        file: str,
        new: NewFile,
        finder: SegmentFinder,
        blob: str | None,
        setting: str,
        progress: Progress,
    ) -> StoredFile:
        """Write the new file, durably, and read it back."""

        def advance(num_bytes: int) -> None:
            self._budget.take(tier.name, num_bytes, lambda: progress.advance(0))
            progress.advance(num_bytes)

        progress.plan(progress.done_bytes + new.table.total_bytes)
        with MendedReader(
            new.table, finder.found, f"what is mended for tier {tier.name}"
        ) as source:
            stored = encode_into(source, tier, file, setting, blob, advance=advance)
        try:
            with open_plain(tier, file, stored.encoding, blob) as reader:
                verify_file(reader, stored.table.blob_id)
        except (IntegrityError, NotFound) as error:
            tier.delete(tier.blob_name(file))
            raise StorageError(
                f"what was just written into tier {tier.name} reads back wrong: {error}"
            ) from error
        return stored


def _put_list(
    tier: Tier, holder: Holder, pieces: Sequence[ObjectExtent], is_good: bool, made: list[str]
) -> NewPlace:
    name = new_random_name()
    data = ObjectBlob(holder.table, tuple(pieces), PIECES).encode()
    made.append(name)
    tier.put(name, data)
    return NewPlace(holder.replica_id, holder.blob, PIECES, name, len(data), tuple(pieces), is_good)


def _is_good_beside(tier: Tier, holder: Holder, file: str, progress: Progress) -> bool:
    """Whether all of *holder* that does not lie in *file* is good."""
    by_file: dict[str, list[Segment]] = {}
    for one in holder.segments:
        if one.file != file:
            by_file.setdefault(one.file, []).append(one)
    try:
        for name, segments in by_file.items():
            with open_plain(tier, name, RAW, None, read=tier.read_medium) as reader:
                for one in segments:
                    progress.advance(0)
                    if not is_at(reader, one, one.offset):
                        return False
    except (IntegrityError, NotFound):
        return False
    return True


def _size_of(rows: Sequence[HolderRow], file: str) -> int | None:
    sizes = (one.file_bytes for row in rows for one in row.extents if one.file == file)
    return next(sizes, None)


def _lost(blob: str, what: str, finder: SegmentFinder | None = None) -> str:
    looked = "" if finder is None else f", and none of {finder.num_copies} copies has equal ones"
    return (
        f"blob {blob} has no good copy left: {what}{looked}. Nothing of it is deleted: give a lost "
        "tier back and it is tried again, restore another generation or version, or delete what "
        f"names it (`forebay why {blob}` tells)"
    )
