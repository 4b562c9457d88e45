"""``forebay pin``, ``unpin``, ``pins`` and ``dataset warm``: what stays in a tier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from forebay.cli.duration import Duration
from forebay.cli.output import moment, print_fields, print_table, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.movement import WarmState


@click.command("warm")
@click.argument("name")
@click.option("--version", default="latest", show_default=True, help="Which version.")
@click.option("--tier", default="", help="Where. Default: the fastest tier.")
@click.option(
    "--hold", type=Duration(), default=0.0, help="2h, 30m, …; default: until it is unpinned."
)
@with_session
def warm(session: Session, name: str, version: str, tier: str, hold: float) -> None:
    """Fetch all of a dataset into a tier, verify it, and keep it there.

    Prints a token; forebay pins TOKEN, or client.is_warm(token), tells whether that is still so.
    """
    with session.connect() as client, _progress(name) as tell:
        state = client.warm(name, version, tier=tier, hold=hold, on_progress=tell)
    session.show(asdict(state), lambda: _print(state))


@click.command()
@click.argument("target")
@click.option("--tier", default="", help="Where. Default: the fastest tier.")
@click.option("--hold", type=Duration(), default=0.0, help="Default: until it is unpinned.")
@with_session
def pin(session: Session, target: str, tier: str, hold: float) -> None:
    """Keep TARGET in a tier: a dataset (NAME, NAME@VERSION) or generation (RUN@ATTEMPT/STEP).

    What is not there is fetched in the background.
    """
    with session.connect() as client:
        state = client.pin(target, tier=tier, hold=hold)
    session.show(asdict(state), lambda: _print(state))


@click.command()
@click.argument("which")
@with_session
def unpin(session: Session, which: str) -> None:
    """End a pin (its token), or all pins of a dataset or generation."""
    with session.connect() as client:
        number = client.unpin(which)
    session.show(
        {"which": which, "num_unpinned": number},
        lambda: print(f"Ended {number} pin{'' if number == 1 else 's'}."),
    )


@click.command()
@click.argument("token", required=False)
@with_session
def pins(session: Session, token: str | None) -> None:
    """All pins and warm holds; with a TOKEN whether that one is still so, and why not."""
    with session.connect() as client:
        found = [client.is_warm(token)] if token else client.pins()
    if token:
        session.show(asdict(found[0]), lambda: _print(found[0]))
        return
    session.show([asdict(one) for one in found], lambda: _table(found))


def _table(found: list[WarmState]) -> None:
    columns = ("token", "of", "tier", "state", "still warm", ">bytes", "until", "because")
    rows = [
        (
            one.token,
            one.target,
            one.tier,
            one.state,
            "yes" if one.still_warm else "no",
            size(one.total_bytes),
            moment(one.expires_unix) or "unpinned",
            one.because,
        )
        for one in found
    ]
    print_table(columns, rows)


def _print(state: WarmState) -> None:
    print_fields(
        [
            ("token", state.token),
            ("of", state.target),
            ("tier", state.tier),
            ("still warm", "yes" if state.still_warm else f"no, because {state.because}"),
            ("bytes", f"{size(state.done_bytes)} of {size(state.total_bytes)}"),
            ("until", moment(state.expires_unix) or "it is unpinned"),
        ]
    )


@contextmanager
def _progress(name: str) -> Iterator[Callable[[WarmState], object]]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda state: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"warm {name}", total=None)
        yield lambda state: progress.update(
            bar, completed=state.done_bytes, total=state.total_bytes
        )
