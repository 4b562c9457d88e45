"""A mover in a process of its own, to be stopped or killed.

``move_blob.py FOLDER BLOB`` moves the blob from ssd to hdd and prints how that ended.
"""

import asyncio
import sys
from pathlib import Path

from forebay_server.catalog.queries_jobs import MIGRATE, claim
from forebay_server.move.jobs import Progress
from forebay_server.move.migrate import migrate_target
from forebay_server.testing.moving import open_moving
from forebay_wire.errors import ForebayError


async def main(folder: Path, blob: str) -> None:
    async with open_moving(folder, run_jobs=False) as moving:
        await moving.queue(MIGRATE, migrate_target(blob, "ssd", "hdd"))
        taken = await moving.node.catalog.write(
            lambda connection: claim(connection, "late-0", 3600, [MIGRATE])
        )
        assert taken is not None
        sys.stdout.write("claimed\n")
        sys.stdout.flush()
        try:
            await moving.migrator(Progress(taken, "late-0"))
            sys.stdout.write("moved\n")
        except ForebayError as error:
            sys.stdout.write(f"refused: {error}\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
