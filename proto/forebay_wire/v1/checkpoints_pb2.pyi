from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BeginAttemptRequest(_message.Message):
    __slots__ = ("run", "has_parent", "parent_attempt", "parent_step", "num_ranks", "request", "parent_run", "has_keep", "keep_json")
    RUN_FIELD_NUMBER: _ClassVar[int]
    HAS_PARENT_FIELD_NUMBER: _ClassVar[int]
    PARENT_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PARENT_RUN_FIELD_NUMBER: _ClassVar[int]
    HAS_KEEP_FIELD_NUMBER: _ClassVar[int]
    KEEP_JSON_FIELD_NUMBER: _ClassVar[int]
    run: str
    has_parent: bool
    parent_attempt: int
    parent_step: int
    num_ranks: int
    request: str
    parent_run: str
    has_keep: bool
    keep_json: str
    def __init__(self, run: _Optional[str] = ..., has_parent: _Optional[bool] = ..., parent_attempt: _Optional[int] = ..., parent_step: _Optional[int] = ..., num_ranks: _Optional[int] = ..., request: _Optional[str] = ..., parent_run: _Optional[str] = ..., has_keep: _Optional[bool] = ..., keep_json: _Optional[str] = ...) -> None: ...

class Attempt(_message.Message):
    __slots__ = ("run", "attempt", "has_parent", "parent_attempt", "parent_step", "created_unix", "parent_run")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    HAS_PARENT_FIELD_NUMBER: _ClassVar[int]
    PARENT_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_STEP_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_FIELD_NUMBER: _ClassVar[int]
    PARENT_RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    has_parent: bool
    parent_attempt: int
    parent_step: int
    created_unix: float
    parent_run: str
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., has_parent: _Optional[bool] = ..., parent_attempt: _Optional[int] = ..., parent_step: _Optional[int] = ..., created_unix: _Optional[float] = ..., parent_run: _Optional[str] = ...) -> None: ...

class BeginPackRequest(_message.Message):
    __slots__ = ("run", "attempt", "step", "rank", "num_ranks", "total_bytes", "slot_bytes", "save_number", "structure", "plan", "may_skip", "wait_seconds")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAVE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MAY_SKIP_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    rank: int
    num_ranks: int
    total_bytes: int
    slot_bytes: int
    save_number: int
    structure: str
    plan: int
    may_skip: bool
    wait_seconds: float
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., num_ranks: _Optional[int] = ..., total_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., save_number: _Optional[int] = ..., structure: _Optional[str] = ..., plan: _Optional[int] = ..., may_skip: _Optional[bool] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class PackSession(_message.Message):
    __slots__ = ("session", "slot_bytes", "lease_seconds", "put_ticket", "incarnation", "verdict", "plan", "reason", "was_prepared")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PUT_TICKET_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAS_PREPARED_FIELD_NUMBER: _ClassVar[int]
    session: str
    slot_bytes: int
    lease_seconds: float
    put_ticket: str
    incarnation: str
    verdict: str
    plan: int
    reason: str
    was_prepared: bool
    def __init__(self, session: _Optional[str] = ..., slot_bytes: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., put_ticket: _Optional[str] = ..., incarnation: _Optional[str] = ..., verdict: _Optional[str] = ..., plan: _Optional[int] = ..., reason: _Optional[str] = ..., was_prepared: _Optional[bool] = ...) -> None: ...

