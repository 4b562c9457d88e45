"""How ``forebay`` ends, for scripts."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    DaemonUnavailable,
    DeadlineExceeded,
    Fenced,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)


class ExitCode(IntEnum):
    """Exit statuses of every command but ``serve`` and ``recover``, which list their own."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    EXISTS = 5
    DAMAGED = 6
    DENIED = 7
    INTERRUPTED = 130


MEANINGS: Final = {
    ExitCode.OK: "done",
    ExitCode.FAILURE: "failed; the message says why",
    ExitCode.USAGE: "wrong usage or a value that can never work",
    ExitCode.NOT_FOUND: "no such dataset, version, run, generation, file or data folder",
    ExitCode.UNAVAILABLE: "no daemon answers, or not in time",
    ExitCode.EXISTS: "the name is taken, or somebody else committed first",
    ExitCode.DAMAGED: "stored bytes do not match their digests, or the catalog its tiers",
    ExitCode.DENIED: "no token, a wrong one, or not allowed",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
}

_OF_ERROR: Final[tuple[tuple[type[ForebayError], ExitCode], ...]] = (
    (NotFound, ExitCode.NOT_FOUND),
    (DaemonUnavailable, ExitCode.UNAVAILABLE),
    (DeadlineExceeded, ExitCode.UNAVAILABLE),
    (AlreadyExists, ExitCode.EXISTS),
    (Conflict, ExitCode.EXISTS),
    (Fenced, ExitCode.EXISTS),
    (IntegrityError, ExitCode.DAMAGED),
    (PermissionDenied, ExitCode.DENIED),
    (Unauthenticated, ExitCode.DENIED),
    (InvalidRequest, ExitCode.USAGE),
)


def exit_code(error: ForebayError) -> ExitCode:
    """The exit status that stands for *error*."""
    return next((code for kind, code in _OF_ERROR if isinstance(error, kind)), ExitCode.FAILURE)


def epilog() -> str:
    """The table for ``forebay --help``."""
    lines = [f"  {code.value:>3}  {meaning}" for code, meaning in MEANINGS.items()]
    return "\b\nExit status:\n" + "\n".join(lines)
