"""The command line of the daemon: ``python -m forebay_server serve | recover``.

The flags of ``serve`` are generated from the table of options in ``config``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from forebay_server.config import OPTIONS, Configured, Option, load_config
from forebay_server.daemon import Daemon
from forebay_server.exit_codes import ExitCode
from forebay_server.observe.logs import configure_logs
from forebay_wire.errors import AlreadyRunning, ForebayError, InvalidRequest, VersionMismatch


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the process's exit status (see :class:`ExitCode`)."""
    try:
        done = commands.main(arguments, "forebay", standalone_mode=False)
        return int(done or ExitCode.OK)
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except click.Abort:
        return ExitCode.FAILURE
    except ForebayError as error:
        print(f"forebay: {error.message}", file=sys.stderr)
        return exit_code(error)


def exit_code(error: ForebayError) -> ExitCode:
    """The exit status that tells scripts what *error* was."""
    if isinstance(error, AlreadyRunning):
        return ExitCode.ALREADY_RUNNING
    if isinstance(error, VersionMismatch):
        return ExitCode.NEWER_SCHEMA
    if isinstance(error, InvalidRequest):
        return ExitCode.USAGE
    return ExitCode.FAILURE


def _flag(option: Option) -> Any:
    """The click option of one setting; nothing given stays None, so that other sources count."""
    shown = "" if option.default in ((), "", None) else f" Default: {option.default}."
    text = f"{option.meaning}{shown}"
    if option.is_flag:
        return click.option(
            f"--{option.name}/--no-{option.name}", option.field, default=None, help=text
        )
    return click.option(
        f"--{option.name}",
        option.field,
        default=None,
        multiple=option.repeatable,
        metavar=(option.unit or "|".join(option.choices)).upper().replace(" ", "-"),
        help=text,
    )


def _flags(names: tuple[str, ...]) -> Any:
    def decorate(command: Any) -> Any:
        for name in reversed(names):
            command = _flag(OPTIONS[name])(command)
        return command

    return decorate


def _configure(config_file: Path | None, given: dict[str, Any]) -> Configured:
    arguments = {name: value for name, value in given.items() if value not in (None, ())}
    return load_config(arguments, os.environ, config_file)


_config_file = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with the same names as these flags. Default: forebay.toml in the data folder.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def commands() -> None:
    """The Forebay daemon.

    Exit status: 0 done, 1 failed, 2 wrong usage or setting, 3 another daemon serves this data
    folder, 4 the catalog is from a newer Forebay.
    """


@commands.command()
@_config_file
@_flags(tuple(OPTIONS))
@click.option("--show-config", is_flag=True, help="Print every setting with its origin, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --show-config: as JSON.")
def serve(config_file: Path | None, show_config: bool, as_json: bool, **given: Any) -> int:
    """Serve a data folder until SIGTERM (or SIGINT) asks to drain and stop."""
    configured = _configure(config_file, given)
    if show_config:
        _print_config(configured, as_json=as_json)
        return ExitCode.OK
    config = configured.config
    configure_logs(config.log_level, config.log_format)
    return asyncio.run(Daemon(config, announce=_announce).serve())


def _announce(line: str) -> None:
    print(line, flush=True)


def _print_config(configured: Configured, *, as_json: bool) -> None:
    values = {name: getattr(configured.config, option.field) for name, option in OPTIONS.items()}
    rows = [
        {
            "name": name,
            "value": values[name],
            "unit": OPTIONS[name].unit,
            "origin": configured.origins[name],
        }
        for name in OPTIONS
    ]
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    for row in rows:
        print(f"{row['name']:15} = {row['value']!s:30} ({row['origin']})")