class PreparePackRequest(_message.Message):
    __slots__ = ("run", "attempt", "rank", "total_bytes", "slot_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    rank: int
    total_bytes: int
    slot_bytes: int
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., total_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class SealPackRequest(_message.Message):
    __slots__ = ("session", "sequence", "num_bytes", "cuts", "description_bytes", "metrics_json", "dataset_json", "tags", "note_json", "stall_seconds")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_BYTES_FIELD_NUMBER: _ClassVar[int]
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    DATASET_JSON_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    NOTE_JSON_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    session: str
    sequence: int
    num_bytes: int
    cuts: _containers.RepeatedScalarFieldContainer[int]
    description_bytes: int
    metrics_json: str
    dataset_json: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    note_json: str
    stall_seconds: float
    def __init__(self, session: _Optional[str] = ..., sequence: _Optional[int] = ..., num_bytes: _Optional[int] = ..., cuts: _Optional[_Iterable[int]] = ..., description_bytes: _Optional[int] = ..., metrics_json: _Optional[str] = ..., dataset_json: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., note_json: _Optional[str] = ..., stall_seconds: _Optional[float] = ...) -> None: ...

class SealPackResponse(_message.Message):
    __slots__ = ("all_sealed",)
    ALL_SEALED_FIELD_NUMBER: _ClassVar[int]
    all_sealed: bool
    def __init__(self, all_sealed: _Optional[bool] = ...) -> None: ...

class WaitGenerationRequest(_message.Message):
    __slots__ = ("run", "attempt", "step", "durability", "timeout_seconds")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    durability: str
    timeout_seconds: float
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., durability: _Optional[str] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("run", "attempt", "step", "state", "durability", "manifest", "num_ranks", "num_bytes", "created_unix", "metrics_json", "has_parent", "parent_attempt", "parent_step", "error", "tags", "is_pinned", "pin_reason", "pin_expires_unix", "note_json", "dataset_json", "ram_unix", "local_unix", "remote_unix", "parent_run", "stall_seconds", "shared_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_FIELD_NUMBER: _ClassVar[int]
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    HAS_PARENT_FIELD_NUMBER: _ClassVar[int]
    PARENT_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    IS_PINNED_FIELD_NUMBER: _ClassVar[int]
    PIN_REASON_FIELD_NUMBER: _ClassVar[int]
    PIN_EXPIRES_UNIX_FIELD_NUMBER: _ClassVar[int]
    NOTE_JSON_FIELD_NUMBER: _ClassVar[int]
    DATASET_JSON_FIELD_NUMBER: _ClassVar[int]
    RAM_UNIX_FIELD_NUMBER: _ClassVar[int]
    LOCAL_UNIX_FIELD_NUMBER: _ClassVar[int]
    REMOTE_UNIX_FIELD_NUMBER: _ClassVar[int]
    PARENT_RUN_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    state: str
    durability: str
    manifest: str
    num_ranks: int
    num_bytes: int
    created_unix: float
    metrics_json: str
    has_parent: bool
    parent_attempt: int
    parent_step: int
    error: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    is_pinned: bool
    pin_reason: str
    pin_expires_unix: float
    note_json: str
    dataset_json: str
    ram_unix: float
    local_unix: float
    remote_unix: float
    parent_run: str
    stall_seconds: float
    shared_bytes: int
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., state: _Optional[str] = ..., durability: _Optional[str] = ..., manifest: _Optional[str] = ..., num_ranks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., created_unix: _Optional[float] = ..., metrics_json: _Optional[str] = ..., has_parent: _Optional[bool] = ..., parent_attempt: _Optional[int] = ..., parent_step: _Optional[int] = ..., error: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., is_pinned: _Optional[bool] = ..., pin_reason: _Optional[str] = ..., pin_expires_unix: _Optional[float] = ..., note_json: _Optional[str] = ..., dataset_json: _Optional[str] = ..., ram_unix: _Optional[float] = ..., local_unix: _Optional[float] = ..., remote_unix: _Optional[float] = ..., parent_run: _Optional[str] = ..., stall_seconds: _Optional[float] = ..., shared_bytes: _Optional[int] = ...) -> None: ...

class GetGenerationRequest(_message.Message):
    __slots__ = ("run", "attempt", "step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class ResolveGenerationRequest(_message.Message):
    __slots__ = ("run", "selector", "durability", "skip", "timeout_seconds", "look_only")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOOK_ONLY_FIELD_NUMBER: _ClassVar[int]
    run: str
    selector: str
    durability: str
    skip: _containers.RepeatedScalarFieldContainer[str]
    timeout_seconds: float
    look_only: bool
    def __init__(self, run: _Optional[str] = ..., selector: _Optional[str] = ..., durability: _Optional[str] = ..., skip: _Optional[_Iterable[str]] = ..., timeout_seconds: _Optional[float] = ..., look_only: _Optional[bool] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: str
    limit: int
    def __init__(self, after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class RunSummary(_message.Message):
    __slots__ = ("run", "num_attempts", "num_generations", "num_bytes", "has_latest", "latest_attempt", "latest_step", "latest_durability")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HAS_LATEST_FIELD_NUMBER: _ClassVar[int]
    LATEST_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LATEST_STEP_FIELD_NUMBER: _ClassVar[int]
    LATEST_DURABILITY_FIELD_NUMBER: _ClassVar[int]
    run: str
    num_attempts: int
    num_generations: int
    num_bytes: int
    has_latest: bool
    latest_attempt: int
    latest_step: int
    latest_durability: str
    def __init__(self, run: _Optional[str] = ..., num_attempts: _Optional[int] = ..., num_generations: _Optional[int] = ..., num_bytes: _Optional[int] = ..., has_latest: _Optional[bool] = ..., latest_attempt: _Optional[int] = ..., latest_step: _Optional[int] = ..., latest_durability: _Optional[str] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs", "next")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunSummary]
    next: str
    def __init__(self, runs: _Optional[_Iterable[_Union[RunSummary, _Mapping]]] = ..., next: _Optional[str] = ...) -> None: ...

class ListGenerationsRequest(_message.Message):
    __slots__ = ("run", "limit", "after")
    RUN_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    run: str
    limit: int
    after: str
    def __init__(self, run: _Optional[str] = ..., limit: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class ListGenerationsResponse(_message.Message):
    __slots__ = ("attempts", "generations", "next")
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    attempts: _containers.RepeatedCompositeFieldContainer[Attempt]
    generations: _containers.RepeatedCompositeFieldContainer[Generation]
    next: str
    def __init__(self, attempts: _Optional[_Iterable[_Union[Attempt, _Mapping]]] = ..., generations: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., next: _Optional[str] = ...) -> None: ...

class DeleteGenerationRequest(_message.Message):
    __slots__ = ("run", "attempt", "step", "all", "now")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    all: bool
    now: bool
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., all: _Optional[bool] = ..., now: _Optional[bool] = ...) -> None: ...

class DeleteGenerationResponse(_message.Message):
    __slots__ = ("num_deleted",)
    NUM_DELETED_FIELD_NUMBER: _ClassVar[int]
    num_deleted: int
    def __init__(self, num_deleted: _Optional[int] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class Tag(_message.Message):
    __slots__ = ("tag", "attempt", "step")
    TAG_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    tag: str
    attempt: int
    step: int
    def __init__(self, tag: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("run", "attempt", "parent_attempt", "parent_step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_STEP_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    parent_attempt: int
    parent_step: int
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., parent_attempt: _Optional[int] = ..., parent_step: _Optional[int] = ...) -> None: ...

class RunDetail(_message.Message):
    __slots__ = ("run", "keep_json", "tags", "forks", "parent_run", "parent_attempt", "parent_step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    KEEP_JSON_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    PARENT_RUN_FIELD_NUMBER: _ClassVar[int]
    PARENT_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_STEP_FIELD_NUMBER: _ClassVar[int]
    run: str
    keep_json: str
    tags: _containers.RepeatedCompositeFieldContainer[Tag]
    forks: _containers.RepeatedCompositeFieldContainer[Fork]
    parent_run: str
    parent_attempt: int
    parent_step: int
    def __init__(self, run: _Optional[str] = ..., keep_json: _Optional[str] = ..., tags: _Optional[_Iterable[_Union[Tag, _Mapping]]] = ..., forks: _Optional[_Iterable[_Union[Fork, _Mapping]]] = ..., parent_run: _Optional[str] = ..., parent_attempt: _Optional[int] = ..., parent_step: _Optional[int] = ...) -> None: ...

class SetTagRequest(_message.Message):
    __slots__ = ("run", "tag", "attempt", "step", "remove")
    RUN_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    run: str
    tag: str
    attempt: int
    step: int
    remove: bool
    def __init__(self, run: _Optional[str] = ..., tag: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., remove: _Optional[bool] = ...) -> None: ...

class SetPinRequest(_message.Message):
    __slots__ = ("run", "attempt", "step", "reason", "hold_seconds", "remove")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HOLD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    reason: str
    hold_seconds: float
    remove: bool
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ..., hold_seconds: _Optional[float] = ..., remove: _Optional[bool] = ...) -> None: ...

class SetNoteRequest(_message.Message):
    __slots__ = ("run", "attempt", "step", "note_json")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NOTE_JSON_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    note_json: str
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., note_json: _Optional[str] = ...) -> None: ...

class SetKeepRequest(_message.Message):
    __slots__ = ("run", "keep_json")
    RUN_FIELD_NUMBER: _ClassVar[int]
    KEEP_JSON_FIELD_NUMBER: _ClassVar[int]
    run: str
    keep_json: str
    def __init__(self, run: _Optional[str] = ..., keep_json: _Optional[str] = ...) -> None: ...

class PruneRequest(_message.Message):
    __slots__ = ("run", "dry_run", "keep_json")
    RUN_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    KEEP_JSON_FIELD_NUMBER: _ClassVar[int]
    run: str
    dry_run: bool
    keep_json: str
    def __init__(self, run: _Optional[str] = ..., dry_run: _Optional[bool] = ..., keep_json: _Optional[str] = ...) -> None: ...

class PruneVerdict(_message.Message):
    __slots__ = ("attempt", "step", "is_kept", "reasons", "num_bytes")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    IS_KEPT_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    step: int
    is_kept: bool
    reasons: _containers.RepeatedScalarFieldContainer[str]
    num_bytes: int
    def __init__(self, attempt: _Optional[int] = ..., step: _Optional[int] = ..., is_kept: _Optional[bool] = ..., reasons: _Optional[_Iterable[str]] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class PruneResponse(_message.Message):
    __slots__ = ("verdicts", "num_deleted", "keep_json")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DELETED_FIELD_NUMBER: _ClassVar[int]
    KEEP_JSON_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[PruneVerdict]
    num_deleted: int
    keep_json: str
    def __init__(self, verdicts: _Optional[_Iterable[_Union[PruneVerdict, _Mapping]]] = ..., num_deleted: _Optional[int] = ..., keep_json: _Optional[str] = ...) -> None: ...

class ReadFingerprintsRequest(_message.Message):
    __slots__ = ("run", "attempt", "step", "rank", "offset", "compute")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    rank: int
    offset: int
    compute: bool
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., offset: _Optional[int] = ..., compute: _Optional[bool] = ...) -> None: ...

class ReadFingerprintsResponse(_message.Message):
    __slots__ = ("num_packs", "data", "total_bytes", "job_state", "done_bytes", "job_bytes", "error")
    NUM_PACKS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOB_STATE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    num_packs: int
    data: bytes
    total_bytes: int
    job_state: str
    done_bytes: int
    job_bytes: int
    error: str
    def __init__(self, num_packs: _Optional[int] = ..., data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., job_state: _Optional[str] = ..., done_bytes: _Optional[int] = ..., job_bytes: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...
