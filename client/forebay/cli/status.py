"""``forebay status``: one page about a daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from forebay.cli.output import moment, print_fields, print_table, record, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay_wire.v1.admin_pb2 import JobStatus, StatusResponse, TierStatus


@click.command()
@with_session
def status(session: Session) -> None:
    """Tiers with their bytes, datasets, runs, background work."""
    with session.connect() as client:
        found = client.status()
    session.show(record(found), lambda: _print(found))


def _print(found: StatusResponse) -> None:
    print_fields(
        [
            ("daemon", f"{found.state}, version {found.server_version}, node {found.node}"),
            ("since", moment(found.started_unix)),
            ("data folder", found.data_folder),
            ("addresses", ", ".join(found.addresses)),
            ("datasets", str(found.num_datasets)),
            ("runs", str(found.num_runs)),
            ("clients", f"{found.num_clients}, with {found.num_uploads} uploads open"),
        ]
    )
    columns = ("tier", ">used", ">limit", ">free", ">dirty", ">open", ">reserved", ">files")
    print_table((*columns, "health", "where"), [_tier(tier) for tier in found.tiers])
    if found.jobs:
        print_table(
            ("work", "of", "state", ">done", ">tries", "error"), [_job(job) for job in found.jobs]
        )
    else:
        print("No background work.")


def _tier(tier: TierStatus) -> tuple[str, ...]:
    sizes = (tier.used_bytes, tier.limit_bytes, tier.free_bytes, tier.dirty_bytes)
    used, limit, free, dirty = (size(num_bytes) for num_bytes in sizes)
    return (
        tier.name,
        used,
        limit if tier.limit_bytes else "–",
        free,
        dirty,
        size(tier.open_bytes),
        size(tier.reserved_bytes),
        str(tier.num_files),
        tier.health,
        tier.location,
    )


def _job(job: JobStatus) -> tuple[str, ...]:
    done = f"{size(job.done_bytes)} of {size(job.total_bytes)}" if job.total_bytes else ""
    return (job.kind, job.target, job.state, done, str(job.tries), job.error)
