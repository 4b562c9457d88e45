from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListDatasetsRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: str
    limit: int
    def __init__(self, after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets", "next")
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[DatasetSummary]
    next: str
    def __init__(self, datasets: _Optional[_Iterable[_Union[DatasetSummary, _Mapping]]] = ..., next: _Optional[str] = ...) -> None: ...

class DatasetSummary(_message.Message):
    __slots__ = ("name", "num_versions", "num_rows", "num_bytes", "durability")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_versions: int
    num_rows: int
    num_bytes: int
    durability: str
    def __init__(self, name: _Optional[str] = ..., num_versions: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_bytes: _Optional[int] = ..., durability: _Optional[str] = ...) -> None: ...

class GetDatasetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("name", "versions", "selections")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    versions: _containers.RepeatedCompositeFieldContainer[DatasetVersion]
    selections: _containers.RepeatedCompositeFieldContainer[Selection]
    def __init__(self, name: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[DatasetVersion, _Mapping]]] = ..., selections: _Optional[_Iterable[_Union[Selection, _Mapping]]] = ...) -> None: ...

class DatasetVersion(_message.Message):
    __slots__ = ("dataset", "version", "manifest", "num_rows", "num_bytes", "num_shards", "created_unix", "durability")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    version: int
    manifest: str
    num_rows: int
    num_bytes: int
    num_shards: int
    created_unix: float
    durability: str
    def __init__(self, dataset: _Optional[str] = ..., version: _Optional[int] = ..., manifest: _Optional[str] = ..., num_rows: _Optional[int] = ..., num_bytes: _Optional[int] = ..., num_shards: _Optional[int] = ..., created_unix: _Optional[float] = ..., durability: _Optional[str] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("name", "version", "manifest", "num_rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    manifest: str
    num_rows: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., manifest: _Optional[str] = ..., num_rows: _Optional[int] = ...) -> None: ...

class ShardCommit(_message.Message):
    __slots__ = ("session", "blob", "num_bytes", "num_rows", "batch_rows", "format")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    session: str
    blob: str
    num_bytes: int
    num_rows: int
    batch_rows: _containers.RepeatedScalarFieldContainer[int]
    format: str
    def __init__(self, session: _Optional[str] = ..., blob: _Optional[str] = ..., num_bytes: _Optional[int] = ..., num_rows: _Optional[int] = ..., batch_rows: _Optional[_Iterable[int]] = ..., format: _Optional[str] = ...) -> None: ...

class CommitVersionRequest(_message.Message):
    __slots__ = ("dataset", "base_version", "schema", "shards", "request", "metadata_json", "write", "base_manifest", "columns")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    BASE_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    base_version: int
    schema: bytes
    shards: _containers.RepeatedCompositeFieldContainer[ShardCommit]
    request: str
    metadata_json: str
    write: str
    base_manifest: str
    columns: NewColumns
    def __init__(self, dataset: _Optional[str] = ..., base_version: _Optional[int] = ..., schema: _Optional[bytes] = ..., shards: _Optional[_Iterable[_Union[ShardCommit, _Mapping]]] = ..., request: _Optional[str] = ..., metadata_json: _Optional[str] = ..., write: _Optional[str] = ..., base_manifest: _Optional[str] = ..., columns: _Optional[_Union[NewColumns, _Mapping]] = ...) -> None: ...

class NewColumns(_message.Message):
    __slots__ = ("columns", "schema", "dropped")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedScalarFieldContainer[str]
    schema: bytes
    dropped: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, columns: _Optional[_Iterable[str]] = ..., schema: _Optional[bytes] = ..., dropped: _Optional[_Iterable[str]] = ...) -> None: ...

class SealPartRequest(_message.Message):
    __slots__ = ("write", "part", "dataset", "schema", "shards", "keep_seconds")
    WRITE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    KEEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    write: str
    part: str
    dataset: str
    schema: bytes
    shards: _containers.RepeatedCompositeFieldContainer[ShardCommit]
    keep_seconds: float
    def __init__(self, write: _Optional[str] = ..., part: _Optional[str] = ..., dataset: _Optional[str] = ..., schema: _Optional[bytes] = ..., shards: _Optional[_Iterable[_Union[ShardCommit, _Mapping]]] = ..., keep_seconds: _Optional[float] = ...) -> None: ...

