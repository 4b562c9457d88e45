"""The Blobs service: converts between messages and upload sessions, and streams manifests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, Protocol

import grpc.aio

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_manifests import read_manifest
from forebay_server.publish.lease import Grant, Uploads
from forebay_server.publish.session import Piece
from forebay_server.rpc.interceptors import caller_uid
from forebay_wire.errors import NotFound
from forebay_wire.ids import check_id
from forebay_wire.limits import MANIFEST_CHUNK_BYTES
from forebay_wire.v1 import blobs_pb2 as messages
from forebay_wire.v1 import blobs_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class TicketGiver(Protocol):
    """What uploads over HTTP need of :class:`forebay_server.bulk.tickets.Auth`."""

    def ticket(
        self, method: Literal["GET", "PUT"], *, uid: int, stop: int, session: str | None
    ) -> str:
        """A ticket for the first *stop* bytes of the session's slot."""
        ...


class BlobsService(blobs_pb2_grpc.BlobsServicer):
    """What each call promises stands in ``blobs.proto``."""

    def __init__(
        self,
        uploads: Uploads,
        catalog: Catalog,
        tickets: TicketGiver,
        manifest_in_memory: Callable[[str], bytes | None],
    ) -> None:
        """*manifest_in_memory* knows the manifests that are not committed and may be read."""
        self._uploads = uploads
        self._catalog = catalog
        self._tickets = tickets
        self._manifest_in_memory = manifest_in_memory

    async def BeginUpload(
        self, request: messages.BeginUploadRequest, context: Context
    ) -> messages.UploadSession:
        uid = caller_uid()
        grant = await self._uploads.begin(
            uid,
            request.owner,
            request.total_bytes,
            request.slot_bytes,
            minimum_bytes=request.minimum_bytes,
        )
        return self._convert(grant, uid)

    async def Append(
        self, request: messages.AppendRequest, context: Context
    ) -> messages.AppendResponse:
        blob_bytes = await self._uploads.append(request.session, caller_uid(), _piece(request))
        return messages.AppendResponse(blob_bytes=blob_bytes)

    async def Seal(self, request: messages.SealRequest, context: Context) -> messages.SealedBlob:
        landed = await self._uploads.seal(request.session, caller_uid(), _piece(request))
        return messages.SealedBlob(
            blob=landed.blob, num_bytes=landed.num_bytes, num_segments=landed.num_segments
        )

    async def Renew(
        self, request: messages.RenewRequest, context: Context
    ) -> messages.UploadSession:
        uid = caller_uid()
        return self._convert(await self._uploads.renew(request.session, uid), uid)

    async def Abort(
        self, request: messages.AbortRequest, context: Context
    ) -> messages.AbortResponse:
        await self._uploads.abort(request.session, caller_uid())
        return messages.AbortResponse()

    async def ReadManifest(
        self, request: messages.ReadManifestRequest, context: Context
    ) -> AsyncIterator[messages.ManifestChunk]:
        manifest = check_id("manifest", request.manifest)
        data = self._manifest_in_memory(manifest)
        if data is None:  # in this order: a commit between the two looks is found
            data = await self._catalog.read(lambda connection: read_manifest(connection, manifest))
        if data is None:
            raise NotFound(
                f"there is no manifest {manifest}: its dataset or generation was deleted"
            )
        for start in range(0, len(data), MANIFEST_CHUNK_BYTES):
            piece = data[start : start + MANIFEST_CHUNK_BYTES]
            yield messages.ManifestChunk(data=piece, total_bytes=len(data))

    def _convert(self, grant: Grant, uid: int) -> messages.UploadSession:
        ticket = self._tickets.ticket("PUT", uid=uid, stop=grant.slot_bytes, session=grant.session)
        return messages.UploadSession(
            session=grant.session,
            slot_bytes=grant.slot_bytes,
            lease_seconds=grant.lease_seconds,
            put_ticket=ticket,
        )


def _piece(request: messages.AppendRequest | messages.SealRequest) -> Piece:
    return Piece(request.sequence, request.num_bytes, tuple(request.cuts), request.slot_offset)
