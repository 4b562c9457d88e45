"""S3 through s3fs: its session, credentials and event loop, with the conditions that we need.

The calls go to the file system's own client, since s3fs itself cannot read on a condition, send
checksums, create parts conditionally, or fill a buffer of ours.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import logging
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import s3fs
from aiobotocore.session import AioSession
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import NoCredentialsError
from botocore.loaders import create_loader

from forebay_server.tier.s3_faults import fault_of
from forebay_server.tier.s3_options import S3Options
from forebay_server.tier.s3_reads import (
    Denied,
    Elsewhere,
    Got,
    Signer,
    SocketReads,
    goes_by_proxy,
    got_of,
)
from forebay_server.tier.store_client import (
    FaultKind,
    ObjectInfo,
    Part,
    PartStoreClient,
    StoreFault,
    UnfinishedUpload,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALL_SECONDS: Final = 60.0
SLOWEST_BYTES_PER_SECOND: Final = 128 * 1024
"""A call has CALL_SECONDS, and as much more as its bytes take at this rate."""
MARK: Final = "forebay-write"
"""Key of the object's metadata that names the call which made it."""
PAGE_KEYS: Final = 1000
CLIENT_SECONDS: Final = 300.0
"""For so long the S3 client reads after an answer that only it understood."""

_SEND_BYTES: Final = 1 << 20


