"""Statistics of versions and selections: computed by a client once, kept here for everybody."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Protocol

from forebay_server.catalog import queries_statistics as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_datasets import find_version
from forebay_server.model.kept_statistics import Record, keep
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound
from forebay_wire.ids import check_id, check_name
from forebay_wire.limits import MIB, check_limit
from forebay_wire.manifest import StatisticsManifest, parse

MAX_STATISTICS_BYTES: Final = 2 * MIB
"""Of all records of one version or selection: they travel in one message."""


class JobRunner(Protocol):
    """What statistics need of :class:`forebay_server.move.jobs.Jobs`."""

    def wake(self) -> None:
        """There may be new work."""
        ...


@dataclass(frozen=True)
class Subject:
    """Whose statistics."""

    dataset: str
    version: int
    manifest: str
    """Of the version: tells it from that of a dataset that was deleted and made anew."""
    selection: str = ""
    """Manifest of the selection; empty: the whole version."""


class KeptStatistics:
    """The use cases. Belongs to the event loop; holds no state."""

    def __init__(self, catalog: Catalog, jobs: JobRunner) -> None:
        self._catalog = catalog
        self._jobs = jobs

    async def get(self, of: Subject) -> list[tuple[str, bytes]]:
        """The records that are kept, ``(manifest id, bytes)``, oldest first: where two have figures
        of a column, the later one's count. They are not verified: who reads them does that."""
        _check(of)
        return await self._catalog.read(lambda connection: _find(connection, of))

    async def store(
        self, of: Subject, columns_json: str, *, replaces: bool
    ) -> list[tuple[str, bytes]]:
        """Keep figures of columns, durable on return; what is kept then, as :meth:`get` gives it.

        Columns of which figures are kept already stay as they are, unless *replaces*. Damaged
        records are dropped. :class:`NotFound` if the version or selection is gone.
        """
        _check(of)
        columns = _columns(columns_json)

        def apply(connection: Connection) -> list[tuple[str, bytes]]:
            records = [_record(*one) for one in _find(connection, of)]
            todo = keep(records, columns, replaces=replaces)
            found = StatisticsManifest(
                of.dataset, of.version, of.manifest, of.selection, todo.columns
            )
            identity, data = found.encode()
            kept = {record.manifest for record in records}
            for manifest in todo.dropped:
                if manifest != identity or not todo.columns:
                    queries.drop_statistics(connection, manifest)
            if todo.columns and identity in kept:
                queries.rewrite_statistics(connection, found, identity, data)
            elif todo.columns:
                queries.insert_statistics(connection, found, identity, data)
            now = _find(connection, of)
            check_limit(
                "bytes of statistics of a version or split",
                sum(len(data) for _, data in now),
                MAX_STATISTICS_BYTES,
                "take statistics along dimensions with fewer entries",
            )
            return now

        made = await self._catalog.write(apply)
        self._jobs.wake()
        return made


def _check(of: Subject) -> None:
    check_name("dataset", of.dataset)
    check_id("manifest", of.manifest)
    if of.selection:
        check_id("selection", of.selection)


def _find(connection: Connection, of: Subject) -> list[tuple[str, bytes]]:
    version = find_version(connection, of.dataset, of.version) if of.version else None
    if version is None or version.manifest != of.manifest:
        raise NotFound(
            f"version {of.version} of dataset {of.dataset} is gone: the dataset was deleted since"
        )
    if of.selection and not queries.has_selection(connection, of.dataset, of.version, of.selection):
        raise NotFound(
            f"version {of.version} of dataset {of.dataset} has no selection {of.selection}"
        )
    return queries.find_statistics(connection, of.dataset, of.version, of.selection)


def _record(manifest: str, data: bytes) -> Record:
    try:
        found = parse(data, f"statistics, manifest {manifest}", manifest)
    except IntegrityError:
        return Record(manifest, None)
    assert isinstance(found, StatisticsManifest), "its row names it, and its digest matches"
    return Record(manifest, frozenset(found.columns))


def _columns(text: str) -> dict[str, Any]:
    check_limit("bytes of statistics", len(text.encode()), MAX_STATISTICS_BYTES, "keep fewer")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"the statistics are no JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise InvalidRequest("the statistics are no JSON object of columns")
    return value
