"""``forebay jobs``: the daemon's background work."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from forebay.cli.output import moment, print_table, record, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.client import Client
    from forebay_wire.v1.admin_pb2 import JobStatus

WATCH_SECONDS = 1.0


@click.command()
@click.option("--watch", is_flag=True, help="Show them again each second, until Ctrl-C.")
@click.option("--all", "everything", is_flag=True, help="Also finished ones and those due later.")
@with_session
def jobs(session: Session, watch: bool, everything: bool) -> None:
    """Background work: what runs, waits or failed, with its progress."""
    with session.connect() as client:
        while True:
            _show(session, client, everything=everything, watch=watch)
            if not watch:
                return
            time.sleep(WATCH_SECONDS)


def _show(session: Session, client: Client, *, everything: bool, watch: bool) -> None:
    found = client.jobs(everything=everything)
    if watch and not session.as_json and sys.stdout.isatty():
        click.clear()
    session.show([record(job) for job in found], lambda: _print(found))


def _print(found: list[JobStatus]) -> None:
    if not found:
        print("No background work.")
        return
    columns = ("work", "of", "state", ">progress", "", ">tries", "since", "error")
    print_table(columns, [_row(job) for job in found])


def _row(job: JobStatus) -> tuple[str, ...]:
    share = job.done_bytes / job.total_bytes if job.total_bytes else 0.0
    filled = int(10 * min(share, 1.0))
    bar = "█" * filled + "·" * (10 - filled) if job.total_bytes else ""
    done = f"{size(job.done_bytes)} of {size(job.total_bytes)}" if job.total_bytes else ""
    since = moment(job.created_unix)
    return (job.kind, job.target, job.state, done, bar, str(job.tries), since, job.error)