class S3Client(PartStoreClient):
    """Objects below ``s3://bucket/prefix``. Thread-safe."""

    def __init__(self, bucket: str, prefix: str, options: S3Options) -> None:
        """*prefix* "" or ending with a slash."""
        self._bucket = bucket
        self._prefix = prefix
        self._options = options
        self._files: Any = None
        self._sockets: SocketReads | None = None
        self._signer: Signer | None = None

    # ----------------------------------------------------------------------------- the place

    def open(self) -> None:
        if self._files is None:
            self._files = s3fs.S3FileSystem(
                skip_instance_cache=True,
                use_listings_cache=False,
                session=_make_session(self._options.profile),
                **self._options.for_s3fs(),
            )
            self._open_sockets()
        # A listing tells more than HEAD, whose answers have no body: which credential is wrong.
        self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)

    def close(self) -> None:
        files, self._files = self._files, None
        sockets, self._sockets = self._sockets, None
        if sockets is not None:
            sockets.close()
        if files is not None and files._s3 is not None:
            files.close_session(files.loop, files._s3creator)

    def _open_sockets(self) -> None:
        """For reads, unless only the client knows the way."""

        async def look() -> tuple[str, str]:
            client = await self._files.set_session()
            url: str = await client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": "x"}
            )
            return url.partition("?")[0].removesuffix("x"), client.meta.region_name

        base_url, region = self._run(look, 0)
        if goes_by_proxy(base_url):
            return
        bundle = (
            self._options.ca_file
            or self._files.session.get_config_variable("ca_bundle")
            or os.environ.get("REQUESTS_CA_BUNDLE")
        )
        self._signer = Signer(base_url, region, self._find_credentials)
        with contextlib.suppress(OSError):  # a file that cannot be read: the client will say so
            self._sockets = SocketReads(base_url.startswith("https:"), bundle)

    def _find_credentials(self) -> ReadOnlyCredentials:
        """Whose requests are signed; renewed where they expire."""
        given = self._options
        if given.key is not None and given.secret is not None:
            return ReadOnlyCredentials(given.key, given.secret, given.token)

        async def find() -> ReadOnlyCredentials:
            found = await self._files.session.get_credentials()
            if found is None:
                raise NoCredentialsError
            frozen: ReadOnlyCredentials = await found.get_frozen_credentials()
            return frozen

        return self._run(find, 0)

    def check_place(self) -> None:
        try:
            self._call("head_bucket")
        except StoreFault as fault:
            if fault.kind != "missing":
                raise
            raise StoreFault("no place", f"there is no bucket {self._bucket}") from None

    def refuses_damage(self, key: str) -> bool:
        try:
            self._call(
                "put_object", Key=self._prefix + key, Body=b"probe", ChecksumCRC32="AAAAAA=="
            )
        except StoreFault as fault:
            if "Digest" not in fault.text and "hecksum" not in fault.text:
                raise
            return True
        self.delete(key)
        return False

    @property
    def _if_free(self) -> dict[str, Any]:
        """The condition of a call that creates an object."""
        return {"IfNoneMatch": "*"} if self.is_exclusive else {}

    # ------------------------------------------------------------------------- whole objects

    def put(self, key: str, data: memoryview, mark: str) -> None:
        self._call(
            "put_object",
            num_bytes=data.nbytes,
            Key=self._prefix + key,
            Body=_body(data),
            ContentLength=data.nbytes,
            Metadata={MARK: mark},
            ChecksumCRC32=_checksum(data),
            **self._if_free,
        )

    def is_ours(self, key: str, data: memoryview | None, mark: str) -> bool:
        found = self._head(key)
        return found is not None and found.get("Metadata", {}).get(MARK) == mark

    def head(self, key: str) -> ObjectInfo | None:
        found = self._head(key)
        if found is None:
            return None
        modified = found["LastModified"].timestamp()
        return ObjectInfo(key, found["ContentLength"], found.get("ETag", ""), modified)

    def tail(self, key: str, num_bytes: int) -> tuple[ObjectInfo, bytes] | None:
        data = bytearray(num_bytes)
        info = self.tail_into(key, memoryview(data))
        if info is None:
            return super().tail(key, num_bytes)  # which says what is wrong, if something is
        return info, bytes(data[: min(num_bytes, info.size_bytes)])

    def tail_into(self, key: str, view: memoryview) -> ObjectInfo | None:
        with contextlib.suppress(StoreFault):
            got = self._read(key, None, "", view)
            if got.num_bytes == min(got.size_bytes, view.nbytes):
                modified = parsedate_to_datetime(got.headers["last-modified"]).timestamp()
                return ObjectInfo(key, got.size_bytes, got.headers.get("etag", ""), modified)
        return None

    def delete(self, key: str) -> None:
        self._call("delete_object", Key=self._prefix + key)

    def read_into(self, key: str, etag: str, offset: int, view: memoryview) -> int:
        try:
            return self._read(key, offset, etag, view).num_bytes
        except StoreFault as fault:
            if fault.kind == "refused" and "InvalidRange" in fault.text:
                return 0
            kind: FaultKind = "changed" if fault.kind == "taken" else fault.kind
            raise StoreFault(kind, fault.text, fault.num_bytes) from None

    def list_page(self, prefix: str, after: str) -> tuple[list[ObjectInfo], str]:
        arguments: dict[str, Any] = {"Prefix": self._prefix + prefix, "MaxKeys": PAGE_KEYS}
        if after:
            arguments["ContinuationToken"] = after
        found = self._call("list_objects_v2", **arguments)
        infos = [
            ObjectInfo(
                one["Key"].removeprefix(self._prefix),
                one["Size"],
                one.get("ETag", ""),
                one["LastModified"].timestamp(),
            )
            for one in found.get("Contents", [])
        ]
        return infos, found.get("NextContinuationToken", "")

    # -------------------------------------------------------------------------------- parts

    def begin(self, key: str, mark: str) -> str:
        made = self._call(
            "create_multipart_upload",
            Key=self._prefix + key,
            Metadata={MARK: mark},
            ChecksumAlgorithm="CRC32",
        )
        return str(made["UploadId"])

    def put_part(self, key: str, upload: str, number: int, data: memoryview) -> Part:
        checksum = _checksum(data)
        made = self._call(
            "upload_part",
            num_bytes=data.nbytes,
            Key=self._prefix + key,
            UploadId=upload,
            PartNumber=number,
            Body=_body(data),
            ContentLength=data.nbytes,
            ChecksumCRC32=checksum,
        )
        return Part(number, made["ETag"], checksum)

    def complete(self, key: str, upload: str, parts: list[Part]) -> None:
        named = [
            {"PartNumber": part.number, "ETag": part.etag, "ChecksumCRC32": part.checksum}
            for part in parts
        ]
        self._call(
            "complete_multipart_upload",
            Key=self._prefix + key,
            UploadId=upload,
            MultipartUpload={"Parts": named},
            **self._if_free,
        )

    def abort(self, key: str, upload: str) -> None:
        try:
            self._call("abort_multipart_upload", Key=self._prefix + key, UploadId=upload)
        except StoreFault as fault:
            if fault.kind != "no upload":
                raise

    def unfinished(self) -> list[UnfinishedUpload]:
        found: list[UnfinishedUpload] = []
        arguments: dict[str, Any] = {"Prefix": self._prefix}
        while True:
            page = self._call("list_multipart_uploads", **arguments)
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            found += [
                UnfinishedUpload(
                    one["Key"].removeprefix(self._prefix),
                    one["UploadId"],
                    (now - one["Initiated"]).total_seconds(),
                )
                for one in page.get("Uploads", [])
                if one["Key"].startswith(self._prefix)
            ]
            if not page.get("IsTruncated"):
                return found
            arguments["KeyMarker"] = page["NextKeyMarker"]
            arguments["UploadIdMarker"] = page["NextUploadIdMarker"]

    # -------------------------------------------------------------------------------- reads

    def _read(self, key: str, first: int | None, etag: str, view: memoryview) -> Got:
        """Fill *view* from byte *first* on (None: with the object's end).

        If the object's ETag is still *etag* ("": any).
        """
        span = f"-{view.nbytes}" if first is None else f"{first}-{first + view.nbytes - 1}"
        headers = {"Range": f"bytes={span}", **({"If-Match": etag} if etag else {})}
        sockets, signer = self._sockets, self._signer
        if sockets is None or signer is None or sockets.is_paused:
            return self._read_by_client(key, headers, first, view)

        def read() -> Got:
            url, signed = signer.sign(self._prefix + key, headers)
            return sockets.read(url, signed, first, view, _seconds_for(view.nbytes))

        try:
            try:
                return read()
            except Denied:
                signer.forget()
                return read()
        except Elsewhere as answer:
            got = self._read_by_client(key, headers, first, view)
            if sockets.pause(CLIENT_SECONDS):
                logger.info(
                    "objects are read by the S3 client for the next %.0f s: %s",
                    CLIENT_SECONDS,
                    answer,
                )
            return got

    def _read_by_client(
        self, key: str, headers: Mapping[str, str], first: int | None, view: memoryview
    ) -> Got:
        received = _Received(view)
        arguments = {name.replace("-", ""): value for name, value in headers.items()}

        async def fetch() -> Got:
            client = await self._files.set_session()
            found = await client.get_object(
                Bucket=self._bucket, Key=self._prefix + key, **arguments
            )
            async with found["Body"] as body:
                answer = found["ResponseMetadata"]
                got = got_of(answer["HTTPStatusCode"], answer["HTTPHeaders"], first, view.nbytes)
                # Newer clients wrap the stream; its own chunks come without another copy.
                async for chunk in getattr(body, "raw_stream", body).content.iter_any():
                    received.add(chunk)
            return dataclasses.replace(got, num_bytes=received.num_bytes)

        try:
            return self._run(fetch, view.nbytes)
        except StoreFault as fault:
            raise StoreFault(fault.kind, fault.text, received.num_bytes) from None

    # ------------------------------------------------------------------------------- the loop

    def _head(self, key: str) -> Mapping[str, Any] | None:
        try:
            found: Mapping[str, Any] = self._call("head_object", Key=self._prefix + key)
        except StoreFault as fault:
            if fault.kind in ("missing", "no place"):
                return None
            raise
        return found

    def _call(self, method: str, *, num_bytes: int = 0, **arguments: Any) -> Any:
        async def call() -> Any:
            client = await self._files.set_session()
            return await getattr(client, method)(Bucket=self._bucket, **arguments)

        return self._run(call, num_bytes)

    def _run(self, call: Callable[[], Awaitable[T]], num_bytes: int) -> T:
        """*call* on the loop of the file system, from any other thread, with a deadline."""
        seconds = _seconds_for(num_bytes)

        async def bounded() -> T:
            async with asyncio.timeout(seconds):
                return await call()

        if self._files is None:
            raise StoreFault("refused", "the tier is closed")
        return run_on(self._files.loop, bounded())


