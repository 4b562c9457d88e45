"""A connection to a daemon and everything reachable from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from forebay._channel import CALL_SECONDS, CONNECT_SECONDS, RpcChannel
from forebay.address import Address, parse_address
from forebay.imports import ImportCalls
from forebay.integrity import IntegrityCalls
from forebay.methods import Admin, Blobs, Checkpoints, Datasets
from forebay.movement import MovementCalls
from forebay.origins import OriginCalls
from forebay.runs import Run
from forebay.transfer import Transfer, make_transfer
from forebay_wire.closing import Closing
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.ids import check_name
from forebay_wire.limits import MAX_PAGE_ROWS, MIB
from forebay_wire.manifest import DatasetManifest, SelectionManifest, parse
from forebay_wire.protocol import DataEndpoint
from forebay_wire.v1 import admin_pb2, blobs_pb2, checkpoints_pb2, datasets_pb2

if TYPE_CHECKING:
    import pyarrow as pa

    from forebay.dataset.dataset import Dataset
    from forebay.dataset.schema import Schema
    from forebay.dataset.write import DatasetWriter
    from forebay.dataset.write_columns import ColumnsWriter

DELETE_SECONDS = 300.0
"""Deleting removes files of the object tier first."""

WAIT_MARGIN_SECONDS = 10.0
"""A wait is answered by the daemon at its end; the call's own deadline comes later."""


def connect(
    address: str | os.PathLike[str] | None = None,
    *,
    token: str | None = None,
    timeout: float = CONNECT_SECONDS,
) -> Client:
    """A client of the daemon at *address*.

    *address* is a data folder (``"data/"``; its daemon is started if none runs, and ends by itself
    a minute after its last client), ``"unix:/…/rpc.sock"``, ``"grpc://host:7070"`` or
    ``"grpcs://host:7070"``. None means ``$FOREBAY_ADDRESS``, else the data folder
    ``$FOREBAY_DATA`` or ``./data`` if its daemon runs. *token* is for TCP (default:
    ``$FOREBAY_TOKEN``, then the file ``$FOREBAY_TOKEN_FILE``).

    Raises DaemonUnavailable if nobody answers within *timeout* seconds, VersionMismatch if the
    daemon speaks no common protocol, Unauthenticated without a token that it gave.
    """
    return _connect_to(parse_address(address, token), timeout)


def _connect_to(address: Address, timeout: float = CONNECT_SECONDS) -> Client:
    client = Client(address)
    try:
        client.channel.connect(timeout)
        client.channel.attach()
    except BaseException:
        client.close()
        raise
    return client


