"""At the daemon's start: the catalog and the files of the landing tiers are brought together.

A file that no row names goes; a row whose file is gone or cut short is taken out of service; what
the sessions of earlier incarnations left goes. A file that a row names is never deleted.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forebay_server.catalog import queries_blobs as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_damage import give_up_objects, mark_missing
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_objects import is_anything_remote
from forebay_server.catalog.queries_settings import get_setting, own_name, put_setting
from forebay_server.catalog.queries_uploads import end_all_uploads
from forebay_server.tier.health import GuardedTier
from forebay_server.tier.owner import Owner, claim, is_claimed
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import HEALTHY, Tier
from forebay_server.tier.volume import VOLUME_FILE
from forebay_wire.errors import InvalidRequest, StorageError

logger = logging.getLogger(__name__)

ORPHAN_BATCH: Final = 500

CLAIMED: Final = "object tier"
"""The setting that says where the catalog's object tier was at the last start."""


@dataclass(frozen=True)
class Reconciled:
    """What a start found left over."""

    num_sessions: int
    """Upload sessions of earlier incarnations."""
    num_orphans: int
    """Blobs that nothing names."""
    num_removed: int
    """Files without a row."""
    removed_bytes: int
    num_missing: int
    """Files that a row names and that are gone or cut short."""


async def reconcile(
    catalog: Catalog, tiers: Tiers, *, replaced: Collection[str] = ()
) -> Reconciled:
    """Bring *catalog* and the landing tiers together; before anything else is served.

    Raises :class:`StorageError` where a tier holds another volume than the catalog knows: deleting
    or giving up anything there would be wrong. A tier among *replaced* may: what lay on the volume
    before is given up, and comes back from other copies as far as there are any.
    """
    for tier in tiers.landing:
        await _check_volume(catalog, tiers, tier, is_replaced=tier.name in replaced)
    num_sessions = await catalog.write(end_all_uploads)
    num_orphans = await _forget_orphans(catalog, [tier.name for tier in tiers.landing])
    num_removed = removed_bytes = num_missing = 0
    for tier in tiers.landing:
        sizes = await tiers.run(tier, _sizes, tier)
        known = await catalog.read(functools.partial(queries.known_files, tier=tier.name))
        strays = sorted(sizes.keys() - known.keys())
        if tier.health != HEALTHY:  # a read-only volume: they go at a later start
            strays = []
        for name in strays:
            await tiers.run(tier, tier.delete, name)
            num_removed += 1
            removed_bytes += sizes[name]
        await _log(catalog, tier, strays)
        bad = sorted(name for name, num_bytes in known.items() if sizes.get(name) != num_bytes)
        await _take_out_of_service(catalog, tier, bad)
        num_missing += len(bad)
    found = Reconciled(num_sessions, num_orphans, num_removed, removed_bytes, num_missing)
    logger.info("left over from before: %s", found)
    return found


async def claim_objects(
    catalog: Catalog, tiers: Tiers, node: str, folder: str, *, is_replaced: bool
) -> None:
    """Make the object tier the catalog's; before the first object is read.

    :class:`InvalidRequest` for a tier that another catalog deletes in, for one that was to give
    ``remote`` and now can only cache, and for one that is not where the catalog's objects are,
    unless it *is_replaced*: then those are given up. A store that does not answer is checked when
    it does, if the catalog's was there at the last start; else its error is raised.
    """
    has_remote = await catalog.read(is_anything_remote)
    claimed = await catalog.read(lambda connection: get_setting(connection, CLAIMED))
    if tiers.why_not_remote and has_remote:
        raise InvalidRequest(
            f"{tiers.why_not_remote}. This data folder has remote bytes, which only a store that "
            "can create conditionally may hold: give it the one that it had"
        )
    tier = tiers.object
    if tier is None:
        return
    owner = Owner(await catalog.write(own_name), node, folder)
    if isinstance(tier, GuardedTier) and tier.absence is not None:
        is_known = has_remote if claimed is None else claimed == tier.location
        if is_replaced or not is_known:
            raise tier.absence
        tier.confirm = functools.partial(claim, owner=owner, may_be_new=False)
        return
    if has_remote and is_replaced and not await tiers.run(tier, is_claimed, tier):
        num_copies = await catalog.write(give_up_objects)
        given_up = f"{num_copies} copies are given up for what is at {tier.location} now"
        logger.warning("tier %s: %s", tier.name, given_up)
        await catalog.write(lambda c: record(c, f"tier {tier.name}", "replaced", given_up))
        has_remote = False
    await tiers.run(tier, functools.partial(claim, may_be_new=not has_remote), tier, owner)
    await catalog.write(lambda connection: put_setting(connection, CLAIMED, tier.location))


