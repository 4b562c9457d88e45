"""The options that every command has: which daemon, how long to wait, how to print."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forebay.cli.output import print_json

if TYPE_CHECKING:
    from forebay.client import Client


@dataclass(frozen=True)
class Session:
    """One invocation of a command."""

    address: str | None
    data: Path | None
    timeout: float
    as_json: bool

    def connect(self) -> Client:
        """A client of the daemon that was named; the daemon of a data folder is started."""
        from forebay.address import ADDRESS_VARIABLE, DATA_VARIABLE, DEFAULT_DATA_FOLDER
        from forebay.client import connect  # loads gRPC, which --help does not need
        from forebay.daemon_folder import require

        if self.address is not None and self.data is not None:
            raise click.UsageError("give --address or --data, not both")
        address = self.address or (None if self.data else os.environ.get(ADDRESS_VARIABLE))
        if address:
            return connect(address, timeout=self.timeout)
        folder = self.data or Path(os.environ.get(DATA_VARIABLE) or DEFAULT_DATA_FOLDER)
        require(folder)
        return connect(folder, timeout=self.timeout)

    def show(self, value: Any, people: Callable[[], None]) -> None:
        """Print *value* as JSON if that was asked for, else what *people* prints."""
        if self.as_json:
            print_json(value)
        else:
            people()


def with_session(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the common options; *command* gets a :class:`Session` as its first argument."""

    @click.option(
        "--data",
        type=click.Path(file_okay=False, path_type=Path),
        help="Data folder; its daemon is started if none runs. Default: $FOREBAY_DATA, else data.",
    )
    @click.option(
        "--address",
        help="unix:/path/rpc.sock or grpc://host:port. Default: $FOREBAY_ADDRESS.",
    )
    @click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=30.0,
        show_default=True,
        help="Seconds to wait for the daemon.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @functools.wraps(command)
    def wrapper(
        data: Path | None, address: str | None, timeout: float, as_json: bool, **rest: Any
    ) -> Any:
        return command(Session(address, data, timeout, as_json), **rest)

    return wrapper
