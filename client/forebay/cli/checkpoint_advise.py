"""``forebay checkpoint advise``."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from forebay.cli.duration import Duration
from forebay.cli.output import print_fields
from forebay.cli.session import Session, with_session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forebay.checkpoint.advise import Advice
    from forebay_wire.v1.checkpoints_pb2 import Generation

LOOKED_AT = 50
"""Newest saves whose cost counts."""


@click.command("advise")
@click.argument("run")
@click.option(
    "--mtbf",
    type=Duration(),
    required=True,
    help="Mean time between failures of the whole run, as in 6h.",
)
@click.option("--cost", type=Duration(), help="How long a save holds it up. Default: measured.")
@click.option(
    "--slowdown",
    type=Duration(),
    default=0.0,
    help="That the steps after a save take longer in all; benchmarks measure it. Default: 0.",
)
@click.option(
    "--restart", type=Duration(), default=0.0, help="From a failure until training goes on."
)
@click.option("--step-seconds", type=float, help="Of one step: the interval in steps, too.")
@with_session
def advise_interval(
    session: Session,
    run: str,
    mtbf: float,
    cost: float | None,
    slowdown: float,
    restart: float,
    step_seconds: float | None,
) -> None:
    """How often RUN should save: from what its saves cost, and how often it fails (Young, Daly).

    Prints and changes nothing.
    """
    from forebay.checkpoint.advise import advise

    with session.connect() as client:
        saves = [one for one in client.checkpoints(run) if one.state == "committed"][:LOOKED_AT]
    measured = [one.stall_seconds for one in saves if one.stall_seconds > 0]
    found = advise(
        mtbf,
        measured if cost is None else [cost],
        slowdown_seconds=slowdown,
        landing_seconds=_landing(saves),
        restart_seconds=restart,
    )
    steps = max(1, round(found.interval_seconds / step_seconds)) if step_seconds else None
    value = {
        "run": run,
        "num_saves": len(measured) if cost is None else 0,
        **asdict(found),
        "is_held_back": found.is_held_back,
        "interval_steps": steps,
    }
    session.show(value, lambda: _print(found, len(measured) if cost is None else 0, steps))


def _landing(saves: Sequence[Generation]) -> float:
    """Median seconds from the seal of a generation to its commit, where both are known."""
    known = [one.local_unix - one.ram_unix for one in saves if one.ram_unix and one.local_unix]
    return max(0.0, statistics.median(known)) if known else 0.0


def _print(found: Advice, num_saves: int, steps: int | None) -> None:
    whence = f"median of {num_saves} saves" if num_saves else "given"
    fields = [
        ("a save costs", f"{found.cost_seconds:.3f} s ({whence})"),
        ("it is durable after", f"{found.landing_seconds:.1f} s more"),
        ("a failure comes every", _duration(found.mtbf_seconds)),
        ("save every", f"{_duration(found.interval_seconds)} (Daly)"),
        ("", f"{_duration(found.young_seconds)} (Young)"),
        ("lost then", f"{100 * found.lost_fraction:.2f} % of all time"),
    ]
    if steps is not None:
        fields.insert(4, ("", f"{steps:,} steps"))
    print_fields(fields)
    if found.is_held_back:
        print(
            "Saves would follow faster than they become durable: a faster tier, or an interval "
            f"above {_duration(found.landing_seconds)}."
        )


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
