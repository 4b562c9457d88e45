"""The Datasets service: converts between messages and the use cases."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

import grpc.aio

from forebay_server.catalog.queries_datasets import DatasetInfo, VersionInfo
from forebay_server.catalog.queries_origins import OriginRow
from forebay_server.model.versions import NewColumns
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.origins import OriginDatasets, Registered
from forebay_server.publish.parts import NewPart, Parts
from forebay_server.publish.selections import NewSelection
from forebay_server.publish.shards import ShardCommit
from forebay_server.publish.statistics import KeptStatistics, Subject
from forebay_server.rpc.interceptors import caller_uid
from forebay_wire.errors import InvalidRequest
from forebay_wire.v1 import datasets_pb2 as messages
from forebay_wire.v1 import datasets_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class DatasetsService(datasets_pb2_grpc.DatasetsServicer):
    """What each call promises stands in ``datasets.proto``."""

    def __init__(
        self,
        datasets: Datasets,
        origins: OriginDatasets,
        parts: Parts,
        statistics: KeptStatistics,
    ) -> None:
        self._datasets = datasets
        self._parts = parts
        self._statistics = statistics
        self._origins = origins

    async def ListDatasets(
        self, request: messages.ListDatasetsRequest, context: Context
    ) -> messages.ListDatasetsResponse:
        page, following = await self._datasets.list(request.after, request.limit)
        rows = [messages.DatasetSummary(**vars(summary)) for summary in page]
        return messages.ListDatasetsResponse(datasets=rows, next=following)

    async def GetDataset(
        self, request: messages.GetDatasetRequest, context: Context
    ) -> messages.Dataset:
        return convert_dataset(await self._datasets.get(request.name))

    async def CommitVersion(
        self, request: messages.CommitVersionRequest, context: Context
    ) -> messages.DatasetVersion:
        commit = VersionCommit(
            dataset=request.dataset,
            base_version=request.base_version,
            schema=request.schema,
            shards=_shards(request.shards),
            request=request.request,
            metadata_json=request.metadata_json,
            write=request.write,
            base_manifest=request.base_manifest,
            columns=_columns(request) if request.HasField("columns") else None,
        )
        return convert_version(await self._datasets.commit_version(commit, caller_uid()))

    async def SealPart(
        self, request: messages.SealPartRequest, context: Context
    ) -> messages.SealPartResponse:
        new = NewPart(
            write=request.write,
            part=request.part,
            dataset=request.dataset,
            schema=request.schema,
            shards=_shards(request.shards),
            keep_seconds=request.keep_seconds,
        )
        return messages.SealPartResponse(counted=await self._parts.seal(new, caller_uid()))

    async def ListParts(
        self, request: messages.ListPartsRequest, context: Context
    ) -> messages.ListPartsResponse:
        dataset, schema, found, following = await self._parts.page(
            request.write, caller_uid(), request.after, request.limit
        )
        version = 0
        if request.dataset:
            version = await self._parts.version(request.dataset, request.write, caller_uid())
        return messages.ListPartsResponse(
            dataset=dataset,
            schema=schema,
            parts=[
                messages.SealedPart(
                    part=one.part,
                    shards=[messages.ShardCommit(**vars(shard)) for shard in one.shards],
                )
                for one in found
            ],
            next=following,
            version=version,
        )

    async def DropParts(
        self, request: messages.DropPartsRequest, context: Context
    ) -> messages.DropPartsResponse:
        dropped = await self._parts.drop(request.write, caller_uid(), request.parts)
        return messages.DropPartsResponse(num_dropped=dropped)

    async def DefineSplits(
        self, request: messages.DefineSplitsRequest, context: Context
    ) -> messages.Dataset:
        fractions = {share.name: share.fraction for share in request.shares}
        if len(fractions) != len(request.shares):
            raise InvalidRequest("two splits have the same name")
        return convert_dataset(
            await self._datasets.define_splits(
                request.dataset, request.version, fractions, request.seed
            )
        )

    async def DefineFolds(
        self, request: messages.DefineFoldsRequest, context: Context
    ) -> messages.Dataset:
        return convert_dataset(
            await self._datasets.define_folds(
                request.dataset,
                request.version,
                request.num_folds,
                request.seed,
                request.prefix,
                request.within,
            )
        )

    async def DefineSelections(
        self, request: messages.DefineSelectionsRequest, context: Context
    ) -> messages.Dataset:
        wanted = [
            NewSelection(
                name=one.name,
                num_rows=one.num_rows,
                encoding=one.encoding,
                shards=_shards(one.shards),
                counts=tuple(one.counts),
                digest=one.digest,
                definition_json=one.definition_json,
            )
            for one in request.selections
        ]
        return convert_dataset(
            await self._datasets.define_selections(
                request.dataset, request.version, wanted, caller_uid()
            )
        )

    async def GetStatistics(
        self, request: messages.GetStatisticsRequest, context: Context
    ) -> messages.Statistics:
        return _convert_statistics(await self._statistics.get(_subject(request.of)))

    async def StoreStatistics(
        self, request: messages.StoreStatisticsRequest, context: Context
    ) -> messages.Statistics:
        return _convert_statistics(
            await self._statistics.store(
                _subject(request.of), request.columns_json, replaces=request.replaces
            )
        )

    async def DeleteDataset(
        self, request: messages.DeleteDatasetRequest, context: Context
    ) -> messages.DeleteDatasetResponse:
        delete = self._datasets.delete_now if request.now else self._datasets.delete
        standing = await self._datasets.standing_on(request.name)
        existed = await delete(request.name, force=request.force)
        return messages.DeleteDatasetResponse(
            existed=existed, stranded=[str(one.generation) for one in standing]
        )

    async def RegisterOrigins(
        self, request: messages.RegisterOriginsRequest, context: Context
    ) -> messages.RegisterOriginsResponse:
        found = await self._origins.register(request.urls, request.format)
        return messages.RegisterOriginsResponse(origins=[_convert_registered(one) for one in found])

    async def ListOrigins(
        self, request: messages.ListOriginsRequest, context: Context
    ) -> messages.ListOriginsResponse:
        page, more = await self._origins.page(
            request.dataset, request.version, request.after, request.limit
        )
        return messages.ListOriginsResponse(
            origins=[_convert_origin(one) for one in page], more=more
        )

    async def PinOrigins(
        self, request: messages.PinOriginsRequest, context: Context
    ) -> messages.DatasetVersion:
        return convert_version(await self._origins.pin(request.dataset, request.request))

    async def WaitVersion(
        self, request: messages.WaitVersionRequest, context: Context
    ) -> messages.DatasetVersion:
        return convert_version(
            await self._datasets.wait_version(
                request.dataset, request.version, request.durability, request.timeout_seconds
            )
        )


def _columns(request: messages.CommitVersionRequest) -> NewColumns:
    new = request.columns
    schema = base64.b64encode(new.schema).decode()
    return NewColumns(tuple(new.columns), schema, tuple(new.dropped))


def _shards(given: Iterable[messages.ShardCommit]) -> tuple[ShardCommit, ...]:
    return tuple(
        ShardCommit(
            session=shard.session,
            blob=shard.blob,
            num_bytes=shard.num_bytes,
            num_rows=shard.num_rows,
            batch_rows=tuple(shard.batch_rows),
            format=shard.format,
        )
        for shard in given
    )


def _subject(of: messages.StatisticsSubject) -> Subject:
    return Subject(of.dataset, of.version, of.manifest, of.selection)


def _convert_statistics(records: Iterable[tuple[str, bytes]]) -> messages.Statistics:
    return messages.Statistics(
        records=[messages.StatisticsRecord(manifest=name, data=data) for name, data in records]
    )


def _convert_registered(found: Registered) -> messages.Origin:
    return messages.Origin(
        origin=found.origin,
        url=found.ref.url,
        num_bytes=found.num_bytes,
        validator_json=json.dumps(found.ref.validator),
        schema=found.content.schema,
        batch_rows=found.content.batch_rows,
        has_dictionaries=found.content.has_dictionaries,
        footer=found.footer,
    )


def _convert_origin(row: OriginRow) -> messages.Origin:
    return messages.Origin(
        origin=row.origin,
        url=row.ref.url,
        num_bytes=row.num_bytes,
        validator_json=json.dumps(row.ref.validator),
        blob=row.blob,
    )


def convert_version(version: VersionInfo) -> messages.DatasetVersion:
    return messages.DatasetVersion(**vars(version))


def convert_dataset(found: DatasetInfo) -> messages.Dataset:
    return messages.Dataset(
        name=found.name,
        versions=[convert_version(version) for version in found.versions],
        selections=[messages.Selection(**vars(selection)) for selection in found.selections],
    )
