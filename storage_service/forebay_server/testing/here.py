"""A whole daemon in this process, so that a test can hold up what it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay_server.config import load_config
from forebay_server.daemon import Daemon
from forebay_server.exit_codes import ExitCode
from forebay_server.move.trash import Trash
from forebay_server.testing.checkpoints import CheckpointNode
from forebay_server.testing.storage import Storage


@dataclass(frozen=True)
class DaemonHere:
    """A daemon that serves, and its parts."""

    daemon: Daemon
    node: CheckpointNode
    life: asyncio.Task[ExitCode]
    """Ends with the daemon: by SIGTERM to this process, or by its idle time."""


@asynccontextmanager
async def serve_here(data: Path, **settings: Any) -> AsyncIterator[DaemonHere]:
    """A daemon on *data*, once it listens. Whoever uses it ends it and awaits its life."""
    listens = asyncio.Event()
    config = load_config({"data": data, **settings}, {}).config
    daemon = Daemon(config, started=lambda lines: listens.set())
    async with asyncio.TaskGroup() as group:
        life = group.create_task(daemon.serve())
        ready = group.create_task(listens.wait())
        await asyncio.wait([life, ready], return_when=asyncio.FIRST_COMPLETED)
        assert ready.done(), "the daemon ended before it served"
        storage = Storage(daemon._catalog, daemon._tiers, daemon._uploads)
        trash = Trash(daemon._catalog, daemon._jobs)
        yield DaemonHere(
            daemon,
            CheckpointNode(storage, daemon._checkpoints, daemon._jobs, trash, daemon._retention),
            life,
        )
