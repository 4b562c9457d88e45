"""An evictor in a process of its own, to be killed: ``evict_some.py FOLDER`` fills a node with
copies that may go and one blob that must not, tells their ids and takes away all that may go."""

import asyncio
import sys
from pathlib import Path

from forebay_server.ahead import Ahead
from forebay_server.catalog.queries_manifests import insert_manifest
from forebay_server.publish.reconcile import reconcile
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_wire.limits import KIB, MIB

NUM_CLEAN = 4


async def main(folder: Path) -> None:
    async with StorageNode(folder) as node:
        await reconcile(node.catalog, node.tiers)
        blobs = []
        for seed in range(NUM_CLEAN + 1):
            tiers = ("ssd", "object") if seed < NUM_CLEAN else ("ssd",)
            table = await node.add_blob([random_bytes(64 * KIB, seed)], *tiers)
            blobs.append(table.blob_id)
        await node.catalog.write(lambda c: insert_manifest(c, "0" * 64, 1, b"", blobs))
        sys.stdout.write("\n".join([*blobs, ""]))
        sys.stdout.flush()
        ahead = Ahead(node.tiers, node.catalog, node.opener)
        await ahead.evictor.make_room(node.tiers.get("ssd"), 64 * MIB)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
