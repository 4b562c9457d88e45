"""How the daemon's process ends, for scripts and for clients that started it."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit statuses of ``python -m forebay_server``; the docs list them with these meanings."""

    OK = 0
    """Done; a daemon drained and stopped."""
    FAILURE = 1
    """Something failed, or a second signal cut a drain short; the last log line says what."""
    USAGE = 2
    """A wrong argument, setting or address."""
    ALREADY_RUNNING = 3
    """Another daemon serves this data folder."""
    NEWER_SCHEMA = 4
    """A newer Forebay wrote this catalog."""