class Client(Closing, MovementCalls, IntegrityCalls, OriginCalls, ImportCalls):
    """What :func:`connect` returns. Thread-safe, fork-safe (a child connects anew at first use).

    Close it, or use it in a ``with``; a client nobody refers to any more closes itself.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.channel = RpcChannel(address)
        self._transfer: Transfer | None = None

    def close(self) -> None:
        """End the connection. Idempotent. What was mapped stays readable."""
        self._transfer = None  # its connection goes with the last blob or client that uses it
        self.channel.close()

    def __repr__(self) -> str:
        return f"<forebay.Client of {self.address}>"

    def reconnect(self) -> Callable[[], Client]:
        """What connects another process to the same daemon; small and picklable."""
        return partial(_connect_to, self.address)

    @property
    def endpoint(self) -> DataEndpoint:
        """How any process reaches the daemon's bytes: small and picklable."""
        return self.channel.connect()

    @property
    def transfer(self) -> Transfer:
        """The way to the daemon's bytes that this process uses."""
        self._transfer = make_transfer(self.endpoint)
        return self._transfer

    # The daemon.

    def status(self) -> admin_pb2.StatusResponse:
        """Tiers with their bytes, counts, background work: fields as in ``admin.proto``."""
        return self.channel.call(Admin.Status, admin_pb2.StatusRequest())

    # Datasets.

    def datasets(self) -> list[str]:
        """The names of all datasets, in order."""
        return [summary.name for summary in self.dataset_summaries()]

    def dataset_summaries(self) -> list[datasets_pb2.DatasetSummary]:
        """All datasets with rows, bytes and durability of their newest version."""
        found: list[datasets_pb2.DatasetSummary] = []
        after = ""
        while True:
            request = datasets_pb2.ListDatasetsRequest(after=after, limit=MAX_PAGE_ROWS)
            page = self.channel.call(Datasets.ListDatasets, request)
            found.extend(page.datasets)
            after = page.next
            if not after:
                return found

    def describe_dataset(self, name: str) -> datasets_pb2.Dataset:
        """A dataset's versions (oldest first) and splits. NotFound if there is none."""
        request = datasets_pb2.GetDatasetRequest(name=check_name("dataset", name))
        return self.channel.call(Datasets.GetDataset, request)

    def dataset(
        self, name: str, version: int | str = "latest", split: str | None = None
    ) -> Dataset:
        """A version of a dataset, or a split of it, to read from.

        *version* is a number or ``"latest"``. With *split*, ``"latest"`` is the newest version
        that has this split. Raises NotFound naming what there is instead.
        """
        from forebay.dataset.dataset import Dataset  # loads pyarrow, which not every client needs

        found = self.describe_dataset(name)
        chosen = _choose_version(found, version, split)
        context = f"dataset {name} v{chosen.version}"
        manifest = parse(self.read_manifest(chosen.manifest), context, chosen.manifest)
        if not isinstance(manifest, DatasetManifest):
            raise IntegrityError(f"manifest {chosen.manifest} is not that of {context}")
        if split is None:
            return Dataset(manifest, chosen.manifest, self.endpoint, control=self)
        selection_id = _choose_selection(found, chosen.version, split).manifest
        context = f"split {split} of {context}"
        selection = parse(self.read_manifest(selection_id), context, selection_id)
        if not isinstance(selection, SelectionManifest):
            raise IntegrityError(f"manifest {selection_id} is not that of {context}")
        return Dataset(
            manifest,
            chosen.manifest,
            self.endpoint,
            selection=selection,
            selection_id=selection_id,
            control=self,
        )

    def create_dataset(
        self,
        name: str,
        schema: Mapping[str, Any] | pa.Schema | Schema | None = None,
        *,
        shard_bytes: int = 64 * MIB,
        batch_bytes: int = 2 * MIB,
        metadata: Mapping[str, Any] | None = None,
        policy: str = "",
    ) -> DatasetWriter:
        """A writer of version 1 of a new dataset; leaving its ``with`` block commits it.

        *policy*: the named policy that its bytes follow from the first one on (``set_policy``).
        *schema* maps columns to types (``forebay.Array(dtype, shape)``, ``"int64"``, …); without
        one it is inferred. AlreadyExists if the name is taken, now or at the commit.
        """
        from forebay.dataset.write import DatasetWriter

        if policy:
            self.set_policy(f"dataset {name}", policy)
        return DatasetWriter(
            self.channel,
            self.transfer,
            name,
            schema=schema,
            shard_bytes=shard_bytes,
            batch_bytes=batch_bytes,
            metadata=metadata,
        )

    def append_dataset(
        self,
        name: str,
        *,
        base: Dataset | None = None,
        shard_bytes: int = 64 * MIB,
        batch_bytes: int = 2 * MIB,
        metadata: Mapping[str, Any] | None = None,
    ) -> DatasetWriter:
        """A writer of the next version: the newest one's rows, then what is written.

        Conflict at the commit if somebody else appended meanwhile; with *base*, a version of the
        dataset that was opened before, if anybody has since then.
        """
        from forebay.dataset.write import DatasetWriter

        newest = self.dataset(name) if base is None else base
        return DatasetWriter(
            self.channel,
            self.transfer,
            name,
            schema=newest.schema,
            base_version=newest.version,
            base_shards=newest.manifest.num_shards,
            base_manifest=newest.manifest_id,
            shard_bytes=shard_bytes,
            batch_bytes=batch_bytes,
            metadata=metadata,
        )

    def write_columns(
        self,
        name: str,
        schema: Mapping[str, Any] | pa.Schema | Schema | None = None,
        *,
        replace: bool = False,
        base: Dataset | None = None,
        shard_bytes: int = 64 * MIB,
        batch_bytes: int = 2 * MIB,
    ) -> ColumnsWriter:
        """A writer of columns beside those of the newest version, one value for each of its rows
        in order: the next version has them, and the other columns where they lie.

            with client.write_columns("mnist", {"label": "int64"}, replace=True) as writer:
                for label in corrected:
                    writer.write(label=label)

        Nothing else is read or written, whatever the size of the dataset. *schema*: of these
        columns alone, inferred if not given. *replace*: some of them are there already. Conflict at
        the commit if somebody else made a version meanwhile; with *base*, a version that was opened
        before, if anybody has since then. ``Dataset.add_columns`` computes them from others.
        """
        from forebay.dataset.write_columns import ColumnsWriter

        return ColumnsWriter(
            self.channel,
            self.transfer,
            self.dataset(name) if base is None else base,
            schema=schema,
            replace=replace,
            shard_bytes=shard_bytes,
            batch_bytes=batch_bytes,
        )

    def drop_columns(
        self, name: str, columns: Sequence[str], *, base: Dataset | None = None
    ) -> int:
        """Make a version of the newest one (or *base*, if that is still the newest) that lacks
        *columns*; its number. Nothing is written or freed: earlier versions have them."""
        from forebay.dataset.write_columns import drop_columns

        return drop_columns(self, self.dataset(name) if base is None else base, columns)

    def delete_dataset(self, name: str, *, now: bool = False, force: bool = False) -> bool:
        """Put a dataset with all versions into the trash; whether it existed.

        Its name is free, and :meth:`restore_trash` brings it back within the daemon's grace
        period. *now*: it goes for good, in the object tier first. Conflict while a committed
        checkpoint stands on a version of it, which *force* takes its data from.
        """
        return self.remove_dataset(name, now=now, force=force).existed

    def remove_dataset(
        self, name: str, *, now: bool = False, force: bool = False
    ) -> datasets_pb2.DeleteDatasetResponse:
        """:meth:`delete_dataset`, with the checkpoints that stood on it."""
        request = datasets_pb2.DeleteDatasetRequest(
            name=check_name("dataset", name), now=now, force=force
        )
        return self.channel.call(Datasets.DeleteDataset, request, timeout=DELETE_SECONDS)

    def define_splits(
        self, name: str, version: int, shares: Mapping[str, float], seed: int = 0
    ) -> None:
        """Define splits of a version: name to fraction. Dataset.define_splits is the short way."""
        request = datasets_pb2.DefineSplitsRequest(
            dataset=name,
            version=version,
            shares=[
                datasets_pb2.SplitShare(name=check_name("split", split), fraction=fraction)
                for split, fraction in shares.items()
            ],
            seed=seed,
        )
        self.channel.call(Datasets.DefineSplits, request)

    def define_folds(
        self,
        name: str,
        version: int,
        k: int,
        seed: int = 0,
        prefix: str = "fold",
        *,
        within: str = "",
    ) -> None:
        """Define k folds of a version, or of its split *within*. Dataset.define_folds is the short
        way."""
        request = datasets_pb2.DefineFoldsRequest(
            dataset=name,
            version=version,
            num_folds=max(0, k),
            seed=seed,
            prefix=check_name("fold", prefix),
            within=within,
        )
        self.channel.call(Datasets.DefineFolds, request)

    def wait_version(
        self, name: str, version: int, durability: str = "remote", timeout: float = 60.0
    ) -> None:
        """Wait until a version is *durability* ("local", "remote"), or DeadlineExceeded."""
        request = datasets_pb2.WaitVersionRequest(
            dataset=name, version=version, durability=durability, timeout_seconds=timeout
        )
        self.channel.call(Datasets.WaitVersion, request, timeout=timeout + WAIT_MARGIN_SECONDS)

    def read_manifest(self, manifest: str) -> bytes:
        """A manifest's bytes, not yet verified (``forebay_wire.manifest.parse`` does)."""
        request = blobs_pb2.ReadManifestRequest(manifest=manifest)
        chunks = self.channel.collect(Blobs.ReadManifest, request, timeout=2 * CALL_SECONDS)
        return b"".join(chunk.data for chunk in chunks)

    # Checkpoints.

    def runs(self) -> list[checkpoints_pb2.RunSummary]:
        """All runs, by name, with their newest generation."""
        found: list[checkpoints_pb2.RunSummary] = []
        after = ""
        while True:
            request = checkpoints_pb2.ListRunsRequest(after=after, limit=MAX_PAGE_ROWS)
            page = self.channel.call(Checkpoints.ListRuns, request)
            found.extend(page.runs)
            after = page.next
            if not after:
                return found

    def run(self, name: str) -> Run:
        """A run to manage: tags, pins, notes, metrics, lineage, what is kept. Asks nothing yet."""
        return Run(self, name)

    def checkpoints(self, run: str) -> list[checkpoints_pb2.Generation]:
        """All generations of a run, newest first, those not committed included. NotFound."""
        return self.describe_run(run)[1]

    def describe_run(
        self, run: str
    ) -> tuple[list[checkpoints_pb2.Attempt], list[checkpoints_pb2.Generation]]:
        """A run's attempts and generations, newest first. NotFound if there is no such run."""
        attempts: dict[int, checkpoints_pb2.Attempt] = {}
        generations: list[checkpoints_pb2.Generation] = []
        after = ""
        while True:
            request = checkpoints_pb2.ListGenerationsRequest(
                run=check_name("run", run), limit=MAX_PAGE_ROWS, after=after
            )
            page = self.channel.call(Checkpoints.ListGenerations, request)
            attempts.update((attempt.attempt, attempt) for attempt in page.attempts)
            generations.extend(page.generations)
            after = page.next
            if not after:
                return list(attempts.values()), generations

    def delete_checkpoints(
        self,
        run: str,
        *,
        attempt: int | None = None,
        step: int | None = None,
        now: bool = False,
    ) -> int:
        """Put one generation into the trash, or without *attempt* and *step* the whole run; how
        many went. *now*: for good."""
        request = checkpoints_pb2.DeleteGenerationRequest(
            run=check_name("run", run),
            attempt=attempt or 0,
            step=step or 0,
            all=attempt is None and step is None,
            now=now,
        )
        answer = self.channel.call(Checkpoints.DeleteGeneration, request, timeout=DELETE_SECONDS)
        return answer.num_deleted


