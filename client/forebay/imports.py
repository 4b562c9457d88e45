"""Datasets made of data in other formats, or by many processes; part of :class:`forebay.Client`."""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import TYPE_CHECKING, Any

from forebay_wire.errors import AlreadyExists, Conflict, DaemonUnavailable, InvalidRequest
from forebay_wire.ids import check_name, new_random_name
from forebay_wire.limits import MIB

if TYPE_CHECKING:
    import pyarrow as pa

    from forebay.dataset.dataset import Dataset
    from forebay.dataset.parallel import Connection, WriteSession
    from forebay.dataset.schema import Schema
    from forebay.importers.piece import Options, Source
    from forebay.importers.run import Progress

logger = logging.getLogger(__name__)

APPEND_TRIES = 16
"""Versions that others may make while one append looks for its base."""

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class ImportCalls(ABC):
    """The calls of :class:`forebay.Client` that read in and write side by side. Thread-safe."""

    @abstractmethod
    def dataset(self, name: str, version: int | str = "latest") -> Dataset:
        """One version of a dataset, by name."""

    @abstractmethod
    def datasets(self) -> list[str]:
        """The names of all datasets."""

    @abstractmethod
    def reconnect(self) -> Callable[[], Connection]:
        """Connects to the same daemon, in any process; picklable."""

    def write_session(
        self,
        name: str,
        schema: Mapping[str, Any] | pa.Schema | Schema | None = None,
        *,
        append: bool = False,
        columns: bool = False,
        replace: bool = False,
        write: str | None = None,
        shard_bytes: int = 64 * MIB,
        batch_bytes: int = 2 * MIB,
        metadata: Mapping[str, Any] | None = None,
        keep_seconds: float = 6 * 3600.0,
        base: Dataset | None = None,
    ) -> WriteSession:
        """A version of dataset *name* that many processes write, in parts that count once each: see
        :class:`forebay.WriteSession`.

        *schema* as for :meth:`create_dataset`; without one each part infers its own, and they have
        to agree. *append* adds to the newest version, whose schema it is then (or to *base*, if
        that is still the newest at the commit; else Conflict, also if the dataset was deleted and
        made anew). *columns* writes columns beside those of the newest version (or *base*), as
        :meth:`write_columns` does: the parts in their order have one value for each of its rows;
        *replace*: also in the place of columns that are there. *write* names the session: one of
        the same name goes on with the parts that were sealed within the last *keep_seconds*; after
        its commit it is that version, and writes nothing.
        """
        from forebay.dataset.parallel import Target, WriteSession, parsed, serialized
        from forebay.dataset.write_columns import check_columns, refuse_store

        target = Target(
            dataset=check_name("dataset", name),
            write=check_name("write", write or new_random_name()),
            schema=serialized(schema),
            shard_bytes=shard_bytes,
            batch_bytes=batch_bytes,
            keep_seconds=keep_seconds,
        )
        if append and columns:
            raise InvalidRequest("a session appends rows or writes columns, not both")
        if append or columns:
            base = self.dataset(name) if base is None else base
            if columns:
                refuse_store(base)
            target = changed(
                target,
                base_version=base.version,
                base_shards=base.manifest.num_shards,
                base_manifest=base.manifest_id,
                base_schema=serialized(base.schema) if columns else b"",
                replace=replace,
                schema=target.schema if columns else serialized(base.schema),
            )
        text = "" if metadata is None else json.dumps(dict(metadata))
        session = WriteSession(target, self.reconnect(), text)
        if write is not None:
            session.look_for_commit()
        if columns and target.schema and session.version is None:
            new = parsed(target.schema)
            check_columns(parsed(target.base_schema), new, name, replace=replace)
        return session

    def _has_columns(self, base: Dataset, found: Source, told: str) -> bool:
        """Whether the newest version was made of these columns: what an older one was made of may
        have been replaced since."""
        if not base.manifest.parent:
            return False
        write = _write_name(found, base.name, f"columns {base.manifest.parent}", told)
        if self.write_session(base.name, write=write).version != base.version:
            return False
        logger.warning(
            "dataset %r: nothing is written, version %d has these columns of these files already; "
            "again=True writes them once more",
            base.name,
            base.version,
        )
        return True

    def import_dataset(
        self,
        name: str,
        source: Any,
        *,
        format: str | None = None,
        append: bool = False,
        columns: bool = False,
        replace: bool = False,
        again: bool = False,
        types: Mapping[str, Any] | None = None,
        delimiter: str = ",",
        has_header: bool = True,
        shard_bytes: int = 64 * MIB,
        batch_bytes: int = 2 * MIB,
        metadata: Mapping[str, Any] | None = None,
        jobs: int | Callable[[int], int] = 1,
        progress: Progress | None = None,
    ) -> Dataset:
        """Make dataset *name* of *source*, in one version: all of it, or nothing.

        *source* is a path, URL or pattern, or several: files (Parquet, CSV, JSON lines, npz, npy,
        Arrow, WebDataset tar) or folders (of such files; MDS; LitData; what ``datasets`` saved;
        zarr; images in a folder for each class). *format* names the format where the names do not.
        Or it is a ``datasets.Dataset``, a ``pyarrow.Table`` or an iterable of record batches.

        *types* maps columns to the types that they shall have instead of inferred ones. *append*
        adds to the newest version; *columns* adds the source's columns to its rows, one value for
        each in order, or with *replace* also puts them in the place of others. *jobs* processes
        read side by side; they are new interpreters, so a script that asks for them needs ``if
        __name__ == "__main__":``. It may be a function of the source's bytes. *progress* is called
        with the bytes that are done, and all.

        An import that was killed goes on where it was if it is called again within 6 hours, with
        the same files and arguments: parts that were sealed are not read again. An append that was
        committed is remembered as long as the dataset is there: the same files (by path, size and
        ETag or time) with the same arguments append nothing more, and give that version; with
        *again* they are appended once more. SchemaMismatch names file, row and column; NotFound,
        InvalidRequest, IntegrityError name the file.
        """
        from forebay.importers.objects import source_of
        from forebay.importers.piece import Options

        if not (append or columns) and name in self.datasets():
            raise AlreadyExists(
                f"there is a dataset {name!r}: choose another name, append (--append), or delete it"
            )
        options = given = Options(dict(types or {}), delimiter, has_header)
        found = source_of(source, format)
        base = self.dataset(name) if append or columns else None
        schema = base.schema if base is not None and append else found.schema(options)
        if base is not None and columns:
            options = _with_types_of(base.schema, schema, options)
            schema = options.schema(schema.arrow)
        told = repr((given, shard_bytes, batch_bytes))
        if base is not None and columns and not again and self._has_columns(base, found, told):
            return base
        # An append of files that were appended before is the same one, whatever came between.
        how = "create" if base is None else "append"
        if base is not None and (columns or again):
            how = f"{'columns' if columns else 'again'} {base.manifest_id}"
        session = self.write_session(
            name,
            schema,
            append=append,
            columns=columns,
            replace=replace,
            write=_write_name(found, name, how, told),
            shard_bytes=shard_bytes,
            batch_bytes=batch_bytes,
            metadata=_metadata(found, metadata, base),
            base=base,
        )
        if session.version is not None:
            _tell_appended(name, session.version)
            return self.dataset(name, session.version)
        workers = jobs(found.num_bytes) if callable(jobs) else jobs
        work = partial(_write, session, found, schema, options, workers, progress)
        version = work() if base is None or columns else self._appended(session, base, work)
        return self.dataset(name, version)

    def _appended(self, session: WriteSession, base: Dataset, work: Callable[[], int]) -> int:
        """What *work* appends to *base*, or to what others have made of it meanwhile; a version
        that another process made of the same files is that."""
        for _ in range(APPEND_TRIES):
            try:
                return work()
            except Conflict as error:
                session.look_for_commit()
                if session.version is not None:
                    _tell_appended(base.name, session.version)
                    return session.version
                newest = self.dataset(base.name)
                if newest.version <= base.version or newest.schema != base.schema:
                    raise
                if self.dataset(base.name, base.version).manifest_id != base.manifest_id:
                    raise  # of another dataset of that name
                logger.info("%s: appending to version %d instead", error, newest.version)
                session.target = changed(
                    session.target,
                    base_version=newest.version,
                    base_shards=newest.manifest.num_shards,
                    base_manifest=newest.manifest_id,
                )
        return work()


