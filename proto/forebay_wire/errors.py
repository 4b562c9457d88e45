"""The exception tree, with the one table that maps it to status code names and back.

Both edges of the wire use it: the server turns an exception into (status code name, error name,
message), the client turns them into the same exception. gRPC itself is not imported here.
"""

from __future__ import annotations

from typing import ClassVar, Final


class ForebayError(Exception):
    """Base of everything that Forebay raises on purpose.

    Each message says what went wrong, where, and what to do about it.
    """

    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, *args: object, message: str = "") -> None:
        """*message*: how torch rebuilds what a DataLoader worker raised."""
        super().__init__(*(args or ((message,) if message else ())))

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidRequest(ForebayError, ValueError):
    """The caller's mistake: the same call can never succeed."""

    status = "INVALID_ARGUMENT"


class SchemaMismatch(InvalidRequest):
    """A sample does not fit the dataset's schema; the message names the sample and the column."""


class SampleTooLarge(InvalidRequest):
    """One sample is larger than a shard may be."""


class UnsupportedObject(InvalidRequest):
    """A state holds an object that cannot be saved without pickle; the message names its path."""


class LimitExceeded(InvalidRequest):
    """A count or size is above what both sides agreed on (see ``forebay_wire.limits``)."""


class NotFound(ForebayError, LookupError):
    """No such dataset, version, run, generation, blob or session."""

    status = "NOT_FOUND"


class NothingSaved(NotFound):
    """The run has no generation to go on from: not "not that one", but none (for ``latest``: none
    on the newest attempt's lineage that is durable as asked for)."""


class AlreadyExists(ForebayError):
    """The name is taken, or this step was already saved in this attempt."""

    status = "ALREADY_EXISTS"


class Conflict(ForebayError):
    """Somebody else committed first; read again and decide again."""

    status = "ABORTED"


class Fenced(ForebayError):
    """A newer attempt of the run exists; this one may not write any more."""

    status = "FAILED_PRECONDITION"


class VersionMismatch(ForebayError):
    """Client and daemon speak no common protocol version; the message says which to upgrade."""

    status = "FAILED_PRECONDITION"


class ResourceExhausted(ForebayError):
    """No room: the message gives the bytes needed, the bytes free and what holds the space."""

    status = "RESOURCE_EXHAUSTED"


class IntegrityError(ForebayError):
    """Stored bytes do not match their digest; names dataset or generation, blob, segment, tier."""

    status = "DATA_LOSS"


class TooManyBadSamples(ForebayError):
    """A loader that masks what cannot be read met more bad samples than it may; names them."""

    status = "DATA_LOSS"


class PermissionDenied(ForebayError):
    """The caller is known and may not do this."""

    status = "PERMISSION_DENIED"


class Unauthenticated(ForebayError):
    """No token, or one that this daemon did not give."""

    status = "UNAUTHENTICATED"


class DaemonUnavailable(ForebayError, ConnectionError):
    """The daemon is not there, went away, or is draining."""

    status = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(ForebayError, TimeoutError):
    """The stated deadline passed; what was promised may still happen later."""

    status = "DEADLINE_EXCEEDED"


class StorageError(ForebayError, OSError):
    """A tier or the catalog failed below us (I/O error, unreadable object URL)."""

    status = "INTERNAL"


class OriginChanged(StorageError):
    """A file that a dataset reads where it lies is not the one that was registered any more; the
    message names it and what differs. Register it anew, or restore it."""

    status = "FAILED_PRECONDITION"


class AlreadyRunning(ForebayError):
    """Another daemon owns this data folder."""

    status = "FAILED_PRECONDITION"


def _tree(root: type[ForebayError]) -> list[type[ForebayError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


ERROR_NAMES: Final[dict[str, type[ForebayError]]] = {
    error.__name__: error for error in _tree(ForebayError)
}
"""Error name on the wire (the metadata key ``forebay-error``) to class."""

STATUS_DEFAULTS: Final[dict[str, type[ForebayError]]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "ABORTED": Conflict,
    "FAILED_PRECONDITION": Conflict,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "DATA_LOSS": IntegrityError,
    "PERMISSION_DENIED": PermissionDenied,
    "UNAUTHENTICATED": Unauthenticated,
    "UNAVAILABLE": DaemonUnavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": DaemonUnavailable,
    "INTERNAL": ForebayError,
    "UNKNOWN": ForebayError,
}
"""Status code name to class, for an answer that carries no error name."""

HTTP_STATUS: Final[dict[str, int]] = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 412,
    "RESOURCE_EXHAUSTED": 507,
    "DATA_LOSS": 502,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "INTERNAL": 500,
}
"""Status code name to the HTTP status of the byte endpoint."""


def rebuild(error_name: str | None, status: str, message: str) -> ForebayError:
    """The exception that the other side raised, from what crossed the wire."""
    found = ERROR_NAMES.get(error_name or "")
    if found is None:
        found = STATUS_DEFAULTS.get(status, ForebayError)
    return found(message)
