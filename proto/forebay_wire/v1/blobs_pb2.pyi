from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class BeginUploadRequest(_message.Message):
    __slots__ = ("total_bytes", "slot_bytes", "owner", "minimum_bytes")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    slot_bytes: int
    owner: str
    minimum_bytes: int
    def __init__(self, total_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., owner: _Optional[str] = ..., minimum_bytes: _Optional[int] = ...) -> None: ...

class UploadSession(_message.Message):
    __slots__ = ("session", "slot_bytes", "lease_seconds", "put_ticket")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PUT_TICKET_FIELD_NUMBER: _ClassVar[int]
    session: str
    slot_bytes: int
    lease_seconds: float
    put_ticket: str
    def __init__(self, session: _Optional[str] = ..., slot_bytes: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., put_ticket: _Optional[str] = ...) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("session", "sequence", "num_bytes", "cuts", "slot_offset")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    session: str
    sequence: int
    num_bytes: int
    cuts: _containers.RepeatedScalarFieldContainer[int]
    slot_offset: int
    def __init__(self, session: _Optional[str] = ..., sequence: _Optional[int] = ..., num_bytes: _Optional[int] = ..., cuts: _Optional[_Iterable[int]] = ..., slot_offset: _Optional[int] = ...) -> None: ...

class AppendResponse(_message.Message):
    __slots__ = ("blob_bytes",)
    BLOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    blob_bytes: int
    def __init__(self, blob_bytes: _Optional[int] = ...) -> None: ...

class SealRequest(_message.Message):
    __slots__ = ("session", "sequence", "num_bytes", "cuts", "slot_offset")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    session: str
    sequence: int
    num_bytes: int
    cuts: _containers.RepeatedScalarFieldContainer[int]
    slot_offset: int
    def __init__(self, session: _Optional[str] = ..., sequence: _Optional[int] = ..., num_bytes: _Optional[int] = ..., cuts: _Optional[_Iterable[int]] = ..., slot_offset: _Optional[int] = ...) -> None: ...

class SealedBlob(_message.Message):
    __slots__ = ("blob", "num_bytes", "num_segments")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    blob: str
    num_bytes: int
    num_segments: int
    def __init__(self, blob: _Optional[str] = ..., num_bytes: _Optional[int] = ..., num_segments: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadManifestRequest(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    def __init__(self, manifest: _Optional[str] = ...) -> None: ...

class ManifestChunk(_message.Message):
    __slots__ = ("data", "total_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    total_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...