def _tell_appended(name: str, version: int) -> None:
    logger.warning(
        "dataset %r: nothing is added, version %d has these files already; again=True appends them "
        "once more",
        name,
        version,
    )


def _write(
    session: WriteSession,
    found: Source,
    schema: Schema,
    options: Options,
    jobs: int,
    progress: Progress | None,
) -> int:
    """Write and commit all parts of *found*; the version."""
    from forebay.importers.run import write_parts

    if jobs < 1:
        raise InvalidRequest(f"{jobs} jobs: at least 1")
    parts = found.parts(session.target.shard_bytes)
    try:
        write_parts(
            session,
            parts,
            schema,
            options,
            jobs=jobs if found.can_travel else 1,
            progress=progress,
        )
        return session.commit([part.name for part in parts])
    except (DaemonUnavailable, Conflict, KeyboardInterrupt):
        raise  # what is sealed stays for the next try
    except BaseException:
        session.abort()
        raise


def _with_types_of(base: Schema, found: Schema, options: Options) -> Options:
    """*options* under which columns that are replaced keep the type that they have in *base*."""
    there = [c for c in base.columns if c.name in found.names and c.kind != "arrow"]
    types = {c.name: c.spec() for c in there}
    return changed(options, types={**types, **options.types})


def _write_name(found: Source, name: str, how: str, options: str) -> str:
    """The same for the same import; a random one where that cannot be known."""
    digest = found.digest(name, how, options)
    return f"import-{digest}" if digest else new_random_name()


def _metadata(
    found: Source, given: Mapping[str, Any] | None, base: Dataset | None
) -> Mapping[str, Any] | None:
    """The user's, over what the format says; an append changes nothing by itself."""
    if base is not None or not found.metadata:
        return given
    return {**found.metadata, **(given or {})}