def _choose_version(
    found: datasets_pb2.Dataset, version: int | str, split: str | None
) -> datasets_pb2.DatasetVersion:
    by_number = {one.version: one for one in found.versions}
    if version == "latest":
        having = {one.version for one in found.selections if one.name == split}
        candidates = having & by_number.keys() if split is not None else by_number.keys()
        if not candidates:
            raise _no_split(found, split or "", None)
        return by_number[max(candidates)]
    try:
        return by_number[int(version)]
    except (KeyError, ValueError):
        raise NotFound(
            f"dataset {found.name!r} has no version {version!r}; it has {sorted(by_number)}"
        ) from None


def _choose_selection(
    found: datasets_pb2.Dataset, version: int, split: str
) -> datasets_pb2.Selection:
    for one in found.selections:
        if one.name == split and one.version == version:
            return one
    raise _no_split(found, split, version)


def _no_split(found: datasets_pb2.Dataset, split: str, version: int | None) -> NotFound:
    names = sorted({f"{one.name} (v{one.version})" for one in found.selections})
    of = f" v{version}" if version is not None else ""
    return NotFound(
        f"dataset {found.name!r}{of} has no split {split!r}; it has {', '.join(names) or 'none'}: "
        "define it with client.dataset(...).define_splits({...})"
    )
