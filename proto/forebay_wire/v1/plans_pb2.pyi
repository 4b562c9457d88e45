from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OrderParameters(_message.Message):
    __slots__ = ("manifest", "selection", "shuffle", "seed", "global_batch_size", "last_batch", "rank", "num_ranks", "num_epochs", "window_blocks", "block_rows", "lanes", "columns")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAST_BATCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ROWS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    selection: str
    shuffle: str
    seed: int
    global_batch_size: int
    last_batch: str
    rank: int
    num_ranks: int
    num_epochs: int
    window_blocks: int
    block_rows: int
    lanes: int
    columns: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, manifest: _Optional[str] = ..., selection: _Optional[str] = ..., shuffle: _Optional[str] = ..., seed: _Optional[int] = ..., global_batch_size: _Optional[int] = ..., last_batch: _Optional[str] = ..., rank: _Optional[int] = ..., num_ranks: _Optional[int] = ..., num_epochs: _Optional[int] = ..., window_blocks: _Optional[int] = ..., block_rows: _Optional[int] = ..., lanes: _Optional[int] = ..., columns: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterPlanRequest(_message.Message):
    __slots__ = ("plan", "loader", "order", "epoch", "position", "manifest")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LOADER_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    plan: str
    loader: str
    order: OrderParameters
    epoch: int
    position: int
    manifest: str
    def __init__(self, plan: _Optional[str] = ..., loader: _Optional[str] = ..., order: _Optional[_Union[OrderParameters, _Mapping]] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ..., manifest: _Optional[str] = ...) -> None: ...

class BlobRange(_message.Message):
    __slots__ = ("blob", "offset", "length", "num_samples", "beside")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    blob: str
    offset: int
    length: int
    num_samples: int
    beside: bool
    def __init__(self, blob: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., num_samples: _Optional[int] = ..., beside: _Optional[bool] = ...) -> None: ...

class AddRangesRequest(_message.Message):
    __slots__ = ("plan", "page", "ranges")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    plan: str
    page: int
    ranges: _containers.RepeatedCompositeFieldContainer[BlobRange]
    def __init__(self, plan: _Optional[str] = ..., page: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[BlobRange, _Mapping]]] = ...) -> None: ...

class AdvancePlanRequest(_message.Message):
    __slots__ = ("plan", "epoch", "position")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    plan: str
    epoch: int
    position: int
    def __init__(self, plan: _Optional[str] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class Waits(_message.Message):
    __slots__ = ("num_waits", "tier_seconds", "queue_seconds", "throttle_seconds", "origin_seconds", "longest_seconds")
    NUM_WAITS_FIELD_NUMBER: _ClassVar[int]
    TIER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    THROTTLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_waits: int
    tier_seconds: float
    queue_seconds: float
    throttle_seconds: float
    origin_seconds: float
    longest_seconds: float
    def __init__(self, num_waits: _Optional[int] = ..., tier_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., throttle_seconds: _Optional[float] = ..., origin_seconds: _Optional[float] = ..., longest_seconds: _Optional[float] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("ago_seconds", "tier_seconds", "queue_seconds", "throttle_seconds", "origin_seconds")
    AGO_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    THROTTLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ago_seconds: float
    tier_seconds: float
    queue_seconds: float
    throttle_seconds: float
    origin_seconds: float
    def __init__(self, ago_seconds: _Optional[float] = ..., tier_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., throttle_seconds: _Optional[float] = ..., origin_seconds: _Optional[float] = ...) -> None: ...

class PlanStanding(_message.Message):
    __slots__ = ("plan", "lease_seconds", "waits")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    plan: str
    lease_seconds: float
    waits: Waits
    def __init__(self, plan: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., waits: _Optional[_Union[Waits, _Mapping]] = ...) -> None: ...

class CauseTime(_message.Message):
    __slots__ = ("cause", "wait_seconds", "read_seconds")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    READ_SECONDS_FIELD_NUMBER: _ClassVar[int]
    cause: str
    wait_seconds: float
    read_seconds: float
    def __init__(self, cause: _Optional[str] = ..., wait_seconds: _Optional[float] = ..., read_seconds: _Optional[float] = ...) -> None: ...

class LoaderTimes(_message.Message):
    __slots__ = ("samples", "batches", "bytes_read", "masked_samples", "seconds", "wait_seconds", "causes", "advice", "covers", "ago_seconds")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    MASKED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CAUSES_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    COVERS_FIELD_NUMBER: _ClassVar[int]
    AGO_SECONDS_FIELD_NUMBER: _ClassVar[int]
    samples: int
    batches: int
    bytes_read: int
    masked_samples: int
    seconds: float
    wait_seconds: float
    causes: _containers.RepeatedCompositeFieldContainer[CauseTime]
    advice: str
    covers: str
    ago_seconds: float
    def __init__(self, samples: _Optional[int] = ..., batches: _Optional[int] = ..., bytes_read: _Optional[int] = ..., masked_samples: _Optional[int] = ..., seconds: _Optional[float] = ..., wait_seconds: _Optional[float] = ..., causes: _Optional[_Iterable[_Union[CauseTime, _Mapping]]] = ..., advice: _Optional[str] = ..., covers: _Optional[str] = ..., ago_seconds: _Optional[float] = ...) -> None: ...

class EndPlanRequest(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: str
    def __init__(self, plan: _Optional[str] = ...) -> None: ...

class EndPlanResponse(_message.Message):
    __slots__ = ("existed",)
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    existed: bool
    def __init__(self, existed: _Optional[bool] = ...) -> None: ...

class ListPlansRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PlanSummary(_message.Message):
    __slots__ = ("plan", "loader", "dataset", "epoch", "position", "num_samples", "ready_bytes", "rate", "waits", "ahead_bytes", "expires_seconds", "recent", "times", "plan_bytes")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LOADER_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    READY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    PLAN_BYTES_FIELD_NUMBER: _ClassVar[int]
    plan: str
    loader: str
    dataset: str
    epoch: int
    position: int
    num_samples: int
    ready_bytes: int
    rate: float
    waits: Waits
    ahead_bytes: int
    expires_seconds: float
    recent: _containers.RepeatedCompositeFieldContainer[Wait]
    times: LoaderTimes
    plan_bytes: int
    def __init__(self, plan: _Optional[str] = ..., loader: _Optional[str] = ..., dataset: _Optional[str] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ..., num_samples: _Optional[int] = ..., ready_bytes: _Optional[int] = ..., rate: _Optional[float] = ..., waits: _Optional[_Union[Waits, _Mapping]] = ..., ahead_bytes: _Optional[int] = ..., expires_seconds: _Optional[float] = ..., recent: _Optional[_Iterable[_Union[Wait, _Mapping]]] = ..., times: _Optional[_Union[LoaderTimes, _Mapping]] = ..., plan_bytes: _Optional[int] = ...) -> None: ...

class ListPlansResponse(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[PlanSummary]
    def __init__(self, plans: _Optional[_Iterable[_Union[PlanSummary, _Mapping]]] = ...) -> None: ...
