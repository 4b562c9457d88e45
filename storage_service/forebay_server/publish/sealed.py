"""Generations that all ranks have sealed and that have not landed: readable in memory meanwhile.

Their manifest is the one that is going to be committed: the same digests, the same id. So a reader
who began with the memory goes on with the disk once a pack has landed.
"""

from __future__ import annotations

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_checkpoints import manifest_of_sealed, sessions_in_slots
from forebay_server.catalog.queries_runs import find_generation
from forebay_server.model.states import is_final
from forebay_server.publish.lease import Uploads
from forebay_wire.ids import GenerationId


class SealedGenerations:
    """Belongs to the event loop. What it knows ends with the daemon: nothing of it is durable."""

    def __init__(self, catalog: Catalog, uploads: Uploads) -> None:
        self._catalog = catalog
        self._uploads = uploads
        self._manifests: dict[GenerationId, tuple[str, bytes]] = {}

    async def offer(self, generation: GenerationId) -> str | None:
        """Have a sealed generation be read from memory; the id of its manifest.

        Digests what has not been read there before. None if it is not sealed, or not all of its
        packs lie in memory, or that has changed meanwhile.
        """
        sessions = await self._catalog.read(
            lambda connection: sessions_in_slots(connection, generation)
        )
        blobs: dict[str, tuple[str, int]] = {}
        for session in sessions:  # one after the other: the others' slots need a thread, too
            table = await self._uploads.open_sealed(session)
            if table is not None:
                blobs[session] = table.blob_id, table.total_bytes

        def encode(connection: Connection) -> tuple[str, bytes] | None:
            manifest = manifest_of_sealed(connection, generation, blobs)
            return manifest.encode() if manifest is not None else None

        encoded = await self._catalog.read(encode)
        if encoded is None:
            return None
        self._manifests[generation] = encoded
        return encoded[0]

    def read(self, manifest: str) -> bytes | None:
        """The bytes of a manifest that :meth:`offer` named, while its generation is sealed."""
        return next(
            (data for identity, data in self._manifests.values() if identity == manifest), None
        )

    async def forget_if_final(self, generation: GenerationId) -> None:
        """Drop the manifest of *generation* if that is committed or given up."""
        if generation not in self._manifests:
            return
        info = await self._catalog.read(lambda connection: find_generation(connection, generation))
        if info is None or is_final(info.state):
            self._manifests.pop(generation, None)
