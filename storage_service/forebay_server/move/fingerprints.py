"""The fingerprint job: figures of each tensor of a checkpoint, after its commit, for nobody waits.

The target is a manifest. Packs are read one after the other with every byte checked, a segment at a
time; each one's figures are kept when it is done, so the job goes on behind the last one after an
interruption. Parts whose segments an earlier generation of the run has are not read: they have
the figures that they had there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from forebay_server.catalog import queries_fingerprints as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_manifests import read_manifest
from forebay_server.model.fingerprint import FingerprintBuilder, extent_key
from forebay_server.move.budget import Budget
from forebay_server.move.jobs import Progress
from forebay_server.tier.store import TierReader
from forebay_server.tier.verify import checked_ranges, read_table
from forebay_wire.dtypes import kind_of
from forebay_wire.errors import IntegrityError, InvalidRequest
from forebay_wire.fingerprint import Fingerprint, decode_fingerprints, encode_fingerprints
from forebay_wire.ids import GenerationId
from forebay_wire.manifest import GenerationManifest, PackRef, parse

T = TypeVar("T")

ALL_TIERS: Final = "all"
STEP_BACK_SECONDS: Final = 1.0
"""The longest that one segment waits for saves that land."""
LOOK_SECONDS: Final = 0.02


class BlobReader(Protocol):
    """What is needed of :class:`forebay_server.serve.bring.Bringer`."""

    async def read(self, blob: str, use: Callable[[str, TierReader], T]) -> T | None:
        """What *use* makes, on a thread, of the tier and the raw image of a good copy of *blob*;
        None if the blob is gone."""
        ...


@dataclass(frozen=True)
class _Extent:
    """Bytes of a pack that are a part of some tensor; of two tied ones the same."""

    offset: int
    num_bytes: int
    dtype: str


class Fingerprints:
    """Handles jobs of the kind ``fingerprint``. Idempotent. Belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        reader: BlobReader,
        budget: Budget,
        *,
        bytes_per_second: float = 0,
        is_landing: Callable[[], bool] = lambda: False,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        """*bytes_per_second* holds for what nobody waits for; 0: nothing is done unless somebody
        asks for it. *is_landing*: whether uploads become durable, for which it steps back. *wake*
        is called when a job was queued."""
        self._catalog = catalog
        self._reader = reader
        self._budget = budget
        self._rate = Budget({ALL_TIERS: bytes_per_second})
        self._is_idle = bytes_per_second == 0
        self._is_landing = is_landing
        self._wake = wake

    async def read(
        self, generation: GenerationId, rank: int, offset: int, limit: int
    ) -> queries.Kept:
        """A piece of what is kept of one pack. :class:`NotFound`."""
        return await self._catalog.read(
            lambda connection: queries.read_fingerprints(
                connection, generation, rank, offset, limit
            )
        )

    async def ask(self, generation: GenerationId) -> None:
        """Have the fingerprints computed now, if they are not kept. Idempotent."""
        await self._catalog.write(
            lambda connection: queries.ask_for_fingerprints(connection, generation)
        )
        self._wake()

    async def __call__(self, progress: Progress) -> None:
        manifest = await self._manifest(progress.target)
        if manifest is None or (self._is_idle and not progress.priority):
            return
        done = await self._catalog.read(
            lambda connection: queries.ranks_done(connection, progress.target)
        )
        packs = [pack for pack in manifest.packs if pack.rank not in done]
        progress.plan(sum(pack.num_bytes for pack in packs))
        known = await self._known(manifest.run, progress.target) if packs else {}
        for pack in packs:
            found = await self._look(pack, known, progress)
            if found is None:
                return  # deleted meanwhile
            data = encode_fingerprints(found)

            def keep(connection: Connection, rank: int = pack.rank, data: bytes = data) -> None:
                progress.guard(connection)
                queries.keep_fingerprints(connection, progress.target, rank, data)

            await self._catalog.write(keep)

    def _step_back(self, check: Callable[[], object]) -> None:
        """On a thread, before each segment: wait while a save lands, but never for ever."""
        until = time.monotonic() + STEP_BACK_SECONDS
        while self._is_landing() and time.monotonic() < until:
            check()
            time.sleep(LOOK_SECONDS)

    async def _manifest(self, target: str) -> GenerationManifest | None:
        data = await self._catalog.read(lambda connection: read_manifest(connection, target))
        if data is None:
            return None
        found = parse(data, f"manifest {target}", target)
        return found if isinstance(found, GenerationManifest) else None

    async def _known(self, run: str, target: str) -> dict[bytes, Fingerprint]:
        """Key to figures, of the newest generation that has some."""
        kept = await self._catalog.read(
            lambda connection: queries.latest_fingerprints(connection, run, target)
        )
        found: dict[bytes, Fingerprint] = {}
        for data in kept:
            try:
                found.update((one.key, one) for one in decode_fingerprints(data, f"run {run}"))
            except IntegrityError:
                continue  # then they are computed
        return found

    async def _look(
        self, pack: PackRef, known: Mapping[bytes, Fingerprint], progress: Progress
    ) -> list[Fingerprint] | None:
        extents = extents_of(pack)
        before = progress.done_bytes

        def pace(tier: str, num_bytes: int) -> None:
            def check() -> None:
                progress.advance(0)

            self._budget.take(tier, num_bytes, check)
            if not progress.priority:
                self._rate.take(ALL_TIERS, num_bytes, check)
                self._step_back(check)
            progress.advance(num_bytes)

        def use(tier: str, reader: TierReader) -> dict[_Extent, Fingerprint]:
            return look(reader, pack.blob, set(extents), known, lambda size: pace(tier, size))

        if not pack.num_bytes:
            empty = {one: FingerprintBuilder(bytes(16), one.dtype).finish() for one in extents}
            return [empty[one] for one in extents]
        found = await self._reader.read(pack.blob, use)
        if found is None:
            return None
        progress.advance(max(0, before + pack.num_bytes - progress.done_bytes))
        return [found[one] for one in extents]


