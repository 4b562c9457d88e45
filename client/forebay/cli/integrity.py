"""``forebay scrub``, ``fsck`` and ``gc``: whether all that is stored is good, and what may go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from forebay.cli.exit_codes import ExitCode
from forebay.cli.output import print_fields, print_table, record, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay_wire.v1.integrity_pb2 import (
        Finding,
        FsckReport,
        ListGarbageResponse,
        ScrubState,
    )


@click.command()
@click.option("--tier", default="", help="Only this one. Default: all tiers.")
@with_session
def scrub(session: Session, tier: str) -> ExitCode:
    """Read every copy, compare it with its digests, and have what is damaged repaired.

    Ends with status 6 if something damaged is not repaired, or could not be read.
    """
    with session.connect() as client, _progress(tier or "all tiers") as tell:
        state = client.scrub(tier, on_progress=tell)
    session.show(record(state), lambda: _print_scrub(state))
    left = [one for one in state.damaged if one.outcome == "quarantined"]
    return ExitCode.DAMAGED if left or state.num_unread else ExitCode.OK


@click.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended. Default: change nothing.")
@with_session
def fsck(session: Session, repair: bool) -> ExitCode:
    """Compare the catalog with the tiers, both ways.

    Ends with status 6 if something is wrong, with --repair: if something stays wrong.
    """
    with session.connect() as client:
        report = client.fsck(repair=repair)
    session.show(record(report), lambda: _print_fsck(report, repaired=repair))
    return ExitCode.DAMAGED if report.num_left else ExitCode.OK


@click.command()
@click.option("--dry-run", is_flag=True, help="Only list what would go, and why.")
@with_session
def gc(session: Session, dry_run: bool) -> None:
    """Delete what nothing names any more, in the background, as happens every hour anyway."""
    with session.connect() as client:
        found = client.garbage()
        if not dry_run:
            client.collect_garbage()
    session.show(record(found), lambda: _print_garbage(found))


def _print_scrub(state: ScrubState) -> None:
    print_fields(
        [
            ("copies", str(state.num_copies)),
            ("bytes", size(state.num_bytes)),
            ("damaged", str(state.num_damaged)),
            ("lists rewritten", str(state.num_lists)),
            ("not readable", f"{state.num_unread} {state.unread}".rstrip()),
        ]
    )
    if state.damaged:
        rows = [(one.blob, one.tier, one.outcome, one.problem) for one in state.damaged]
        print_table(("blob", "tier", "now", "problem"), rows)


def _print_fsck(report: FsckReport, *, repaired: bool) -> None:
    if not report.num_found:
        print("Nothing is wrong.")
        return
    print_table(("found", "of", "what", "repair"), _rows(report.found))
    if repaired:
        print(f"{report.num_found} findings, {report.num_left} of them left after the repair.")
        if report.num_left:
            print_table(("left", "of", "what", "repair"), _rows(report.left))
    else:
        print(f"{report.num_found} findings; `forebay fsck --repair` mends what can be mended.")


def _rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    return [(one.kind, one.subject, one.detail, one.repair or "nothing") for one in findings]


def _print_garbage(found: ListGarbageResponse) -> None:
    if found.num_doomed:
        rows = [
            (one.what, ", ".join(one.tiers), size(one.num_bytes), one.reason)
            for one in found.doomed
        ]
        print_table(("goes", "from", ">bytes", "because"), rows)
    print(f"{found.num_doomed} things to delete, {size(found.num_bytes)}.")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[ScrubState], object]]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda state: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"scrub {what}", total=None)
        yield lambda state: progress.update(
            bar, completed=state.done_bytes, total=state.total_bytes or None
        )
