"""``forebay serve``, ``backup`` and ``recover``: the daemon's own commands, in its own process."""

from __future__ import annotations

import importlib.util
import os
import sys

import click

from forebay_wire.errors import NotFound

_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@click.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Run a daemon: forebay serve [--data DIR] … (see forebay serve --help)."""
    _become("serve", arguments)


@click.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def backup(arguments: tuple[str, ...]) -> None:
    """Copy the catalog of a data folder into a file: forebay backup TARGET …"""
    _become("backup", arguments)


@click.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def recover(arguments: tuple[str, ...]) -> None:
    """Rebuild an empty data folder from an object tier: forebay recover URL …"""
    _become("recover", arguments)


def _become(command: str, arguments: tuple[str, ...]) -> None:
    """Replace this process, so that signals and the exit status are the daemon's."""
    if importlib.util.find_spec("forebay_server") is None:
        raise NotFound("the daemon is not installed: pip install 'forebay[server]'")
    sys.stdout.flush()
    # -P: modules in the current folder must not shadow the daemon's.
    program = [sys.executable, "-P", "-m", "forebay_server", command, *arguments]
    os.execv(sys.executable, program)  # noqa: S606 - no shell is wanted
