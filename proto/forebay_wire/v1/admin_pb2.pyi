from forebay_wire.v1 import plans_pb2 as _plans_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandshakeRequest(_message.Message):
    __slots__ = ("protocols", "client_version")
    PROTOCOLS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocols: str
    client_version: str
    def __init__(self, protocols: _Optional[str] = ..., client_version: _Optional[str] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("protocol", "server_version", "node", "incarnation", "data_folder", "descriptor_socket", "http_url", "token")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DATA_FOLDER_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_SOCKET_FIELD_NUMBER: _ClassVar[int]
    HTTP_URL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    server_version: str
    node: str
    incarnation: str
    data_folder: str
    descriptor_socket: str
    http_url: str
    token: str
    def __init__(self, protocol: _Optional[int] = ..., server_version: _Optional[str] = ..., node: _Optional[str] = ..., incarnation: _Optional[str] = ..., data_folder: _Optional[str] = ..., descriptor_socket: _Optional[str] = ..., http_url: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("name", "kind", "location", "limit_bytes", "used_bytes", "free_bytes", "dirty_bytes", "open_bytes", "reserved_bytes", "num_files", "health", "note", "plain_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_FILES_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    PLAIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    location: str
    limit_bytes: int
    used_bytes: int
    free_bytes: int
    dirty_bytes: int
    open_bytes: int
    reserved_bytes: int
    num_files: int
    health: str
    note: str
    plain_bytes: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., location: _Optional[str] = ..., limit_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., dirty_bytes: _Optional[int] = ..., open_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., num_files: _Optional[int] = ..., health: _Optional[str] = ..., note: _Optional[str] = ..., plain_bytes: _Optional[int] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("job", "kind", "target", "state", "done_bytes", "total_bytes", "tries", "error", "priority", "created_unix", "due_unix")
    JOB_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRIES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_FIELD_NUMBER: _ClassVar[int]
    DUE_UNIX_FIELD_NUMBER: _ClassVar[int]
    job: str
    kind: str
    target: str
    state: str
    done_bytes: int
    total_bytes: int
    tries: int
    error: str
    priority: int
    created_unix: float
    due_unix: float
    def __init__(self, job: _Optional[str] = ..., kind: _Optional[str] = ..., target: _Optional[str] = ..., state: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., tries: _Optional[int] = ..., error: _Optional[str] = ..., priority: _Optional[int] = ..., created_unix: _Optional[float] = ..., due_unix: _Optional[float] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("server_version", "node", "incarnation", "data_folder", "started_unix", "tiers", "num_datasets", "num_runs", "num_clients", "num_uploads", "jobs", "state", "addresses", "plans")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DATA_FOLDER_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    NUM_DATASETS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNS_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_UPLOADS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    node: str
    incarnation: str
    data_folder: str
    started_unix: float
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    num_datasets: int
    num_runs: int
    num_clients: int
    num_uploads: int
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    state: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    plans: _containers.RepeatedCompositeFieldContainer[_plans_pb2.PlanSummary]
    def __init__(self, server_version: _Optional[str] = ..., node: _Optional[str] = ..., incarnation: _Optional[str] = ..., data_folder: _Optional[str] = ..., started_unix: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., num_datasets: _Optional[int] = ..., num_runs: _Optional[int] = ..., num_clients: _Optional[int] = ..., num_uploads: _Optional[int] = ..., jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ..., state: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., plans: _Optional[_Iterable[_Union[_plans_pb2.PlanSummary, _Mapping]]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class AttachEvent(_message.Message):
    __slots__ = ("state", "incarnation")
    STATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    state: str
    incarnation: str
    def __init__(self, state: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...
