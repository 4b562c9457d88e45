"""One version of a dataset written by many processes, in parts that count once each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Protocol, Self

import pyarrow as pa

from forebay.dataset.schema import Schema
from forebay.dataset.uploads import Channel
from forebay.dataset.write import (
    BATCH_BYTES,
    BATCH_COMMIT_BYTES,
    COMMIT_SECONDS,
    SHARD_BYTES,
    SHARD_COMMIT_BYTES,
    DatasetWriter,
)
from forebay.dataset.write_columns import check_columns, put_beside
from forebay.methods import Datasets
from forebay.transfer import Transfer
from forebay_wire.errors import Conflict, InvalidRequest, NotFound
from forebay_wire.ids import check_name, new_random_name
from forebay_wire.limits import MAX_COMMIT_BYTES, MAX_SHARDS_PER_VERSION, MIB, check_limit
from forebay_wire.v1 import datasets_pb2

KEEP_SECONDS: Final = 6 * 3600.0
"""How long sealed parts live after the last call of their session."""

PAGE_PARTS: Final = 50

BESIDE_KEY: Final = b"forebay.beside"
"""In the schema of a part: manifest id of the version that its columns are written beside."""


class Connection(Protocol):
    """What a session needs of a client."""

    @property
    def channel(self) -> Channel: ...

    @property
    def transfer(self) -> Transfer: ...


@dataclass(frozen=True)
class Target:
    """What is written, and how."""

    dataset: str
    write: str
    """Names the session: processes that know it write into the same version."""
    base_version: int = 0
    base_shards: int = 0
    base_manifest: str = ""
    """Of the base version: tells it from that of a dataset that was deleted and made anew."""
    base_schema: bytes = b""
    """Of the base version, beside whose columns some are written; empty: rows are appended."""
    replace: bool = False
    """Whether some of these columns may be there already."""
    schema: bytes = b""
    """Arrow schema, IPC-serialised; empty: that of the first part."""
    shard_bytes: int = SHARD_BYTES
    batch_bytes: int = BATCH_BYTES
    keep_seconds: float = KEEP_SECONDS
    committed_version: int = 0
    """What the write was committed as before this session was made; 0: not yet."""

    def marked(self, schema: Schema) -> bytes:
        """*schema* of a part. Of columns that are written beside those of a version it says of
        which: the daemon refuses parts of unequal schemas in one write, and these belong to rows
        that nobody may exchange meanwhile."""
        if not self.base_schema:
            return serialized(schema)
        mark = {**(schema.arrow.metadata or {}), BESIDE_KEY: self.base_manifest.encode()}
        marked: bytes = schema.arrow.with_metadata(mark).serialize().to_pybytes()
        return marked

    def check_marked(self, schema: bytes) -> None:
        """Conflict if a part of *schema* was written beside another version."""
        found = pa.ipc.read_schema(pa.py_buffer(schema)).metadata or {}
        beside = found.get(BESIDE_KEY, b"").decode()
        if beside != (self.base_manifest if self.base_schema else ""):
            raise Conflict(
                f"the parts of write {self.write!r} were written beside another version of dataset "
                f"{self.dataset!r} than v{self.base_version}, the newest: begin anew under another "
                "name, or go on with write_session(base=...) if that is the newest again"
            )


class PartWriter(DatasetWriter):
    """Writes one part; leaving its ``with`` block seals and counts it, all or nothing.

    A writer as :class:`DatasetWriter` otherwise. :attr:`counted` is False afterwards if a part of
    that name counted already, or the session was made after its write's commit: then nothing of
    this one is kept.
    """

    def __init__(self, target: Target, part: str, connection: Connection) -> None:
        schema = parsed(target.schema) if target.schema else None
        super().__init__(
            connection.channel,
            connection.transfer,
            target.dataset,
            schema=schema,
            base_version=target.base_version,
            shard_bytes=target.shard_bytes,
            batch_bytes=target.batch_bytes,
        )
        self.part = check_name("part", part)
        self.counted: bool | None = None
        """Whether this part counts; None before it is sealed."""
        self._target = target

    def __enter__(self) -> Self:
        return self  # whether the dataset's name is free, the commit says

    def _commit(self) -> int:
        self._seal_all()
        if self._schema is None:
            raise InvalidRequest(
                f"part {self.part!r} of dataset {self.name!r} has no sample, and no schema was "
                "given: write_session(schema=...)"
            )
        if self._target.committed_version:
            self.counted = False
            self._uploads.end(committed=False)
            return 0
        request = datasets_pb2.SealPartRequest(
            write=self._target.write,
            part=self.part,
            dataset=self.name,
            schema=self._target.marked(self._schema),
            shards=self._commits,
            keep_seconds=self._target.keep_seconds,
        )
        answer = self._channel.call(Datasets.SealPart, request, timeout=COMMIT_SECONDS)
        self.counted = answer.counted
        if not answer.counted:
            self._uploads.end(committed=False)
        return 0


@dataclass
class WriteSession:
    """One version in the making; made by :meth:`forebay.Client.write_session`.

    Small and picklable: hand it to processes, on any host that reaches the daemon, and have each
    write parts. ::

        with client.write_session("tokens", schema) as session:
            with ProcessPoolExecutor() as pool:
                list(pool.map(functools.partial(tokenize, session), files))

        def tokenize(session, file):
            with session.part(f"part-{file.stem}") as writer:
                for row in read(file):
                    writer.write(**row)

    A part counts once however often it is written: one whose writer died is written again by
    another, by the same name. Leaving the ``with`` block commits one version, whose rows are those
    of the parts in the order of their names; an exception leaves nothing. Sealed parts live for
    ``keep_seconds`` after the session's last call, also if the daemon restarts: a coordinator that
    died makes a session of the same *write* and goes on with the parts that are missing.

    The name of a *write* remembers its commit, as long as the dataset is there: a session made of
    it afterwards has that :attr:`version` from the start, its parts do not count, and committing
    it changes nothing. A part of an older session that comes after the commit raises Conflict. Not
    thread-safe; each process, or thread, takes a copy.
    """

    target: Target
    connect: Callable[[], Connection]
    """Makes a connection, in any process."""
    metadata_json: str = ""
    version: int | None = None
    """Number of the committed version; None before."""
    _connection: Connection | None = field(default=None, repr=False)

    @property
    def write(self) -> str:
        """The session's own name."""
        return self.target.write

    def part(self, name: str) -> PartWriter:
        """A writer of the part called *name*: letters, digits, ``.``, ``_``, ``-``."""
        return PartWriter(self.target, name, self._connected())

    def parts(self) -> dict[str, int]:
        """The parts that count, by name in order: how many rows each has."""
        return {
            one.part: sum(shard.num_rows for shard in one.shards)
            for page in self._pages()
            for one in page.parts
        }

    def drop(self, *parts: str) -> int:
        """Parts do not count any more, and can be written anew; how many did."""
        if not parts:
            return 0
        request = datasets_pb2.DropPartsRequest(write=self.write, parts=parts)
        return self._connected().channel.call(Datasets.DropParts, request).num_dropped

    def commit(self, parts: Sequence[str] | None = None) -> int:
        """Make the parts one version, visible and durable, and return its number. Idempotent.

        *parts* are those that must be there, in the order of rows; others are dropped. Default: all
        by name. NotFound naming those that are missing; AlreadyExists, Conflict as by a writer,
        also if the dataset that was to be appended to was deleted and made anew meanwhile.
        """
        if self.version is not None:
            return self.version
        found: dict[str, datasets_pb2.SealedPart] = {}
        schema = self.target.schema
        for page in self._pages():
            schema = page.schema or schema
            found.update((one.part, one) for one in page.parts)
        wanted = list(found) if parts is None else list(parts)
        missing = [name for name in wanted if name not in found]
        if missing:
            self.look_for_commit()  # by somebody else, and the parts have gone with it
            if self.version is not None:
                return self.version
        if missing or len(set(wanted)) != len(wanted):
            raise NotFound(
                f"dataset {self.target.dataset!r}: {len(missing)} of {len(wanted)} parts are not "
                f"sealed ({', '.join(missing[:5])}): write them, then commit again"
            )
        if not schema:
            raise InvalidRequest(
                f"dataset {self.target.dataset!r}: no part was written and no schema given"
            )
        shards = [shard for name in wanted for shard in found[name].shards]
        self._check_limits(shards)
        request = datasets_pb2.CommitVersionRequest(
            dataset=self.target.dataset,
            base_version=self.target.base_version,
            schema=schema,
            shards=shards,
            request=new_random_name(),  # the write's name is what a repeat is known by
            metadata_json=self.metadata_json,
            write=self.write,
            base_manifest=self.target.base_manifest,
        )
        if self.target.base_schema:
            self._write_beside(request, parsed(schema))
        made = self._connected().channel.call(
            Datasets.CommitVersion, request, timeout=COMMIT_SECONDS
        )
        self.version = made.version
        return made.version

    def _write_beside(self, request: datasets_pb2.CommitVersionRequest, new: Schema) -> None:
        base = parsed(self.target.base_schema)
        check_columns(base, new, self.target.dataset, replace=self.target.replace)
        put_beside(request, base, new)

    def abort(self) -> None:
        """Drop all parts. Nothing after a commit."""
        if self.version is None:
            request = datasets_pb2.DropPartsRequest(write=self.write)
            self._connected().channel.call(Datasets.DropParts, request)

    def look_for_commit(self) -> None:
        """Learn whether a session of this write was committed before: :attr:`version`."""
        request = datasets_pb2.ListPartsRequest(
            write=self.write, limit=1, dataset=self.target.dataset
        )
        page = self._connected().channel.call(Datasets.ListParts, request)
        if page.schema and not page.version:
            self.target.check_marked(page.schema)
        if page.version:
            self.target = replace(self.target, committed_version=page.version)
            self.version = page.version

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def _pages(self) -> Iterator[datasets_pb2.ListPartsResponse]:
        after = ""
        while True:
            request = datasets_pb2.ListPartsRequest(write=self.write, after=after, limit=PAGE_PARTS)
            page = self._connected().channel.call(Datasets.ListParts, request)
            yield page
            after = page.next
            if not after:
                return

    def _check_limits(self, shards: Sequence[datasets_pb2.ShardCommit]) -> None:
        advice = f"write larger shards than shard_bytes={self.target.shard_bytes}"
        num_shards = self.target.base_shards + len(shards)
        check_limit("shards of a version", num_shards, MAX_SHARDS_PER_VERSION, advice)
        num_batches = sum(len(shard.batch_rows) for shard in shards)
        check_limit(
            "bytes of a commit's list of shards and record batches",
            SHARD_COMMIT_BYTES * len(shards) + BATCH_COMMIT_BYTES * num_batches,
            MAX_COMMIT_BYTES - 2 * MIB,
            f"{advice}, or append the rest as another version",
        )

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self.connect()
        return self._connection


def parsed(schema: bytes) -> Schema:
    """A schema as a target has it."""
    return Schema.from_arrow(pa.ipc.read_schema(pa.py_buffer(schema)))


def serialized(schema: Mapping[str, Any] | pa.Schema | Schema | None) -> bytes:
    """*schema* as a target has it."""
    return b"" if schema is None else Schema.of(schema).arrow.serialize().to_pybytes()