def _seconds_for(num_bytes: int) -> float:
    """What a call with so many bytes may take."""
    return CALL_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND


@functools.cache
def _loader() -> Any:
    """Reads the descriptions of services, megabytes of JSON, once a process."""
    return create_loader()


def _make_session(profile: str | None) -> AioSession:
    session = AioSession(profile=profile)
    session.register_component("data_loader", _loader())
    return session


def run_on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """The result of *work* on *loop*, which runs in another thread; :class:`StoreFault`."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except StoreFault:
        raise
    except Exception as error:
        raise fault_of(error) from error
    finally:
        future.cancel()


class _Received:
    """Puts what comes over the network where it belongs."""

    def __init__(self, view: memoryview) -> None:
        self.num_bytes = 0
        self._view = view

    def add(self, chunk: bytes) -> None:
        end = self.num_bytes + len(chunk)
        self._view[self.num_bytes : end] = chunk
        self.num_bytes = end


class _Pieces:
    """A body that is sent out of its buffer piece by piece, without a copy of the whole."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __len__(self) -> int:
        return self._data.nbytes

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for start in range(0, self._data.nbytes, _SEND_BYTES):
            yield self._data[start : start + _SEND_BYTES]


def _body(data: memoryview) -> bytes | _Pieces:
    return bytes(data) if data.nbytes <= _SEND_BYTES else _Pieces(data)


def _checksum(data: memoryview) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
