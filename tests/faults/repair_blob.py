"""A repair in a process of its own, to be killed: ``repair_blob.py FOLDER`` runs what is queued."""

import asyncio
import sys
from pathlib import Path

from forebay_server.catalog.queries_jobs import FLUSH, REPAIR
from forebay_server.testing.integrity import open_integrity


async def main(folder: Path) -> None:
    async with open_integrity(folder) as node:
        for _, error in await node.run_queued(REPAIR, FLUSH):
            assert not error, error


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
