"""The tiers of a daemon, by its configuration."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from forebay_server.catalog.queries_objects import CACHE_TIER, OBJECT_TIER
from forebay_server.config import Config
from forebay_server.model.encodings import RAW
from forebay_server.origins import open_origins
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.health import GuardedTier
from forebay_server.tier.memory import SlotPool
from forebay_server.tier.registry import Tiers
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier
from forebay_server.tier.wrap import MeteredTier, Record


def open_tiers(config: Config, node: str, record: Record, why_not_remote: str = "") -> Tiers:
    """The tiers that *config* names, not started; local ones are *node*'s. *record* is told of
    each call. With *why_not_remote* the object store only caches, in a folder of this node."""
    reserve = config.reserve_bytes
    tiers: list[Tier] = []
    if config.ssd_folder is not None:
        tiers.append(
            DirectoryTier(
                "ssd",
                "ssd",
                config.ssd_folder,
                limit_bytes=config.ssd_bytes,
                reserve_bytes=reserve,
                node=node,
            )
        )
    if config.hdd_folder is not None:
        tiers.append(
            DirectoryTier(
                "hdd",
                "hdd",
                config.hdd_folder,
                limit_bytes=config.hdd_bytes,
                reserve_bytes=reserve,
                node=node,
            )
        )
    if config.object_location is not None:
        tiers.append(
            RemoteTier(
                CACHE_TIER if why_not_remote else OBJECT_TIER,
                config.object_location + (f"/{CACHE_TIER}-{node}" if why_not_remote else ""),
                reserve_bytes=reserve,
                client=config.object_client,
                options=config.object_options.as_dict(),
                caches_only=bool(why_not_remote),
            )
        )
    encodings = {"ssd": RAW, "hdd": config.hdd_encoding}
    for tier in tiers:
        tier.encoding = encodings.get(tier.name, config.object_encoding)
    guarded = [GuardedTier(MeteredTier(tier, record)) for tier in tiers]
    used = [*guarded, *open_origins(config)]
    slots = SlotPool(config.ram_bytes or default_ram_bytes())
    return Tiers(used, slots, why_not_remote=why_not_remote)


def default_ram_bytes() -> int:
    """A quarter of the memory that this process may use: the machine's or its cgroup's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total // 4
