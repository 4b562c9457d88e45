from forebay_wire.v1 import admin_pb2 as _admin_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PinRequest(_message.Message):
    __slots__ = ("target", "tier", "hold_seconds")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    HOLD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    target: str
    tier: str
    hold_seconds: float
    def __init__(self, target: _Optional[str] = ..., tier: _Optional[str] = ..., hold_seconds: _Optional[float] = ...) -> None: ...

class GetPinRequest(_message.Message):
    __slots__ = ("pin",)
    PIN_FIELD_NUMBER: _ClassVar[int]
    pin: str
    def __init__(self, pin: _Optional[str] = ...) -> None: ...

class PinState(_message.Message):
    __slots__ = ("pin", "target", "tier", "is_warm", "because", "state", "done_bytes", "total_bytes", "num_blobs", "created_unix", "expires_unix")
    PIN_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    IS_WARM_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOBS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_FIELD_NUMBER: _ClassVar[int]
    pin: str
    target: str
    tier: str
    is_warm: bool
    because: str
    state: str
    done_bytes: int
    total_bytes: int
    num_blobs: int
    created_unix: float
    expires_unix: float
    def __init__(self, pin: _Optional[str] = ..., target: _Optional[str] = ..., tier: _Optional[str] = ..., is_warm: _Optional[bool] = ..., because: _Optional[str] = ..., state: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., num_blobs: _Optional[int] = ..., created_unix: _Optional[float] = ..., expires_unix: _Optional[float] = ...) -> None: ...

class ListPinsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPinsResponse(_message.Message):
    __slots__ = ("pins",)
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[PinState]
    def __init__(self, pins: _Optional[_Iterable[_Union[PinState, _Mapping]]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("pin",)
    PIN_FIELD_NUMBER: _ClassVar[int]
    pin: str
    def __init__(self, pin: _Optional[str] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("num_unpinned",)
    NUM_UNPINNED_FIELD_NUMBER: _ClassVar[int]
    num_unpinned: int
    def __init__(self, num_unpinned: _Optional[int] = ...) -> None: ...

class SetPolicyRequest(_message.Message):
    __slots__ = ("owner", "policy")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    owner: str
    policy: str
    def __init__(self, owner: _Optional[str] = ..., policy: _Optional[str] = ...) -> None: ...

class PolicyAssignment(_message.Message):
    __slots__ = ("owner", "policy")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    owner: str
    policy: str
    def __init__(self, owner: _Optional[str] = ..., policy: _Optional[str] = ...) -> None: ...

class PolicyInfo(_message.Message):
    __slots__ = ("name", "text", "is_default")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    text: str
    is_default: bool
    def __init__(self, name: _Optional[str] = ..., text: _Optional[str] = ..., is_default: _Optional[bool] = ...) -> None: ...

class ListPoliciesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoliciesResponse(_message.Message):
    __slots__ = ("policies", "assignments")
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[PolicyInfo]
    assignments: _containers.RepeatedCompositeFieldContainer[PolicyAssignment]
    def __init__(self, policies: _Optional[_Iterable[_Union[PolicyInfo, _Mapping]]] = ..., assignments: _Optional[_Iterable[_Union[PolicyAssignment, _Mapping]]] = ...) -> None: ...

class TrashEntry(_message.Message):
    __slots__ = ("deletion", "target", "num_manifests", "deleted_unix", "expires_unix")
    DELETION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    NUM_MANIFESTS_FIELD_NUMBER: _ClassVar[int]
    DELETED_UNIX_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_FIELD_NUMBER: _ClassVar[int]
    deletion: str
    target: str
    num_manifests: int
    deleted_unix: float
    expires_unix: float
    def __init__(self, deletion: _Optional[str] = ..., target: _Optional[str] = ..., num_manifests: _Optional[int] = ..., deleted_unix: _Optional[float] = ..., expires_unix: _Optional[float] = ...) -> None: ...

class ListTrashRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTrashResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[TrashEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[TrashEntry, _Mapping]]] = ...) -> None: ...

class RestoreTrashRequest(_message.Message):
    __slots__ = ("deletion",)
    DELETION_FIELD_NUMBER: _ClassVar[int]
    deletion: str
    def __init__(self, deletion: _Optional[str] = ...) -> None: ...

class EmptyTrashRequest(_message.Message):
    __slots__ = ("deletion",)
    DELETION_FIELD_NUMBER: _ClassVar[int]
    deletion: str
    def __init__(self, deletion: _Optional[str] = ...) -> None: ...

class EmptyTrashResponse(_message.Message):
    __slots__ = ("num_deletions",)
    NUM_DELETIONS_FIELD_NUMBER: _ClassVar[int]
    num_deletions: int
    def __init__(self, num_deletions: _Optional[int] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("all", "after", "limit")
    ALL_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    all: bool
    after: str
    limit: int
    def __init__(self, all: _Optional[bool] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[_admin_pb2.JobStatus]
    next: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[_admin_pb2.JobStatus, _Mapping]]] = ..., next: _Optional[str] = ...) -> None: ...

class WhyRequest(_message.Message):
    __slots__ = ("subject", "num_events")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    NUM_EVENTS_FIELD_NUMBER: _ClassVar[int]
    subject: str
    num_events: int
    def __init__(self, subject: _Optional[str] = ..., num_events: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("at_unix", "subject", "event", "detail")
    AT_UNIX_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    at_unix: float
    subject: str
    event: str
    detail: str
    def __init__(self, at_unix: _Optional[float] = ..., subject: _Optional[str] = ..., event: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Copies(_message.Message):
    __slots__ = ("tier", "encoding", "state", "reason", "num_blobs", "num_bytes", "created_unix", "verified_unix", "stored_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOBS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_UNIX_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    encoding: str
    state: str
    reason: str
    num_blobs: int
    num_bytes: int
    created_unix: float
    verified_unix: float
    stored_bytes: int
    def __init__(self, tier: _Optional[str] = ..., encoding: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., num_blobs: _Optional[int] = ..., num_bytes: _Optional[int] = ..., created_unix: _Optional[float] = ..., verified_unix: _Optional[float] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class WhyResponse(_message.Message):
    __slots__ = ("subject", "num_blobs", "num_bytes", "dirty_bytes", "policy", "policy_from", "copies", "kept_by", "because", "pins", "jobs", "history")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOBS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FROM_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BY_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    subject: str
    num_blobs: int
    num_bytes: int
    dirty_bytes: int
    policy: str
    policy_from: str
    copies: _containers.RepeatedCompositeFieldContainer[Copies]
    kept_by: _containers.RepeatedScalarFieldContainer[str]
    because: _containers.RepeatedScalarFieldContainer[str]
    pins: _containers.RepeatedCompositeFieldContainer[PinState]
    jobs: _containers.RepeatedCompositeFieldContainer[_admin_pb2.JobStatus]
    history: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, subject: _Optional[str] = ..., num_blobs: _Optional[int] = ..., num_bytes: _Optional[int] = ..., dirty_bytes: _Optional[int] = ..., policy: _Optional[str] = ..., policy_from: _Optional[str] = ..., copies: _Optional[_Iterable[_Union[Copies, _Mapping]]] = ..., kept_by: _Optional[_Iterable[str]] = ..., because: _Optional[_Iterable[str]] = ..., pins: _Optional[_Iterable[_Union[PinState, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[_admin_pb2.JobStatus, _Mapping]]] = ..., history: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...
