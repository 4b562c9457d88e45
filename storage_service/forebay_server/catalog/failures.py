"""What a failing database means to a caller: one of our exceptions, with what to do."""

from __future__ import annotations

import sqlite3

from sqlalchemy import exc

from forebay_wire.errors import (
    Conflict,
    ForebayError,
    IntegrityError,
    ResourceExhausted,
    StorageError,
)


def translate(error: BaseException, where: str) -> BaseException:
    """*error* as the exception that leaves the catalog; what is no database error stays itself."""
    if isinstance(error, ForebayError):
        return error
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    if isinstance(error, exc.IntegrityError) or isinstance(cause, sqlite3.IntegrityError):
        return Conflict(
            f"the catalog refused a change because a rule forbids it ({cause}); somebody else "
            "committed first: read again and decide again"
        )
    if isinstance(cause, sqlite3.Error):
        return _translate_sqlite(cause, where)
    if isinstance(error, exc.SQLAlchemyError):
        return StorageError(f"the catalog {where} failed: {error}")
    return error


def _translate_sqlite(cause: sqlite3.Error, where: str) -> ForebayError:
    code = getattr(cause, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
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
