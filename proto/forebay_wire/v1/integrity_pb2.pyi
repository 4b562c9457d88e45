from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScrubRequest(_message.Message):
    __slots__ = ("tier",)
    TIER_FIELD_NUMBER: _ClassVar[int]
    tier: str
    def __init__(self, tier: _Optional[str] = ...) -> None: ...

class GetScrubRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class DamagedCopy(_message.Message):
    __slots__ = ("blob", "tier", "file", "problem", "outcome")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    blob: str
    tier: str
    file: str
    problem: str
    outcome: str
    def __init__(self, blob: _Optional[str] = ..., tier: _Optional[str] = ..., file: _Optional[str] = ..., problem: _Optional[str] = ..., outcome: _Optional[str] = ...) -> None: ...

class ScrubState(_message.Message):
    __slots__ = ("job", "state", "error", "done_bytes", "total_bytes", "num_copies", "num_bytes", "num_damaged", "num_lists", "num_unread", "unread", "damaged")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_COPIES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_DAMAGED_FIELD_NUMBER: _ClassVar[int]
    NUM_LISTS_FIELD_NUMBER: _ClassVar[int]
    NUM_UNREAD_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    job: str
    state: str
    error: str
    done_bytes: int
    total_bytes: int
    num_copies: int
    num_bytes: int
    num_damaged: int
    num_lists: int
    num_unread: int
    unread: str
    damaged: _containers.RepeatedCompositeFieldContainer[DamagedCopy]
    def __init__(self, job: _Optional[str] = ..., state: _Optional[str] = ..., error: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., num_copies: _Optional[int] = ..., num_bytes: _Optional[int] = ..., num_damaged: _Optional[int] = ..., num_lists: _Optional[int] = ..., num_unread: _Optional[int] = ..., unread: _Optional[str] = ..., damaged: _Optional[_Iterable[_Union[DamagedCopy, _Mapping]]] = ...) -> None: ...

class FsckRequest(_message.Message):
    __slots__ = ("repair",)
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    repair: bool
    def __init__(self, repair: _Optional[bool] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("kind", "subject", "detail", "repair")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    kind: str
    subject: str
    detail: str
    repair: str
    def __init__(self, kind: _Optional[str] = ..., subject: _Optional[str] = ..., detail: _Optional[str] = ..., repair: _Optional[str] = ...) -> None: ...

class FsckReport(_message.Message):
    __slots__ = ("found", "num_found", "left", "num_left")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    NUM_FOUND_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedCompositeFieldContainer[Finding]
    num_found: int
    left: _containers.RepeatedCompositeFieldContainer[Finding]
    num_left: int
    def __init__(self, found: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., num_found: _Optional[int] = ..., left: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., num_left: _Optional[int] = ...) -> None: ...

class ListGarbageRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Doomed(_message.Message):
    __slots__ = ("what", "tiers", "num_bytes", "reason")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    what: str
    tiers: _containers.RepeatedScalarFieldContainer[str]
    num_bytes: int
    reason: str
    def __init__(self, what: _Optional[str] = ..., tiers: _Optional[_Iterable[str]] = ..., num_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ListGarbageResponse(_message.Message):
    __slots__ = ("doomed", "num_doomed", "num_bytes")
    DOOMED_FIELD_NUMBER: _ClassVar[int]
    NUM_DOOMED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    doomed: _containers.RepeatedCompositeFieldContainer[Doomed]
    num_doomed: int
    num_bytes: int
    def __init__(self, doomed: _Optional[_Iterable[_Union[Doomed, _Mapping]]] = ..., num_doomed: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class CollectGarbageRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CollectGarbageResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
