"""``forebay why``: where something lies, why, and what happened to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from forebay.cli.output import moment, print_fields, print_table, record, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay_wire.v1.movement_pb2 import WhyResponse


@click.command()
@click.argument("subject")
@click.option("--events", default=50, show_default=True, help="How much of its history.")
@with_session
def why(session: Session, subject: str, events: int) -> None:
    """Where SUBJECT lies and why: a blob's id, NAME, NAME@VERSION, "run NAME", RUN@ATTEMPT/STEP."""
    with session.connect() as client:
        found = client.why(subject, events)
    session.show(record(found), lambda: _print(found))


def _print(found: WhyResponse) -> None:
    print_fields(
        [
            ("subject", found.subject),
            ("blobs", f"{found.num_blobs}, {size(found.num_bytes)}"),
            ("dirty", size(found.dirty_bytes)),
            *(("kept by", name) for name in found.kept_by),
            *(("because", sentence) for sentence in found.because),
        ]
    )
    if found.copies:
        rows = [
            (
                one.tier,
                one.encoding,
                one.state,
                str(one.num_blobs),
                size(one.num_bytes),
                size(one.stored_bytes),
                moment(one.created_unix),
                moment(one.verified_unix) or "when it was written",
                one.reason,
            )
            for one in found.copies
        ]
        columns = ("tier", "encoding", "state", ">blobs", ">bytes", ">stored", "since", "checked")
        print_table((*columns, "reason"), rows)
    if found.jobs:
        work = [(job.kind, job.target, job.state, job.error) for job in found.jobs]
        print_table(("work", "of", "state", "error"), work)
    if found.history:
        told = [(moment(one.at_unix), one.subject, one.event, one.detail) for one in found.history]
        print_table(("when", "of", "what", "how"), told)
