"""The command line of the daemon: ``python -m forebay_server serve | backup | recover``.

The flags of ``serve`` are generated from the table of options in ``config``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from forebay_server.catalog.postgresql import dump_advice
from forebay_server.catalog.sqlite import back_up
from forebay_server.config import OPTIONS, Configured, Option, load_config
from forebay_server.daemon import CATALOG_FILE_NAME, Daemon
from forebay_server.exit_codes import ExitCode
from forebay_server.observe.logs import configure_logs
from forebay_server.publish.recovery import Recovered, recover
from forebay_wire.errors import AlreadyRunning, ForebayError, InvalidRequest, VersionMismatch

Decorator = Callable[[Callable[..., int]], Callable[..., int]]


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


def _flag(option: Option) -> Decorator:
    """The click option of one setting; nothing given stays None, so that other sources count."""
    shown = "" if str(option.default) in ("()", "", "None") else f" Default: {option.default}."
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


def _all_flags(command: Callable[..., int]) -> Callable[..., int]:
    for option in reversed(OPTIONS.values()):
        command = _flag(option)(command)
    return command


def _configure(config_file: Path | None, given: dict[str, Any]) -> Configured:
    arguments = {name: value for name, value in given.items() if value not in (None, ())}
    return load_config(arguments, os.environ, config_file)


GARBAGE_OBJECTS: Final = 20_000
"""New objects, less those gone, after which the youngest are searched for cyclic garbage."""

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
@_all_flags
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
    return asyncio.run(Daemon(config, started=_started).serve())


def _started(lines: Sequence[str]) -> None:
    _spare_what_stays()
    print(*lines, sep="\n", flush=True)


def _spare_what_stays() -> None:
    """Have the collector of cyclic garbage leave alone what there is by now, and look for new
    garbage less often.

    A daemon that has started holds hundreds of thousands of objects that stay. To go through them
    takes some 0.1 s, in which nothing is served.
    """
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])


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


@commands.command("backup")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@_config_file
@_flag(OPTIONS["data"])
@_flag(OPTIONS["catalog"])
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def backup_command(target: Path, config_file: Path | None, as_json: bool, **given: Any) -> int:
    """Copy the catalog into the file TARGET, which must not exist; a daemon may serve meanwhile.

    The copy is of one moment, checked and durable. It holds what the daemon knows, not the bytes of
    datasets and checkpoints. A catalog in PostgreSQL is saved with pg_dump: the message says how.
    """
    config = _configure(config_file, given).config
    if config.catalog:
        raise InvalidRequest(dump_advice(config.catalog, target))
    back_up(config.data / CATALOG_FILE_NAME, target)
    done = {"backup": str(target), "bytes": target.stat().st_size}
    print(json.dumps(done) if as_json else f"saved {target}: {done['bytes']} bytes")
    return ExitCode.OK


@commands.command("recover")
@click.argument("url")
@_flag(OPTIONS["data"])
@_flag(OPTIONS["object-client"])
@_flag(OPTIONS["object-options"])
@click.option("--json", "as_json", is_flag=True, help="Print progress and result as JSON lines.")
def recover_command(url: str, as_json: bool, **given: Any) -> int:
    """Rebuild an empty data folder from the object tier at URL.

    Everything that had become remote is there again: datasets, selections, runs and generations.
    Bytes are fetched from the object tier when they are read. Exit status 1 if something had to be
    left out: the last lines name it, the rest is there.
    """
    arguments = {name: value for name, value in given.items() if value is not None}
    config = load_config(arguments, os.environ).config
    configure_logs(config.log_level, config.log_format)
    report = _JsonReport() if as_json else _LineReport()
    result = asyncio.run(
        recover(
            _absolute(url),
            config.data,
            client=config.object_client,
            options=config.object_options,
            report=report,
        )
    )
    report.finish(result)
    return ExitCode.FAILURE if result.left_out else ExitCode.OK


def _absolute(url: str) -> str:
    """*url*, with a plain path made the URL of that folder."""
    return url if "://" in url else f"file://{Path(url).expanduser().resolve()}"


class _JsonReport:
    """Progress for machines: a JSON object a line, the result last."""

    def __call__(self, step: str, done: int, total: int) -> None:
        print(json.dumps({"step": step, "done": done, "total": total}), flush=True)

    def finish(self, result: Recovered) -> None:
        print(json.dumps({"step": "recovered", **result.as_json()}), flush=True)


class _LineReport:
    """Progress for people: one line that is written over on a terminal, else only the result."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, step: str, done: int, total: int) -> None:
        if self._is_terminal:
            print(f"\r\x1b[2K{step}: {done} of {total}", end="", file=sys.stderr, flush=True)

    def finish(self, result: Recovered) -> None:
        if self._is_terminal:
            print("\r\x1b[2K", end="", file=sys.stderr)
        print(
            f"recovered into {result.folder}: {result.num_datasets} datasets with "
            f"{result.num_versions} versions and {result.num_selections} selections, "
            f"{result.num_runs} runs with {result.num_generations} generations, "
            f"{result.num_blobs} blobs of {result.num_bytes} bytes"
        )
        if result.num_trashed:
            print(f"{result.num_trashed} that were deleted are in the trash: forebay trash list")
        for left in result.left_out:
            print(f"left out: {left.what}: {left.reason}")
        print(f"serve it with: forebay serve --data {result.folder}")
