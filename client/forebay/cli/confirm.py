"""Asking before something is gone for ever."""

from __future__ import annotations

import sys

import click


def confirm(question: str, *, is_sure: bool) -> None:
    """Ask on a terminal unless the caller said ``--yes``; without a terminal, refuse.

    Raises click.Abort for a no.
    """
    if is_sure:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody is there to be asked: pass --yes.")
    click.confirm(question, abort=True, err=True)
