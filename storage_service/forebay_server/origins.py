"""The origin tier of a daemon: below the configured prefixes, with what its catalog knows."""

from __future__ import annotations

import asyncio

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_origins import origins_in_file
from forebay_server.config import Config
from forebay_server.tier.origin import OriginPlaces
from forebay_server.tier.origin_tier import OriginTier, Source
from forebay_server.tier.registry import Tiers

LOOKUP_SECONDS = 60.0


def open_origins(config: Config) -> list[OriginTier]:
    """The origin tier, if files may be read anywhere."""
    if not config.origin_prefixes:
        return []
    options = config.origin_options.as_dict()
    return [OriginTier(OriginPlaces(config.origin_prefixes, config.object_client, options))]


def find_sources(tiers: Tiers, catalog: Catalog) -> None:
    """Have the origin tier ask *catalog*, from its threads, which files hold a blob's bytes."""
    loop = asyncio.get_running_loop()

    def lookup(file: str) -> list[Source]:
        asked = asyncio.run_coroutine_threadsafe(
            catalog.read(lambda connection: origins_in_file(connection, file)), loop
        )
        rows = asked.result(LOOKUP_SECONDS)
        return [Source(row.ref.url, row.num_bytes, row.ref.validator, row.table()) for row in rows]

    for tier in tiers.all:
        if isinstance(tier, OriginTier):
            tier.lookup = lookup
