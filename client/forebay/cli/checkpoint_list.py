"""``forebay checkpoint list``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from forebay.cli.output import moment, print_table, record, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay.client import Client
    from forebay_wire.v1.checkpoints_pb2 import Generation


@click.command("list")
@click.argument("run", required=False)
@with_session
def list_checkpoints(session: Session, run: str | None) -> None:
    """The generations of RUN, newest first; without RUN, all runs."""
    with session.connect() as client:
        if run is None:
            _list_runs(session, client)
        else:
            _list_generations(session, client, run)


def _list_runs(session: Session, client: Client) -> None:
    found = client.runs()

    def people() -> None:
        rows = [
            (
                one.run,
                str(one.num_attempts),
                str(one.num_generations),
                size(one.num_bytes),
                f"{one.latest_attempt}/{one.latest_step}" if one.has_latest else "–",
                one.latest_durability,
            )
            for one in found
        ]
        columns = ("run", ">attempts", ">generations", ">bytes", "latest", "durability")
        print_table(columns, rows)

    session.show([record(one) for one in found], people)


def _list_generations(session: Session, client: Client, run: str) -> None:
    attempts, generations = client.describe_run(run)

    def people() -> None:
        rows = [
            (
                str(one.attempt),
                str(one.step),
                one.state,
                one.durability or "–",
                str(one.num_ranks),
                size(one.num_bytes),
                moment(one.created_unix),
                _parent(one),
                _marks(one),
                one.error or one.metrics_json,
            )
            for one in generations
        ]
        columns = (">attempt", ">step", "state", "durability", ">ranks", ">bytes", "created")
        last = ("attempt began from", "tags", "metrics or error")
        print_table((*columns, *last), rows, title=f"Run {run}")

    value = {
        "run": run,
        "attempts": [record(one) for one in attempts],
        "generations": [record(one) for one in generations],
    }
    session.show(value, people)


def _parent(one: Generation) -> str:
    if not one.has_parent:
        return "–"
    run = f"{one.parent_run}@" if one.parent_run else ""
    return f"{run}{one.parent_attempt}/{one.parent_step}"


def _marks(one: Generation) -> str:
    pinned = [f"pinned: {one.pin_reason}" if one.pin_reason else "pinned"] if one.is_pinned else []
    return ", ".join([*one.tags, *pinned])
