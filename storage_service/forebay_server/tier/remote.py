"""The ``object`` tier: whole objects below one URL, in a directory, on S3 or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from fsspec.implementations.local import LocalFileSystem

from forebay_server.tier.file_systems import client_of, open_file_system
from forebay_server.tier.object_folder import FolderPlace
from forebay_server.tier.object_store import LEFT_OVER_SECONDS, StorePlace
from forebay_server.tier.place import UNFINISHED_FOLDER, Place
from forebay_server.tier.s3_options import S3Options
from forebay_server.tier.space import SpaceLedger
from forebay_server.tier.store import FileInfo, Tier, TierReader, TierSpace, TierWriter
from forebay_server.tier.store_client import StoreClient
from forebay_wire.errors import InvalidRequest, NotFound, StorageError

ObjectClientName = Literal["s3fs", "obstore"]

DATA_FOLDER: Final = "data"
"""Blob files lie at ``data/<file>``."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*\Z")
_CREDENTIALS: Final = re.compile(r"//[^/@]*@")
_S3_SCHEMES: Final = ("s3://", "s3a://")


class RemoteTier(Tier):
    """Objects below one URL, published whole and create-only. Thread-safe.

    A directory (``file://``) publishes like the local tiers: fsspec's local file system would write
    the final name in place, without fsync. S3 takes large objects in parts and shows them with the
    last call; HDFS renames what was written aside. Others create exclusively in one call; one that
    cannot is refused by ``open`` (:class:`CannotGiveRemote`), unless it is to cache only: what lies
    there could be replaced by another writer. Listings are never cached.
    """

    kind: Literal["object"]

    def __init__(
        self,
        name: str,
        url: str,
        *,
        limit_bytes: int = 0,
        reserve_bytes: int = 0,
        client: ObjectClientName = "s3fs",
        options: Mapping[str, Any] | None = None,
        must_have: str = "",
        left_over_seconds: float = LEFT_OVER_SECONDS,
        caches_only: bool = False,
    ) -> None:
        """*client* is who speaks with S3; *options* are those of :class:`S3Options` there, else the
        fsspec file system's; *reserve_bytes* stay free where *url* is a directory. With
        *must_have*, a prefix like ``manifests/``: ``open`` makes nothing in a place without such
        objects and raises :class:`NotFound`. Unfinished uploads of that age are a dead writer's.
        With *caches_only* the store need not create exclusively; *url* is this node's alone."""
        self.name = name
        self.caches_only = caches_only
        self.kind = "object"
        self.location = _CREDENTIALS.sub("//", url)
        self._url = url
        self._client: ObjectClientName = client
        self._options = dict(options or {})
        self._must_have = must_have
        self._left_over_seconds = left_over_seconds
        self._where = f"tier {name} at {self.location}"
        self._ledger = SpaceLedger(self._where, limit_bytes, reserve_bytes, self._measure)
        self._opened: Place | None = None

    def blob_name(self, file: str) -> str:
        return f"{DATA_FOLDER}/{file}"

    def open(self) -> None:
        if self._opened is not None:
            return
        place = self._make_place()
        try:
            place.connect()
            if self._must_have and not place.has_any(self._must_have):
                raise NotFound(
                    f"{self._where} holds no {self._must_have}: is the URL right? Nothing was made"
                )
            place.open()
            held = [place.held_bytes(info) for info in place.list("")]
        except BaseException:
            place.close()
            raise
        if (device := place.device()) is not None:
            self._ledger.join(device)
        self._ledger.reset(sum(held), len(held))
        self._opened = place

    def close(self) -> None:
        place, self._opened = self._opened, None
        if place is not None:
            place.close()

    def create(self, name: str, expected_bytes: int) -> TierWriter:
        return self._place.create(_checked(name), expected_bytes, self._ledger)

    def read(self, name: str) -> TierReader:
        return self._place.read(_checked(name), f"tier {self.name}, file {name}")

    def read_whole(self, name: str, num_bytes: int) -> TierReader:
        return self._place.read_whole(_checked(name), f"tier {self.name}, file {name}", num_bytes)

    def read_medium(self, name: str) -> TierReader:
        return self._place.read_medium(_checked(name), f"tier {self.name}, file {name}")

    def head(self, name: str) -> int | None:
        return self._place.head(_checked(name))

    def delete(self, name: str) -> None:
        freed = self._place.delete(_checked(name))
        if freed is not None:
            self._ledger.freed(freed)

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        return self._place.list(prefix)

    def sweep(self) -> None:
        self._place.sweep()

    def space(self) -> TierSpace:
        return self._ledger.space()

    @property
    def _place(self) -> Place:
        if self._opened is None:
            raise StorageError(f"{self._where} is not open")
        return self._opened

    def _measure(self) -> int:
        return self._place.free_bytes()

    def _make_place(self) -> Place:
        if self._url.startswith(_S3_SCHEMES):
            return self._store_place(self._make_s3())
        try:
            files, root = open_file_system(self._url, self._options)
        except (ValueError, ImportError, TypeError) as error:
            raise InvalidRequest(
                f"object URL {self.location} cannot be opened: {error}; use a URL that fsspec "
                "knows, like file:///some/folder, and install what it needs"
            ) from error
        except Exception as error:  # whatever a file system raises that cannot reach its server
            raise StorageError(
                f"object URL {self.location} cannot be opened: {error!r}; is "
                "the server up, and are address and credentials right?"
            ) from error
        if isinstance(files, LocalFileSystem):
            return FolderPlace(Path(root), self._where)
        return self._store_place(client_of(files, root))

    def _make_s3(self) -> StoreClient:
        bucket, _, prefix = self._url.partition("://")[2].partition("/")
        if not bucket or "@" in bucket:
            raise InvalidRequest(
                f"object URL {self.location} names no bucket: write s3://BUCKET/PREFIX, and give "
                "credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or object-options"
            )
        folder = prefix.strip("/")
        arguments = bucket, f"{folder}/" if folder else "", S3Options.of(self._options)
        try:
            # Only who uses S3 has to have these.
            if self._client == "obstore":
                from forebay_server.tier.s3_obstore import ObstoreClient

                return ObstoreClient(*arguments)
            from forebay_server.tier.s3 import S3Client

            return S3Client(*arguments)
        except ImportError as error:
            extra = "s3" if self._client == "s3fs" else "obstore"
            raise InvalidRequest(
                f"object URL {self.location} needs a library that is missing ({error}): install "
                f"forebay[{extra}]"
            ) from error

    def _store_place(self, client: StoreClient) -> StorePlace:
        return StorePlace(
            self.name,
            client,
            self._where,
            self._left_over_seconds,
            must_be_exclusive=not self.caches_only,
        )


def _checked(name: str) -> str:
    if not _NAME.match(name) or name.startswith(f"{UNFINISHED_FOLDER}/"):
        raise InvalidRequest(
            f"object name {name!r} is not allowed: use letters, digits, '.', '_', '-' and '/', "
            f"each part starting with a letter or digit, and not {UNFINISHED_FOLDER}/"
        )
    return name
