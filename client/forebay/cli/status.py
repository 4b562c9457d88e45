"""``forebay status``: one page about a daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from forebay.cli.output import moment, print_fields, print_table, record, size
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from forebay_wire.v1.admin_pb2 import JobStatus, StatusResponse, TierStatus
    from forebay_wire.v1.plans_pb2 import LoaderTimes, PlanSummary, Waits


@click.command()
@click.option("--loaders", is_flag=True, help="Only the loaders, and where their time goes.")
@with_session
def status(session: Session, loaders: bool) -> None:
    """Tiers with their bytes, datasets, runs, background work, and the plans of loaders."""
    with session.connect() as client:
        found = client.status()
    if loaders:
        session.show([record(plan) for plan in found.plans], lambda: _print_loaders(found))
    else:
        session.show(record(found), lambda: _print(found))


def _print_loaders(found: StatusResponse) -> None:
    if not found.plans:
        print("No loader reads.")
        return
    columns = ("loader", "reads", ">at", ">samples/s", ">waited", "for", ">masked")
    print_table(columns, [_loader(plan) for plan in found.plans])
    for plan in found.plans:
        notes = [note for note in (plan.times.advice, plan.times.covers) if note]
        if notes:
            print(f"{plan.loader}: {'; '.join(notes)}")


def _loader(plan: PlanSummary) -> tuple[str, ...]:
    loader, reads, place, rate, *_ = _plan(plan)
    if not plan.HasField("times"):
        return (loader, reads, place, rate, "–", _waits(plan.waits), "–")
    times = plan.times
    waited = f"{times.wait_seconds / times.seconds:.1%}" if times.wait_seconds else "–"
    return (loader, reads, place, rate, waited, _causes(times), str(times.masked_samples))


def _causes(times: LoaderTimes) -> str:
    """What the training loop waited for; of workers, what they were busy with."""
    field = "wait_seconds" if times.wait_seconds else "read_seconds"
    took: dict[str, float] = {one.cause: getattr(one, field) for one in times.causes}
    total = sum(took.values()) or 1.0
    parts = sorted(took.items(), key=lambda part: -part[1])
    return ", ".join(f"{cause} {one / total:.0%}" for cause, one in parts if one >= 0.005 * total)


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
    columns = ("tier", ">used", ">plain", ">limit", ">free", ">dirty", ">open", ">reserved")
    print_table((*columns, ">files", "health", "where"), [_tier(tier) for tier in found.tiers])
    for tier in found.tiers:
        if tier.note:
            print(f"Tier {tier.name}: {tier.note}.")
    if found.jobs:
        print_table(
            ("work", "of", "state", ">done", ">tries", "error"), [_job(job) for job in found.jobs]
        )
    else:
        print("No background work.")
    if found.plans:
        print_table(
            ("loader", "reads", ">at", ">samples/s", ">ahead", ">ready", ">ends in", "waited"),
            [(*_plan(plan), _waits(plan.waits)) for plan in found.plans],
        )


def _tier(tier: TierStatus) -> tuple[str, ...]:
    sizes = (tier.used_bytes, tier.limit_bytes, tier.free_bytes, tier.dirty_bytes)
    used, limit, free, dirty = (size(num_bytes) for num_bytes in sizes)
    return (
        tier.name,
        used,
        size(tier.plain_bytes) if tier.plain_bytes else "–",
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


def _plan(plan: PlanSummary) -> tuple[str, ...]:
    """Ahead: of the blobs that come next; ready: of these, in a local tier."""
    place = f"{plan.epoch}:{plan.position}" if plan.num_samples else str(plan.position)
    return (
        plan.loader,
        plan.dataset or "ranges",
        place,
        f"{plan.rate:.0f}",
        size(plan.ahead_bytes),
        size(plan.ready_bytes),
        f"{plan.expires_seconds:.0f} s",
    )


def _waits(waits: Waits) -> str:
    """How often and how long readers waited, and why."""
    parts = {
        "tier": waits.tier_seconds,
        "queue": waits.queue_seconds,
        "throttle": waits.throttle_seconds,
        "origin": waits.origin_seconds,
    }
    if not waits.num_waits:
        return "never"
    reasons = ", ".join(f"{reason} {took:.2f}" for reason, took in parts.items() if took >= 0.005)
    total = f"{sum(parts.values()):.2f} s in {waits.num_waits}"
    return f"{total} ({reasons}; longest {waits.longest_seconds:.2f})" if reasons else total
