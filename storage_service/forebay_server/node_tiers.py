"""The tiers of a daemon, by its configuration."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

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
    folders: tuple[tuple[Literal["ssd", "hdd"], Path | None, int], ...] = (
        ("ssd", config.ssd_folder, config.ssd_bytes),
        ("hdd", config.hdd_folder, config.hdd_bytes),
    )
    for name, folder, limit in folders:
        if folder is not None:
            tier = DirectoryTier(
                name, name, folder, limit_bytes=limit, reserve_bytes=reserve, node=node
            )
            tiers.append(tier)
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
    for one in tiers:
        one.encoding = encodings.get(one.name, config.object_encoding)
    guarded = [
        GuardedTier(MeteredTier(one, record), may_be_away=one.kind == "object") for one in tiers
    ]
    used = [*guarded, *open_origins(config)]
    slots = SlotPool(config.ram_bytes or default_ram_bytes())
    return Tiers(used, slots, why_not_remote=why_not_remote)


def default_ram_bytes() -> int:
    """A quarter of the memory that this process may use: the machine's or its cgroup's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total // 4
