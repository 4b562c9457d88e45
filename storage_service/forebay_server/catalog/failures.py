"""What a failing database means to a caller: one of our exceptions, with what to do."""

from __future__ import annotations

import re
import sqlite3
from typing import Any, Final

from sqlalchemy import exc

from forebay_wire.errors import (
    Conflict,
    DaemonUnavailable,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    PermissionDenied,
    ResourceExhausted,
    StorageError,
)

PASSING_STATES: Final = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now: it starts or stops
        "57P05",  # idle_session_timeout
        "25P03",  # idle_in_transaction_session_timeout
        "53300",  # too_many_connections
    }
)
"""SQLSTATEs after which PostgreSQL has kept nothing of the transaction and may soon accept it."""

_DAMAGED_STATES: Final = frozenset({"XX001", "XX002"})
_FULL_STATES: Final = frozenset({"53100", "53200"})


class OutcomeUnknown(StorageError):
    """The connection broke inside a COMMIT and the server could not be asked what became of it.

    Neither a success nor a failure: who repeats the call gives the same request id, or looks first.
    """


_REFUSALS: Final = (
    (re.compile(r"database .* does not exist"), "3D000"),
    (re.compile(r"password|pg_hba\.conf|role .* does not exist|authentication failed"), "28000"),
    (re.compile(r"FATAL: .*(starting up|shutting down|recovery mode)"), "57P03"),
    (re.compile(r"FATAL: .*(too many clients|connection slots)"), "53300"),
)
"""What a server says at the connecting, where the driver passes on no code."""


def sqlstate(error: BaseException) -> str:
    """PostgreSQL's code of what failed; empty for anything else."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    state = getattr(cause, "sqlstate", None)
    if state is None and isinstance(error, exc.OperationalError):
        text = str(cause)
        state = next((code for said, code in _REFUSALS if said.search(text)), None)
    return str(state or "")


def is_disconnect(error: BaseException) -> bool:
    """Whether the connection to a server broke, or could not be made for want of a server."""
    if not isinstance(error, exc.DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.Error):
        return False
    return error.connection_invalidated or (
        isinstance(error, exc.OperationalError | exc.InterfaceError) and not sqlstate(error)
    )


def is_sqlite_io_error(error: BaseException) -> bool:
    """Whether SQLite could not read or write its files: what they hold is not known any more."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    return isinstance(cause, sqlite3.Error) and _sqlite_code(cause) == sqlite3.SQLITE_IOERR


def translate(error: BaseException, where: str) -> BaseException:
    """*error* as the exception that leaves the catalog; what is no database error stays itself."""
    if isinstance(error, ForebayError):
        return error
    cause: Any = error.orig if isinstance(error, exc.DBAPIError) else error
    if isinstance(error, exc.IntegrityError) or isinstance(cause, sqlite3.IntegrityError):
        return Conflict(
            f"the catalog refused a change because a rule forbids it ({_said(cause)}); somebody "
            "else committed first: read again and decide again"
        )
    if isinstance(cause, sqlite3.Error):
        return _translate_sqlite(cause, where)
    if isinstance(error, exc.DBAPIError):
        return _translate_postgresql(error, where)
    if isinstance(error, exc.SQLAlchemyError):
        return StorageError(f"the catalog {where} failed: {error}")
    return error


def _said(cause: object) -> str:
    """The first line of what the database said: the others repeat the statement."""
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _sqlite_code(cause: sqlite3.Error) -> int | None:
    code = getattr(cause, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _translate_sqlite(cause: sqlite3.Error, where: str) -> ForebayError:
    primary = _sqlite_code(cause)
    if primary == sqlite3.SQLITE_FULL:
        return ResourceExhausted(
            f"the disk of the catalog {where} is full; nothing of this call was stored: free space "
            "there and repeat it"
        )
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return IntegrityError(
            f"the catalog {where} is damaged ({cause}): stop the daemon, move the file away and "
            "restore a backup of it, or run `forebay recover` on the object tier"
        )
    name = getattr(cause, "sqlite_errorname", type(cause).__name__)
    return StorageError(
        f"the catalog {where} failed ({name}: {cause}); look at the disk below it and repeat"
    )


def _translate_postgresql(error: exc.DBAPIError, where: str) -> ForebayError:
    state, said = sqlstate(error), _said(error.orig)
    if state.startswith("28"):
        return PermissionDenied(
            f"the catalog {where} refuses this user ({said}): give the password in PGPASSWORD or "
            "in a file named by PGPASSFILE"
        )
    if state == "3D000":
        return InvalidRequest(f"the catalog {where} does not exist ({said}): create it (createdb)")
    if state == "42501":
        return PermissionDenied(
            f"the catalog {where} does not let this user change it ({said}): grant it CREATE on "
            "the schema and all on its tables"
        )
    if state in _FULL_STATES:
        return ResourceExhausted(
            f"the server of the catalog {where} is out of space ({said}); nothing of this call was "
            "stored: free some there and repeat it"
        )
    if state in _DAMAGED_STATES:
        return IntegrityError(
            f"the catalog {where} is damaged ({said}): restore a backup of the database, or run "
            "`forebay recover` on the object tier"
        )
    if state in PASSING_STATES or is_disconnect(error):
        return DaemonUnavailable(
            f"the catalog {where} does not answer ({said}); nothing of this call was stored: see "
            "that PostgreSQL runs and can be reached, and repeat it"
        )
    return StorageError(f"the catalog {where} failed ({state or 'no code'}: {said})")
