"""Parts of one version, written by many processes: each counts once, a commit takes them all."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from blake3 import blake3

from forebay_server.catalog import queries_parts as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_datasets import version_of_request
from forebay_server.catalog.queries_parts import SealedPart, SealedShard, Write
from forebay_server.publish.shards import ShardCommit
from forebay_wire.errors import Conflict, InvalidRequest
from forebay_wire.ids import check_name
from forebay_wire.limits import MAX_PAGE_ROWS, MIB, check_limit

MAX_KEEP_SECONDS: Final = 7 * 86400.0
MAX_PART_SHARDS: Final = 100
MAX_SCHEMA_BYTES: Final = 1 * MIB


@dataclass(frozen=True)
class NewPart:
    """A part whose shards are sealed, in sessions that live."""

    write: str
    part: str
    dataset: str
    schema: bytes
    shards: tuple[ShardCommit, ...]
    keep_seconds: float


class Parts:
    """The use cases. Belongs to the event loop; holds no state."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def seal(self, new: NewPart, uid: int) -> bool:
        """Count the part, once: False if one of its name counts already.

        Then its sessions are the write's and live for ``keep_seconds`` from the write's last call,
        also if this daemon restarts. :class:`NotFound` if one has ended, :class:`SchemaMismatch`
        for another schema or dataset than that of the parts before, :class:`Conflict` if the write
        was committed.
        """
        check_name("write", new.write)
        check_name("part", new.part)
        check_name("dataset", new.dataset)
        check_limit("shards of a part", len(new.shards), MAX_PART_SHARDS, "make smaller parts")
        check_limit("bytes of the schema", len(new.schema), MAX_SCHEMA_BYTES, "use fewer columns")
        if not 0 < new.keep_seconds <= MAX_KEEP_SECONDS:
            raise InvalidRequest(
                f"parts kept for {new.keep_seconds} s; allowed: up to {MAX_KEEP_SECONDS:.0f}"
            )
        for shard in new.shards:
            shard.check()
            if not shard.session:
                raise InvalidRequest(f"shard {shard.blob} of part {new.part} has no session")
        schema = base64.b64encode(new.schema).decode()
        of = Write(uid, new.write, new.dataset, schema)
        part = SealedPart(new.part, tuple(SealedShard(**vars(one)) for one in new.shards))
        request = request_of(new.dataset, new.write, uid)

        def add(connection: Connection) -> bool:
            made = version_of_request(connection, request)
            if made is not None:
                raise Conflict(
                    f"write {new.write} of dataset {new.dataset} was committed as version "
                    f"{made.version}, so part {new.part} cannot count: give what is new another "
                    "name (write_session(write=...))"
                )
            return queries.add_part(connection, of, part, new.keep_seconds)

        return await self._catalog.write(add)

    async def version(self, dataset: str, write: str, uid: int) -> int:
        """The version of *dataset* that *write* was committed as; 0: none."""
        check_name("dataset", dataset)
        check_name("write", write)
        request = request_of(dataset, write, uid)
        made = await self._catalog.read(partial(version_of_request, request=request))
        return 0 if made is None else made.version

    async def page(
        self, write: str, uid: int, after: str, limit: int
    ) -> tuple[str, bytes, list[SealedPart], str]:
        """Dataset and schema of a write, a page of its parts by name, and the name to go on after
        (empty: no more). A write without parts has neither."""
        check_name("write", write)
        size = min(limit or MAX_PAGE_ROWS, MAX_PAGE_ROWS)
        header, found = await self._catalog.read(
            partial(queries.find_parts, uid=uid, write=write, after=after, limit=size + 1)
        )
        following = found[size - 1].part if len(found) > size else ""
        schema = base64.b64decode(header.get("schema", ""))
        return header.get("dataset", ""), schema, found[:size], following

    async def drop(self, write: str, uid: int, names: Sequence[str]) -> int:
        """Forget parts, or with no names the whole write; how many parts were named and there."""
        check_name("write", write)
        if not names:
            await self._catalog.write(partial(queries.forget_parts, uid=uid, write=write))
            return 0
        return await self._catalog.write(
            partial(queries.drop_parts, uid=uid, write=write, names=names)
        )


def request_of(dataset: str, write: str, uid: int) -> str:
    """The request of the one commit of a write, so that it is known again by the write's name."""
    return blake3(f"write {uid} {dataset} {write}".encode()).hexdigest()[:32]
