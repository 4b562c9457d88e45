"""Finds a tier for what an upload brings, and another one if that fails in the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_uploads import move_upload
from forebay_server.model.sharing import Placed
from forebay_server.publish.landing import BlobLanding, PublishedBlob, expected_file_bytes
from forebay_server.publish.session import Piece, Session
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_wire.errors import ForebayError, ResourceExhausted, StorageError
from forebay_wire.ids import new_random_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

Known = Callable[[Tier], Awaitable[Mapping[bytes, Placed]]]
"""What lies in a tier already: BLAKE3 of a segment to its place."""


async def begin_landing(
    tiers: Tiers,
    file: str,
    data_bytes: int,
    writing: ThreadPoolExecutor,
    *,
    minimum_bytes: int = 0,
    new_bytes: int = 0,
    without: Sequence[Tier] = (),
    order: Sequence[str] = (),
    may_relieve: bool = True,
) -> tuple[Tier, BlobLanding, int]:
    """A landing in the best tier that has room for *data_bytes*, those in *without* left out; and
    for how many bytes it has room: where no tier has it for all, for less, *minimum_bytes* at
    least unless they are 0. A tier that has no room for all, and has it for *new_bytes*, will do,
    unless these are 0. *order*: kinds of tiers, best first; kinds that it does not name come last.
    Only if it *may_relieve* them, what tiers hold of others goes first where there is no room.

    :class:`ResourceExhausted` with the numbers of all if none has; :class:`StorageError` if all
    fail.
    """
    while True:
        try:
            sizes = [data_bytes, new_bytes] if 0 < new_bytes < data_bytes else [data_bytes]
            tier, landing = await _begin_somewhere(
                tiers, file, sizes, writing, without, order, may_relieve
            )
        except ResourceExhausted:
            if not 0 < minimum_bytes < data_bytes:
                raise
            data_bytes = max(data_bytes // 2, minimum_bytes)
        else:
            return tier, landing, data_bytes


async def _begin_somewhere(
    tiers: Tiers,
    file: str,
    sizes: Sequence[int],
    writing: ThreadPoolExecutor,
    without: Sequence[Tier],
    order: Sequence[str],
    may_relieve: bool,
) -> tuple[Tier, BlobLanding]:
    """In the best tier that has room for one of *sizes*, the first of them that fits there."""
    refusals, failures = [], list[StorageError]()
    ranks = {kind: rank for rank, kind in enumerate(order)}
    for tier in sorted(tiers.landing, key=lambda one: ranks.get(one.kind, len(ranks))):
        if tier in without:
            continue
        for data_bytes in sizes:
            try:
                return tier, await _begin_in(tiers, tier, file, data_bytes, writing, may_relieve)
            except ResourceExhausted as error:
                refusals.append(error.message)
            except StorageError as error:
                logger.warning("nothing lands in tier %s now: %s", tier.name, error)
                failures.append(error)
                break
    if failures and not refusals:
        raise failures[0]
    raise ResourceExhausted("; ".join(refusals) or "no other tier takes new bytes")


async def _begin_in(
    tiers: Tiers,
    tier: Tier,
    file: str,
    data_bytes: int,
    writing: ThreadPoolExecutor,
    may_relieve: bool,
) -> BlobLanding:
    """A landing in *tier*; where there is no room, what other tiers have, too, goes first."""
    freed = 0
    while True:
        try:
            return await tiers.run(tier, BlobLanding.begin, tier, file, data_bytes, writing)
        except ResourceExhausted as error:
            if not may_relieve:
                raise
            missing = expected_file_bytes(data_bytes) - tier.space().free_bytes
            more = await tiers.relieve(tier, max(missing, 1))
            freed += more
            if not more:
                raise ResourceExhausted(
                    f"{error.message} ({freed} bytes of cached copies were given back for this; "
                    "what is left is in no other tier yet, pinned, or open in clients)"
                ) from None


async def land_somewhere(
    catalog: Catalog,
    tiers: Tiers,
    writing: ThreadPoolExecutor,
    found: Session,
    piece: Piece,
    known: Known | None = None,
) -> PublishedBlob:
    """Write the last piece of a sealed session and publish its blob.

    Where the slot holds all of it, what *known* says to lie in the tier already is not written.
    Where a tier fails and the slot holds all of the blob, another tier takes it; the session is
    moved there. The first error is raised if there is none.
    """
    failed: list[Tier] = []
    while True:
        landing = found.landing
        assert landing is not None, "a sealed session has one until it has landed"
        try:
            if known is not None and not piece.sequence:
                landing.refer(await known(found.tier))
            await run_to_end(
                tiers.run_landing(
                    found.tier, landing.take, found.slot, piece.slot_offset, piece.cuts
                )
            )
            return await run_to_end(tiers.run_landing(found.tier, landing.publish))
        except (ResourceExhausted, StorageError) as error:
            failed.append(found.tier)
            if piece.sequence:
                raise
            logger.warning("upload session %s: %s", found.name, error)
            try:
                await _move(catalog, tiers, writing, found, piece.num_bytes, failed)
            except ForebayError:
                raise error from None


async def land_in_full(
    catalog: Catalog, tiers: Tiers, writing: ThreadPoolExecutor, found: Session, piece: Piece
) -> PublishedBlob:
    """Write a blob anew, all of it, whose pieces could not be shared after all. The caller removes
    the first list."""
    await _move(catalog, tiers, writing, found, piece.num_bytes, ())
    return await land_somewhere(catalog, tiers, writing, found, piece)


async def _move(
    catalog: Catalog,
    tiers: Tiers,
    writing: ThreadPoolExecutor,
    found: Session,
    num_bytes: int,
    failed: Sequence[Tier],
) -> None:
    """Begin again on a tier that has not *failed*."""
    file = new_random_name()
    tier, landing, _ = await begin_landing(tiers, file, num_bytes, writing, without=failed)
    before, left_tier, left_file = found.landing, found.tier, found.file
    found.tier, found.file, found.landing = tier, file, landing
    if before is not None:
        await run_to_end(tiers.run(left_tier, before.abort))
    await catalog.write(lambda connection: move_upload(connection, found.name, tier.name, file))
    try:
        # A publication that failed at its very end may have left it.
        await tiers.run(left_tier, left_tier.delete, left_file)
    except ForebayError as error:
        logger.warning("file %s stays in tier %s: %s", left_file, left_tier.name, error)


async def run_to_end(call: Coroutine[Any, Any, T]) -> T:
    """*call*, which runs on a tier's thread; if cancelled, once that thread is done: what comes
    next may not touch the same file beside it."""
    running = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