class SealPartResponse(_message.Message):
    __slots__ = ("counted",)
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    counted: bool
    def __init__(self, counted: _Optional[bool] = ...) -> None: ...

class SealedPart(_message.Message):
    __slots__ = ("part", "shards")
    PART_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    part: str
    shards: _containers.RepeatedCompositeFieldContainer[ShardCommit]
    def __init__(self, part: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[ShardCommit, _Mapping]]] = ...) -> None: ...

class ListPartsRequest(_message.Message):
    __slots__ = ("write", "after", "limit", "dataset")
    WRITE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    write: str
    after: str
    limit: int
    dataset: str
    def __init__(self, write: _Optional[str] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ..., dataset: _Optional[str] = ...) -> None: ...

class ListPartsResponse(_message.Message):
    __slots__ = ("dataset", "schema", "parts", "next", "version")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    schema: bytes
    parts: _containers.RepeatedCompositeFieldContainer[SealedPart]
    next: str
    version: int
    def __init__(self, dataset: _Optional[str] = ..., schema: _Optional[bytes] = ..., parts: _Optional[_Iterable[_Union[SealedPart, _Mapping]]] = ..., next: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class DropPartsRequest(_message.Message):
    __slots__ = ("write", "parts")
    WRITE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    write: str
    parts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, write: _Optional[str] = ..., parts: _Optional[_Iterable[str]] = ...) -> None: ...

class DropPartsResponse(_message.Message):
    __slots__ = ("num_dropped",)
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    num_dropped: int
    def __init__(self, num_dropped: _Optional[int] = ...) -> None: ...

class SplitShare(_message.Message):
    __slots__ = ("name", "fraction")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    fraction: float
    def __init__(self, name: _Optional[str] = ..., fraction: _Optional[float] = ...) -> None: ...

class DefineSplitsRequest(_message.Message):
    __slots__ = ("dataset", "version", "shares", "seed")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    version: int
    shares: _containers.RepeatedCompositeFieldContainer[SplitShare]
    seed: int
    def __init__(self, dataset: _Optional[str] = ..., version: _Optional[int] = ..., shares: _Optional[_Iterable[_Union[SplitShare, _Mapping]]] = ..., seed: _Optional[int] = ...) -> None: ...

class DefineFoldsRequest(_message.Message):
    __slots__ = ("dataset", "version", "num_folds", "seed", "prefix", "within")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_FOLDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    WITHIN_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    version: int
    num_folds: int
    seed: int
    prefix: str
    within: str
    def __init__(self, dataset: _Optional[str] = ..., version: _Optional[int] = ..., num_folds: _Optional[int] = ..., seed: _Optional[int] = ..., prefix: _Optional[str] = ..., within: _Optional[str] = ...) -> None: ...

class NewSelection(_message.Message):
    __slots__ = ("name", "num_rows", "encoding", "shards", "counts", "digest", "definition_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_rows: int
    encoding: str
    shards: _containers.RepeatedCompositeFieldContainer[ShardCommit]
    counts: _containers.RepeatedScalarFieldContainer[int]
    digest: str
    definition_json: str
    def __init__(self, name: _Optional[str] = ..., num_rows: _Optional[int] = ..., encoding: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[ShardCommit, _Mapping]]] = ..., counts: _Optional[_Iterable[int]] = ..., digest: _Optional[str] = ..., definition_json: _Optional[str] = ...) -> None: ...

class DefineSelectionsRequest(_message.Message):
    __slots__ = ("dataset", "version", "selections")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    version: int
    selections: _containers.RepeatedCompositeFieldContainer[NewSelection]
    def __init__(self, dataset: _Optional[str] = ..., version: _Optional[int] = ..., selections: _Optional[_Iterable[_Union[NewSelection, _Mapping]]] = ...) -> None: ...

class StatisticsSubject(_message.Message):
    __slots__ = ("dataset", "version", "manifest", "selection")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    version: int
    manifest: str
    selection: str
    def __init__(self, dataset: _Optional[str] = ..., version: _Optional[int] = ..., manifest: _Optional[str] = ..., selection: _Optional[str] = ...) -> None: ...

