"""SIGTERM waits for what is sealed: a daemon in this process, whose landings the test holds up."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.queries_runs import find_generation
from forebay_server.daemon import CATALOG_FILE_NAME
from forebay_server.exit_codes import ExitCode
from forebay_server.publish.landing import BlobLanding, PublishedBlob
from forebay_server.publish.lease import Uploads
from forebay_server.testing.checkpoints import RUN, CheckpointNode
from forebay_server.testing.here import serve_here
from forebay_wire.ids import GenerationId
from forebay_wire.limits import KIB

SAVED = GenerationId(RUN, 1, 1)


class Landings:
    """Landings stop before their end, until the daemon waits for them or closes nevertheless."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_drains = 0
        self.num_left_at_close = -1
        self.let_through_at = 1
        """At which of the daemon's waits landings may end."""
        self.after_drain: Callable[[], Any] | None = None
        self._may_end = threading.Event()
        publish, drain, close = BlobLanding.publish, Uploads.drain, Uploads.close

        def held_publish(landing: BlobLanding) -> PublishedBlob:
            assert self._may_end.wait(30.0)
            return publish(landing)

        async def counted_drain(uploads: Uploads, timeout_seconds: float) -> bool:
            self.num_drains += 1
            if self.num_drains == self.let_through_at:
                self._may_end.set()
            have_landed = await drain(uploads, timeout_seconds)
            if self.num_drains == 1 and self.after_drain is not None:
                await self.after_drain()
            return have_landed

        async def noted_close(uploads: Uploads) -> None:
            self.num_left_at_close = max(self.num_left_at_close, uploads.num_landing)
            self._may_end.set()
            await close(uploads)

        monkeypatch.setattr(BlobLanding, "publish", held_publish)
        monkeypatch.setattr(Uploads, "drain", counted_drain)
        monkeypatch.setattr(Uploads, "close", noted_close)


@asynccontextmanager
async def ending(data: Path) -> AsyncIterator[CheckpointNode]:
    """A daemon on *data* that gets SIGTERM at the end, and has to end well."""
    async with asyncio.timeout(60), serve_here(data) as here:
        yield here.node
        os.kill(os.getpid(), signal.SIGTERM)
        assert await here.life == ExitCode.OK


async def state_of_saved(data: Path) -> str:
    catalog = Catalog.open(sqlite_url(data / CATALOG_FILE_NAME))
    try:
        found = await catalog.read(lambda connection: find_generation(connection, SAVED))
    finally:
        catalog.close()
    assert found is not None
    return found.state


async def test_what_is_sealed_before_sigterm_lands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landings = Landings(monkeypatch)
    async with ending(tmp_path) as node:
        await node.begin()
        await node.save(1, [os.urandom(KIB)])
    assert landings.num_left_at_close == 0
    assert await state_of_saved(tmp_path) == "committed"


async def test_what_is_sealed_while_it_drains_lands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landings = Landings(monkeypatch)
    landings.let_through_at = 2
    async with ending(tmp_path) as node:
        await node.begin()
        landings.after_drain = lambda: node.save(1, [os.urandom(KIB)])
    assert landings.num_left_at_close == 0
    assert await state_of_saved(tmp_path) == "committed"