def extents_of(pack: PackRef) -> list[_Extent]:
    """Where the pack's tensors lie, in the order of its description. :class:`InvalidRequest` for a
    description that says no such thing."""
    found = []
    try:
        for entry in pack.description.get("tensors", []):
            offset, num_bytes = entry["at"]
            found.append(_Extent(int(offset), int(num_bytes), str(entry["dtype"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"the description of rank {pack.rank}'s pack names no tensors: {error!r}"
        ) from error
    for one in found:
        kind = kind_of(one.dtype)
        if kind is not None and one.num_bytes % kind.item_bytes:
            raise InvalidRequest(
                f"{one.num_bytes} bytes are no numbers of {one.dtype} (pack of rank {pack.rank})"
            )
    return found


def look(
    reader: TierReader,
    blob: str,
    extents: Iterable[_Extent],
    known: Mapping[bytes, Fingerprint],
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> dict[_Extent, Fingerprint]:
    """The figures of *extents* of a blob, on a thread; bytes are read only of what is not *known*.

    Memory: one segment. *advance* is told bytes before they are looked at; it may wait, or raise to
    end it. :class:`IntegrityError` if a segment does not match its BLAKE3.
    """
    table = read_table(reader, blob)
    found: dict[_Extent, Fingerprint] = {}
    todo: list[tuple[_Extent, bytes]] = []
    for one in sorted(extents, key=lambda one: (one.offset, one.num_bytes, one.dtype)):
        key = extent_key(one.dtype, one.offset, one.num_bytes, table)
        if key in known:
            found[one] = known[key]
        elif one.num_bytes:
            todo.append((one, key))
        else:
            found[one] = FingerprintBuilder(key, one.dtype).finish()
    wanted = _segments([table.covering(one.offset, one.num_bytes) for one, _ in todo])
    # A builder has some memory: only those of the parts within the piece are there.
    building: dict[_Extent, FingerprintBuilder] = {}
    following = 0
    for start, piece in checked_ranges(reader, table, wanted):
        advance(len(piece))
        stop = start + len(piece)
        for one in list(building):
            _feed(one, start, piece, building, found)
        while following < len(todo) and todo[following][0].offset < stop:
            one, key = todo[following]
            following += 1
            building[one] = FingerprintBuilder(key, one.dtype)
            _feed(one, start, piece, building, found)
    return found


def _feed(
    one: _Extent,
    start: int,
    piece: memoryview,
    building: dict[_Extent, FingerprintBuilder],
    found: dict[_Extent, Fingerprint],
) -> None:
    """Look at what the *piece* at *start* has of a part; its figures are *found* at its end."""
    end, stop = one.offset + one.num_bytes, start + len(piece)
    building[one].update(piece[max(one.offset, start) - start : min(end, stop) - start])
    if end <= stop:
        found[one] = building.pop(one).finish()


def _segments(covering: Sequence[range]) -> list[range]:
    """Ranges of segments, as a list without overlaps, in order."""
    found: list[range] = []
    for one in covering:  # by their first segment
        if not len(one):
            continue
        if found and one.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, one.stop))
        else:
            found.append(one)
    return found