class GetStatisticsRequest(_message.Message):
    __slots__ = ("of",)
    OF_FIELD_NUMBER: _ClassVar[int]
    of: StatisticsSubject
    def __init__(self, of: _Optional[_Union[StatisticsSubject, _Mapping]] = ...) -> None: ...

class StoreStatisticsRequest(_message.Message):
    __slots__ = ("of", "columns_json", "replaces")
    OF_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_JSON_FIELD_NUMBER: _ClassVar[int]
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    of: StatisticsSubject
    columns_json: str
    replaces: bool
    def __init__(self, of: _Optional[_Union[StatisticsSubject, _Mapping]] = ..., columns_json: _Optional[str] = ..., replaces: _Optional[bool] = ...) -> None: ...

class StatisticsRecord(_message.Message):
    __slots__ = ("manifest", "data")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    data: bytes
    def __init__(self, manifest: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Statistics(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[StatisticsRecord]
    def __init__(self, records: _Optional[_Iterable[_Union[StatisticsRecord, _Mapping]]] = ...) -> None: ...

class DeleteDatasetRequest(_message.Message):
    __slots__ = ("name", "now", "force")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    now: bool
    force: bool
    def __init__(self, name: _Optional[str] = ..., now: _Optional[bool] = ..., force: _Optional[bool] = ...) -> None: ...

class DeleteDatasetResponse(_message.Message):
    __slots__ = ("existed", "stranded")
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    STRANDED_FIELD_NUMBER: _ClassVar[int]
    existed: bool
    stranded: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, existed: _Optional[bool] = ..., stranded: _Optional[_Iterable[str]] = ...) -> None: ...

class WaitVersionRequest(_message.Message):
    __slots__ = ("dataset", "version", "durability", "timeout_seconds")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    version: int
    durability: str
    timeout_seconds: float
    def __init__(self, dataset: _Optional[str] = ..., version: _Optional[int] = ..., durability: _Optional[str] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class RegisterOriginsRequest(_message.Message):
    __slots__ = ("urls", "format")
    URLS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    urls: _containers.RepeatedScalarFieldContainer[str]
    format: str
    def __init__(self, urls: _Optional[_Iterable[str]] = ..., format: _Optional[str] = ...) -> None: ...

class Origin(_message.Message):
    __slots__ = ("origin", "url", "num_bytes", "validator_json", "schema", "batch_rows", "has_dictionaries", "blob", "footer")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    VALIDATOR_JSON_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    HAS_DICTIONARIES_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    FOOTER_FIELD_NUMBER: _ClassVar[int]
    origin: str
    url: str
    num_bytes: int
    validator_json: str
    schema: bytes
    batch_rows: _containers.RepeatedScalarFieldContainer[int]
    has_dictionaries: bool
    blob: str
    footer: bytes
    def __init__(self, origin: _Optional[str] = ..., url: _Optional[str] = ..., num_bytes: _Optional[int] = ..., validator_json: _Optional[str] = ..., schema: _Optional[bytes] = ..., batch_rows: _Optional[_Iterable[int]] = ..., has_dictionaries: _Optional[bool] = ..., blob: _Optional[str] = ..., footer: _Optional[bytes] = ...) -> None: ...

class RegisterOriginsResponse(_message.Message):
    __slots__ = ("origins",)
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    origins: _containers.RepeatedCompositeFieldContainer[Origin]
    def __init__(self, origins: _Optional[_Iterable[_Union[Origin, _Mapping]]] = ...) -> None: ...

class ListOriginsRequest(_message.Message):
    __slots__ = ("dataset", "version", "after", "limit")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    version: int
    after: int
    limit: int
    def __init__(self, dataset: _Optional[str] = ..., version: _Optional[int] = ..., after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListOriginsResponse(_message.Message):
    __slots__ = ("origins", "more")
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    origins: _containers.RepeatedCompositeFieldContainer[Origin]
    more: bool
    def __init__(self, origins: _Optional[_Iterable[_Union[Origin, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class PinOriginsRequest(_message.Message):
    __slots__ = ("dataset", "request")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    request: str
    def __init__(self, dataset: _Optional[str] = ..., request: _Optional[str] = ...) -> None: ...