async def _log(catalog: Catalog, tier: Tier, files: Sequence[str]) -> None:
    """Write down what was deleted."""

    def log(connection: Connection) -> None:
        for file in files:
            record(connection, f"tier {tier.name}", "deleted", f"file {file}: no row names it")

    if files:
        await catalog.write(log)


async def _check_volume(catalog: Catalog, tiers: Tiers, tier: Tier, *, is_replaced: bool) -> None:
    """Refuse a volume that is not the catalog's; remember that of a tier that is new to it."""
    volume = await tiers.run(tier, _volume_of, tier)
    sizes = await tiers.run(tier, _has_files, tier)
    key = f"volume/{tier.name}"

    def check(connection: Connection) -> None:
        expected = get_setting(connection, key)
        if expected == volume:
            return
        known = queries.known_files(connection, tier.name) if expected is not None else {}
        if known and not is_replaced:
            raise StorageError(
                f"tier {tier.name} at {tier.location} is volume {volume}, {len(known)} files of "
                f"the catalog lie on volume {expected}: is a disk not mounted, or the folder of "
                "the tier wrong? If that volume is lost for good, start once with --replaced "
                f"{tier.name}: what has copies elsewhere comes back, the rest is given up"
            )
        if known:
            given_up = f"volume {expected} with {len(known)} files is given up for {volume}"
            logger.warning("tier %s: %s", tier.name, given_up)
            record(connection, f"tier {tier.name}", "replaced", given_up)
        if sizes:
            raise StorageError(
                f"tier {tier.name} at {tier.location} holds files that this catalog does not know "
                f"(volume {volume}): give it the catalog that belongs to them, or, after `forebay "
                "recover` or to give them up, an empty folder for the tier. Nothing was changed"
            )
        put_setting(connection, key, volume)

    await catalog.write(check)


async def _forget_orphans(catalog: Catalog, tiers: Sequence[str]) -> int:
    """Forget the blobs that nothing names and that lie in *tiers* only; their files go as files
    without a row."""
    num_orphans = 0
    while True:
        found = await catalog.read(
            lambda connection: queries.local_orphan_blobs(connection, tiers, ORPHAN_BATCH)
        )
        if not found:
            return num_orphans

        def forget(connection: Connection, blobs: Sequence[str] = found) -> None:
            for blob in blobs:
                for ref in queries.remove_orphan(connection, blob):
                    detail = f"{ref.tier}: nothing names it any more"
                    record(connection, f"blob {blob}", "deleted", detail)

        await catalog.write(forget)
        num_orphans += len(found)


async def _take_out_of_service(catalog: Catalog, tier: Tier, files: Sequence[str]) -> None:
    if not files:
        return
    logger.error(
        "tier %s at %s lacks %d files that the catalog names, or has them cut short (first: %s)",
        tier.name,
        tier.location,
        len(files),
        files[0],
    )
    reason = "the file was gone or cut short when the daemon started"
    await catalog.write(lambda connection: mark_missing(connection, files, reason))


def _volume_of(tier: Tier) -> str:
    try:
        return str(json.loads((Path(tier.location) / VOLUME_FILE).read_text())["volume"])
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"tier {tier.name} at {tier.location} has no readable {VOLUME_FILE} ({error})"
        ) from error


def _has_files(tier: Tier) -> bool:
    return next(tier.list(), None) is not None


def _sizes(tier: Tier) -> dict[str, int]:
    return {info.name: info.size_bytes for info in tier.list()}
