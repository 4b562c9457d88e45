"""Opening: which copy of a blob a client gets, and that it is a good one."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import BlobLocation
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.quarantine import Quarantine
from forebay_server.serve.bring import Bringer
from forebay_server.serve.early import EarlyCopies, EarlyCopy, Fetch, Fetched, HeldWindow
from forebay_server.serve.holds import Hold, Holds
from forebay_server.serve.opened import (
    OpenedBlob,
    Reading,
    no_copy,
    opened_at,
    opened_sealed,
    reachable,
    reading,
)
from forebay_server.serve.origin import OriginContents
from forebay_server.serve.pieces import open_pieces
from forebay_server.serve.promote import (
    CachePolicy,
    Foreground,
    Place,
    Promoter,
    nobody,
    places_of,
)
from forebay_server.serve.shared import Shared
from forebay_server.serve.stream import SMALLEST_BYTES, Streams
from forebay_server.tier.course import doing
from forebay_server.tier.publication import DescriptorReader
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import read_table, verify_file
from forebay_wire.errors import (
    ForebayError,
    IntegrityError,
    NotFound,
    ResourceExhausted,
    StorageError,
)

logger = logging.getLogger(__name__)

MAX_CACHED_PLACES: Final = 1 << 16
"""Blobs whose place is remembered: about 30 MB."""

WINDOW_TIER: Final = "ram"


class Opener:
    """Opens blobs for clients, from the best good copy.

    ``open`` and ``report`` belong to the event loop; everything else may be called from any thread.
    ``close`` ends running fetches.
    """

    def __init__(
        self,
        tiers: Tiers,
        catalog: Catalog,
        holds: Holds | None = None,
        foreground: Foreground = nobody,
    ) -> None:
        """*foreground* surrounds what a client waits for."""
        self._tiers = tiers
        self._catalog = catalog
        self._holds = holds or Holds()
        self._promoter = Promoter(tiers, catalog, foreground)
        self.origins = OriginContents(tiers, catalog, self._promoter)
        self._listeners: list[Callable[[], object]] = []
        self.quarantine = Quarantine(tiers, catalog, forget=self.forget, changed=self._tell_changed)
        self.bringer = Bringer(tiers, catalog, self._promoter, self.quarantine)
        """Copies blobs for background work."""
        self._early = EarlyCopies(tiers, self._promoter, self._came)
        self.streams = Streams(tiers, self._promoter, foreground)
        """Large blobs on their way from slow tiers."""
        self._lock = threading.Lock()
        self._places: OrderedDict[str, Place] = OrderedDict()
        self._windows: dict[str, HeldWindow] = {}
        self._fetches: dict[str, Fetch] = {}
        self._checks: dict[Place, asyncio.Task[bool]] = {}
        self._num_opening: Counter[str] = Counter()
        self.num_opens: Counter[str] = Counter(hit=0, miss=0)
        """How many blobs were opened that a local tier has, and that it has not."""

    def listen(self, listener: Callable[[], object]) -> None:
        """Have *listener* called when damage that was found may have queued jobs."""
        self._listeners.append(listener)

    def follow(self, policy: CachePolicy) -> None:
        """Have *policy* say which fetched blobs are kept."""
        self._promoter.policy = policy

    async def close(self) -> None:
        """Cancel running fetches and let windows go. Idempotent."""
        tasks = [fetch.work.task for fetch in self._fetches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._checks.values(), return_exceptions=True)
        await self._early.settle()
        await self.origins.close()
        await self.streams.close()
        await self.quarantine.close()
        with self._lock:
            windows, self._windows = list(self._windows.values()), {}
        for held in windows:
            held.window.close()

    async def settle(self) -> None:
        """Wait until the copies that are read before they are durable are that, or have failed."""
        await self._early.settle()

    # ------------------------------------------------------------------------------------- open

    def open_cached(self, client: str, blobs: Sequence[str]) -> list[OpenedBlob] | None:
        """Open *blobs* if it is known where all of them lie; None: ask :meth:`open`.

        No SQL, no reading: for a replica that was opened before, its size is checked. Raises
        :class:`LimitExceeded` if *client* holds too much.
        """
        opened: list[OpenedBlob] = []
        try:
            with self._lock:
                for blob in blobs:
                    if (sealed := self._open_sealed(blob)) is not None:
                        opened.append(sealed)
                        continue
                    held = self._windows.get(blob)
                    if held is not None:
                        opened.append(self._open_window(held))
                        continue
                    early = self._early.get(blob)
                    if early is not None and (found := early.open()) is not None:
                        opened.append(found)
                        continue
                    place = self._places.get(blob)
                    if place is None:
                        return self._give_up(opened)
                    self._places.move_to_end(blob)
                    opened.append(self._open_place(place))
                self._hold(client, opened)
                self._note_hits(opened)
        except (IntegrityError, NotFound, StorageError):
            for blob in blobs[len(opened) : len(opened) + 1]:
                self.forget(blob)
            return self._give_up(opened)
        except BaseException:
            self._give_up(opened)
            raise
        return opened

    async def open(
        self,
        client: str,
        blobs: Sequence[str],
        plan: str = "",
        *,
        can_stream: bool = False,
        waits: dict[str, float] | None = None,
    ) -> list[OpenedBlob | ForebayError]:
        """Open *blobs* for *client*, which reads by *plan*: each one, or the reason why not.

        The first open of a replica checks its segment table and size; one that is damaged is
        quarantined and the next copy serves; where none is left, the quarantined ones are read
        again, as a tier that was away condemns what is good, and their repair is waited for. A
        blob that only the object tier has is fetched once, however many ask; a large one comes as a
        stream if the client *can_stream*, else without a descriptor, and not held open. *waits*
        gets what was waited for, reason to seconds. :class:`NotFound`, :class:`IntegrityError`,
        :class:`ResourceExhausted`, :class:`LimitExceeded`, :class:`StorageError`.
        """
        asking = Reading(plan, can_stream)
        reading.set(asking)  # the tasks below inherit it
        with asking.looking():
            located = await self._locate_unknown(blobs)
        tasks = [
            asyncio.create_task(self._open_or_error(client, blob, located.get(blob)))
            for blob in blobs
        ]
        try:
            results = list(await asyncio.gather(*tasks))
            self._promoter.policy.waited(plan, asking.waits)
            if waits is not None:
                waits.update(asking.waits)
            return results
        except BaseException:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, OpenedBlob):
                    result.close()
                    self.release(client, [result.blob])
            raise

    def release(self, client: str, blobs: Sequence[str]) -> None:
        """End one open of each of *blobs*; unknown ones are left out."""
        self._let_go(self._holds.remove(client, blobs))

    def close_client(self, client: str) -> None:
        """End all opens of *client*. Idempotent."""
        self._let_go(self._holds.remove_client(client))

    def ask_back(self, blobs: Sequence[str]) -> None:
        """Have the next answers to the clients that hold any of *blobs* open ask for them."""
        self._holds.ask_back(blobs)

    def asked_back(self, client: str) -> list[str]:
        """What *client* is to release soon, if it can; told once."""
        return self._holds.asked_back(client)

    def fetched_bytes(self) -> Counter[str]:
        """Tier to bytes that were read there for readers, and ahead of them, since the start."""
        return self._promoter.fetched_bytes + self.streams.read_bytes

    def waited(self, plan: str, seconds: Mapping[str, float]) -> None:
        """A reader of *plan* waited for bytes of a stream: reason to seconds."""
        self._promoter.policy.waited(plan, seconds)

    def open_bytes(self) -> dict[str, int]:
        """Tier to bytes of blobs that are open."""
        return self._holds.open_bytes()

    def take_uses(self) -> dict[str, float]:
        """Which blobs were used since the last call, and when, in Unix seconds."""
        return self._holds.take_uses()

    def is_open(self, blob: str) -> bool:
        """Whether any client has *blob* open, or is about to."""
        return self._holds.is_open(blob) or blob in self._fetches or self._num_opening[blob] > 0

    def forget(self, blob: str) -> None:
        """Ask the catalog again at the next open: a replica came, moved or goes."""
        with self._lock:
            self._places.pop(blob, None)

    # ----------------------------------------------------------------------------------- damage

    async def report(self, blob: str, tier: str, segment: int, message: str) -> bool:
        """A client found damage in segment *segment*: read that replica again, all of it.

        A bad one is quarantined. Returns whether the copy in *tier* is good now; False also if
        there is none any more. Reports of one replica that come meanwhile share its check.
        """
        logger.warning(
            "client reports damage: blob %s, tier %s, segment %d: %s", blob, tier, segment, message
        )
        if tier == WINDOW_TIER:
            in_slot = self._tiers.run(self._tiers.slots, self._tiers.sealed.check, blob)
            return await in_slot or await self._check_window(blob)
        location = (await self._catalog.locate([blob])).get(blob)
        places = places_of(location) if location is not None else []
        healthy = [await self._check_once(place) for place in places if place.tier == tier]
        return bool(healthy) and all(healthy)

    async def _check_once(self, place: Place) -> bool:
        task = self._checks.get(place)
        if task is None:
            task = asyncio.create_task(self._check(place), name=f"check-{place.blob}")
            self._checks[place] = task
            task.add_done_callback(lambda _: self._checks.pop(place, None))
        return await asyncio.shield(task)

    async def _check(self, place: Place) -> bool:
        try:
            await self.quarantine.verify(place.blob, place.tier, place.file, place.encoding)
        except (IntegrityError, NotFound) as error:
            await self._condemn(place, error)
            return False
        except StorageError as error:
            # Nothing is known about the replica; it cannot serve now.
            logger.warning("blob %s cannot be checked: %s", place.blob, error)
            self.forget(place.blob)
            return False
        return True

    async def return_good(self, blob: str) -> bool:
        """Have the good ones of the quarantined replicas of *blob* serve again; whether there is
        one."""
        return await self.quarantine.return_good(blob)

    async def _check_window(self, blob: str) -> bool:
        with self._lock:
            held = self._windows.get(blob)
            descriptor = held.window.open_read_only() if held is not None else -1
        if held is None:
            return False
        try:
            with DescriptorReader(descriptor, f"tier {WINDOW_TIER}") as reader:
                await self._tiers.run(self._tiers.slots, verify_file, reader, blob)
        except IntegrityError:
            with self._lock:
                if self._windows.get(blob) is held:
                    del self._windows[blob]
            held.window.close()
            return False
        return True

    async def _condemn(self, place: Place, error: ForebayError) -> None:
        await self.quarantine.condemn(place.blob, place.replica_id, place.tier, place.file, error)

    def _tell_changed(self) -> None:
        for listener in self._listeners:
            listener()

    # ------------------------------------------------------------------------- one blob, slowly

    async def _locate_unknown(self, blobs: Sequence[str]) -> dict[str, BlobLocation]:
        """One look into the catalog for all of *blobs* whose place is not remembered."""
        with self._lock:
            unknown = [
                blob for blob in blobs if blob not in self._places and blob not in self._windows
            ]
        return await self._catalog.locate(unknown) if unknown else {}

    async def _open_or_error(
        self, client: str, blob: str, located: BlobLocation | None
    ) -> OpenedBlob | ForebayError:
        with reading.get().waiting():
            try:
                cached = self.open_cached(client, [blob])
                if cached is not None:
                    return cached[0]
                if located is None and (content := await self.origins.content_of(blob)) is not None:
                    return await self._open_located(client, content, None)
                return await self._open_located(client, blob, located)
            except ForebayError as error:
                return error

    async def _open_located(
        self, client: str, blob: str, located: BlobLocation | None
    ) -> OpenedBlob:
        problems: list[ForebayError] = []
        opened = await self._open_any(client, blob, located, problems)
        if opened is None and await self.quarantine.serves_again(blob, problems):
            opened = await self._open_any(client, blob, None, problems)
        if opened is None:
            raise no_copy(blob, problems)
        return opened

    async def _open_any(
        self,
        client: str,
        blob: str,
        located: BlobLocation | None,
        problems: list[ForebayError],
    ) -> OpenedBlob | None:
        """Copies may move or go while we look: whatever failed is looked up once more."""
        tried: set[str] = set()
        for _ in range(2):
            if located is None:
                with doing("tier"):
                    located = (await self._catalog.locate([blob])).get(blob)
            if located is None:
                raise NotFound(
                    f"blob {blob} is not in the catalog: its version or generation was deleted, "
                    "or never committed"
                )
            places = [place for place in places_of(located) if place.replica_id not in tried]
            tried.update(place.replica_id for place in places)
            for place in reachable(self._tiers, places, problems):
                try:
                    return await self._open_copy(client, place)
                except (IntegrityError, NotFound) as error:
                    problems.append(error)
                    await self._condemn(place, error)
                except StorageError as error:
                    problems.append(error)
            located = None
        return None

    async def _open_copy(self, client: str, place: Place) -> OpenedBlob:
        tier = self._tiers.get(place.tier)
        asking = reading.get()
        if tier.kind == "object" or place.encoding not in (RAW, PIECES):
            is_streamed = place.num_bytes >= SMALLEST_BYTES and place.blob not in self._fetches
            if is_streamed and not asking.can_stream:
                return opened_at(place, place.tier, -1)  # the reader asks again, by HTTP
            self.num_opens["miss"] += 1
            self._promoter.policy.asked(asking.plan, place.blob)
            self._promoter.policy.read(place.blob, place.file_bytes)
            if is_streamed:
                return await self._open_stream(client, place)
            return await self._open_fetched(client, place)
        self._num_opening[place.blob] += 1
        try:
            opened = await self._tiers.run(tier, self._open_checked, place)
            kept = self._keep(client, place, opened)
            self._note_hits([kept])
            return kept
        finally:
            self._num_opening[place.blob] -= 1
            if not self._num_opening[place.blob]:
                del self._num_opening[place.blob]

    def _note_hits(self, opened: Sequence[OpenedBlob]) -> None:
        self.num_opens["hit"] += len(opened)
        for one in opened:
            self._promoter.policy.read(one.blob, one.length + one.table_length)

    async def _open_stream(self, client: str, place: Place) -> OpenedBlob:
        tier = self._tiers.get(place.tier)
        if tier.is_foreign:  # a stream that is shared would not see that the file has changed
            await self._tiers.run(tier, tier.head, place.file)
        stream = await self.streams.open(place)
        loop = asyncio.get_running_loop()

        def let_go() -> None:
            loop.call_soon_threadsafe(self.streams.release, stream)

        opened = opened_at(place, place.tier, -1)
        opened = replace(opened, stream=stream, let_go=let_go, plan=reading.get().plan)
        self._hold_or_close(client, opened)
        return opened

    async def _open_fetched(self, client: str, source: Place) -> OpenedBlob:
        fetch = self._fetches.get(source.blob)
        if fetch is None:
            if (early := self._early.get(source.blob)) and (opened := early.open()):
                self._hold_or_close(client, opened)
                return opened
            fetch = self._begin_fetch(source, self._fetch(source))
        fetch.num_waiting += 1
        try:
            found = await fetch.work.wait()
            with self._lock:
                opened = self._open_fetch(found)
                self._hold_or_close(client, opened)
            return opened
        finally:
            fetch.num_waiting -= 1
            self._end_fetch(source.blob)

    def _begin_fetch(self, source: Place, work: Coroutine[Any, Any, Fetched]) -> Fetch:
        fetch = self._fetches[source.blob] = Fetch(Shared(work, f"fetch-{source.blob}"))
        fetch.work.task.add_done_callback(lambda _: self._end_fetch(source.blob))
        return fetch

    async def bring_ahead(self, source: Place, tier: Tier) -> None:
        """Have the blob at *source* in *tier* before anybody asks for it; who asks meanwhile waits
        for this. Nothing if it is being fetched already."""
        if source.num_bytes >= SMALLEST_BYTES:
            await self.streams.copy(source)
            return
        found: Fetched | None = self._early.get(source.blob)
        if found is None and source.blob not in self._fetches:
            fetch = self._begin_fetch(source, self._fetch_ahead(source, tier))
            found = await fetch.work.wait()
        if isinstance(found, EarlyCopy):
            await asyncio.shield(found.published)

    async def _fetch_ahead(self, source: Place, tier: Tier) -> Fetched:
        try:
            return await self._early.begin(source, tier)
        except ResourceExhausted:
            if not self._fetches[source.blob].num_waiting:
                raise
            return await self._fetch(source)

    def _end_fetch(self, blob: str) -> None:
        """Forget a fetch that is done and that nobody waits for; its window goes if unused."""
        fetch = self._fetches.get(blob)
        if fetch is None or fetch.num_waiting or not fetch.work.task.done():
            return
        del self._fetches[blob]
        task = fetch.work.task
        if not task.cancelled():
            if (error := task.exception()) is not None:
                logger.info("blob %s was not fetched: %s", blob, error)
            elif isinstance(found := task.result(), EarlyCopy):
                found.close()
        self._drop_unused_window(blob)

    async def _fetch(self, source: Place) -> Fetched:
        found = await self._promoter.promote(source, self._early.begin)
        if isinstance(found, EarlyCopy):
            return found
        held = HeldWindow(source, found)
        with self._lock:
            self._windows[source.blob] = held
        return held

    # ------------------------------------------------------------------------------ descriptors

    def _open_place(self, place: Place) -> OpenedBlob:
        tier = self._tiers.get(place.tier)
        reader = tier.read(tier.blob_name(place.file))
        if reader.size_bytes != place.file_bytes:
            reader.close()
            raise IntegrityError(
                f"blob {place.blob} has {reader.size_bytes} bytes instead of {place.file_bytes} "
                f"({reader.where}); it is damaged"
            )
        return opened_at(place, place.tier, reader.detach())

    def _open_checked(self, place: Place) -> OpenedBlob:
        """Open, and check the table before anybody maps it."""
        if place.encoding == PIECES:
            return open_pieces(self._tiers.get(place.tier), place)
        opened = self._open_place(place)
        try:
            where = f"tier {place.tier}, file {place.file}"
            with DescriptorReader(os.dup(opened.fd), where) as reader:
                read_table(reader, place.blob)
        except BaseException:
            opened.close()
            raise
        return opened

    def _open_sealed(self, blob: str) -> OpenedBlob | None:
        """A blob that has not landed yet, in the slot that it was sealed in."""
        found = self._tiers.sealed.open(blob)
        return None if found is None else opened_sealed(blob, found, WINDOW_TIER)

    def _open_fetch(self, found: Fetched) -> OpenedBlob:
        """What was fetched, for one who has waited for it."""
        if isinstance(found, HeldWindow):
            return self._open_window(found)
        opened = found.open()
        assert opened is not None, "the fetch holds it"
        return opened

    def _open_window(self, held: HeldWindow) -> OpenedBlob:
        return opened_at(held.place, WINDOW_TIER, held.window.open_read_only())

    def _keep(self, client: str, place: Place, opened: OpenedBlob) -> OpenedBlob:
        """Remember where a good copy lies, and count it for *client*."""
        with self._lock:
            self._remember(place)
            self._hold_or_close(client, opened)
        return opened

    def _came(self, place: Place) -> None:
        with self._lock:
            self._remember(place)

    def _remember(self, place: Place) -> None:
        if place.encoding != RAW:  # others have to be decoded, or put together
            return
        self._places[place.blob] = place
        if len(self._places) > MAX_CACHED_PLACES:
            self._places.popitem(last=False)

    def _hold_or_close(self, client: str, opened: OpenedBlob) -> None:
        try:
            self._hold(client, [opened])
        except BaseException:
            opened.close()
            raise

    def _hold(self, client: str, opened: Sequence[OpenedBlob]) -> None:
        """Count; the lock is held, so that no window goes between opening and counting."""
        self._holds.add(
            client, [Hold(one.blob, one.tier, one.length, one.let_go) for one in opened]
        )
        for one in opened:
            if one.let_go is None and one.tier == WINDOW_TIER and one.blob in self._windows:
                self._windows[one.blob].num_holders += 1

    def _let_go(self, holds: Sequence[Hold]) -> None:
        for hold in holds:
            if hold.let_go is not None:
                hold.let_go()
                continue
            if hold.tier != WINDOW_TIER:
                continue
            with self._lock:
                if (held := self._windows.get(hold.blob)) is not None:
                    held.num_holders -= 1
            self._drop_unused_window(hold.blob)

    def _drop_unused_window(self, blob: str) -> None:
        with self._lock:
            held = self._windows.get(blob)
            if held is None or held.num_holders > 0 or blob in self._fetches:
                return
            del self._windows[blob]
        held.window.close()

    @staticmethod
    def _give_up(opened: Sequence[OpenedBlob]) -> None:
        for one in opened:
            one.close()
            if one.let_go is not None:
                one.let_go()
