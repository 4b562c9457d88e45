"""``forebay checkpoint delete``."""

from __future__ import annotations

import click

from forebay.cli.confirm import confirm
from forebay.cli.output import record
from forebay.cli.selector import parse_generation, split_run
from forebay.cli.session import Session, with_session
from forebay.cli.trash import telling, way_back
from forebay_wire.errors import InvalidRequest


@click.command("delete")
@click.argument("run")
@click.argument("generation", required=False)
@click.option("--all", "whole_run", is_flag=True, help="The whole run with all its generations.")
@click.option("--now", is_flag=True, help="For good, not into the trash.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_session
def delete_checkpoint(
    session: Session, run: str, generation: str | None, whole_run: bool, now: bool, yes: bool
) -> None:
    """Put one GENERATION of RUN (ATTEMPT/STEP, a tag, latest or best), or with --all the
    whole run, into the trash."""
    run, generation = split_run(run, generation)
    if (generation is None) != whole_run:
        raise click.UsageError("give a GENERATION (ATTEMPT/STEP), or --all for the whole run")
    attempt, step = None, None
    if generation is not None and generation.isdecimal():
        raise InvalidRequest(f"say which attempt: {generation!r} is not of the form ATTEMPT/STEP")
    with session.connect() as client:
        if generation is not None and "/" in generation:
            attempt, step = parse_generation(generation)
        elif generation is not None:
            found = client.run(run).get(generation).id
            if found.run != run:
                raise InvalidRequest(f"run {run} has nothing of its own: it stands on {found}")
            attempt, step = found.attempt, found.step
            generation = f"{attempt}/{step}"
        what = f"run {run!r} with all generations" if whole_run else f"{generation} of run {run!r}"
        confirm(f"Delete {what}?", is_sure=yes)
        target = f"run {run}" if whole_run else f"generation {run}@{attempt}/{step}"
        with telling(client, target) as made:
            num_deleted = client.delete_checkpoints(run, attempt=attempt, step=step, now=now)
    said = f"Deleted {num_deleted} generation{'' if num_deleted == 1 else 's'}."
    if num_deleted:
        said += f" {way_back(made)}"
    session.show(
        {
            "run": run,
            "generation": generation,
            "num_deleted": num_deleted,
            "trash": [record(one) for one in made],
        },
        lambda: print(said),
    )
